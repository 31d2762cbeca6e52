from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import qatkit
from tests.contract.zoo import MODELS, Float, build


@dataclass(frozen=True)
class Prepared:
    """A float model and the same one prepared and calibrated; tests copy before they change."""

    float: Float
    model: nn.Module
    before: dict[str, Tensor]

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.model)


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=MODELS)
def case(request: pytest.FixtureRequest) -> Prepared:
    """One model at a time is alive: pytest runs all tests of one parameter together."""
    case = build(request.param)
    model = copy.deepcopy(case.model)
    before = dict(model.state_dict(keep_vars=True))
    assert qatkit.prepare(model, case.inputs) is model
    qatkit.calibrate(model, [case.inputs], progress=False)
    return Prepared(case, model, before)


@pytest.fixture
def classifier(case: Prepared) -> Prepared:
    if case.float.is_detector:
        pytest.skip("detection: the targets make data-dependent shapes")
    return case
