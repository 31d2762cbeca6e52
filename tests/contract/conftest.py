from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from torch import Tensor, nn

import qatkit
from tests.contract.zoo import LARGE, MODELS, Float, build, run, train_step


@dataclass
class Prepared:
    """A float model and the same one prepared and calibrated; tests copy before they change."""

    float: Float
    model: nn.Module
    before: dict[str, Tensor]

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.model)

    @cached_property
    def expected(self) -> list[Tensor]:
        """What the float model returns in eval mode."""
        return run(self.float, self.float.model)

    @cached_property
    def outputs(self) -> list[Tensor]:
        """What the prepared model returns in eval mode."""
        return run(self.float, self.model)

    @cached_property
    def trained(self) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Loss, gradients and state of the prepared model after one seeded training step."""
        model = self.copy()
        return *train_step(self.float, model), model.state_dict()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let one process run all tests of one model, which is built and prepared once."""
    for item in items:
        model = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        if isinstance(model, str):
            item.add_marker(pytest.mark.xdist_group(model))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
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
def light(case: Prepared) -> Prepared:
    """For what costs many steps and shows nothing new on a big transformer."""
    if case.float.name == LARGE:
        pytest.skip(f"{LARGE} takes long")
    return case


@pytest.fixture
def classifier(light: Prepared) -> Prepared:
    if light.float.is_detector:
        pytest.skip("detection: data-dependent shapes do not compile as one graph")
    return light
