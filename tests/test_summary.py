"""The summary tells the state of every quantizer and never fails on a module."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatkit.calibrate import calibrate
from qatkit.errors import QatkitTypeError
from qatkit.freeze import freeze_batch_norm, freeze_ranges
from qatkit.modes import disable_quantization
from qatkit.nn import QuantConv2d, QuantLinear
from qatkit.prepare import prepare
from qatkit.summary import summary

X = torch.linspace(-2, 3, 4 * 3 * 6 * 6).reshape(4, 3, 6, 6)


class Fork(nn.Module):
    """Two layers read one tensor, so that they share a quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3)
        self.right = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.left(x)) * self.right(x)


def state(model: nn.Module) -> dict[str, str]:
    return {entry.path: entry.state for entry in summary(model).quantizers}


def test_states() -> None:
    model = prepare(Fork(), X)
    seen = state(model)
    shared = next(path for path in seen if path.endswith("input_quantizer"))
    assert seen[shared] == "on, uncalibrated"
    assert seen["left.weight_quantizer"] == "on"
    calibrate(model, [X])
    assert state(model)[shared] == "on"
    freeze_ranges(model).apply()
    disable_quantization(model, "left.weight_quantizer").apply()
    freeze_batch_norm(model).apply()
    assert state(model)[shared] == "on, frozen"
    assert state(model)["left.weight_quantizer"] == "off, frozen"
    whole = summary(model)
    assert (whole.batch_norms, whole.frozen_batch_norms) == (1, 1)
    assert [(fold.layer, fold.batch_norm, fold.frozen) for fold in whole.folds] == [
        ("left", "bn", True)
    ]


def test_numbers_and_sharing() -> None:
    model = prepare(Fork(), X)
    calibrate(model, [X], method="minmax")
    entries = {entry.path: entry for entry in summary(model).quantizers}
    shared = next(entry for entry in entries.values() if entry.role == "activation")
    assert (shared.aliases, shared.min, shared.max) == (1, -2.0, 3.0)
    assert shared.scale == pytest.approx(3 / 127)
    weight = entries["right.weight_quantizer"]
    assert (weight.bits, weight.observer, weight.axis) == (8, "minmax", 0)
    assert weight.max == model.right.weight.max().item()


def test_reads_well_and_is_frozen() -> None:
    model = prepare(Fork(), X)
    whole = summary(model)
    lines = str(whole).splitlines()
    assert lines[0] == (
        "Fork: 2 weight and 1 activation quantizers, 0 off, 0 frozen, 1 uncalibrated; "
        "1 batch norms folded, 0 of 1 batch norms frozen"
    )
    assert len(lines) == 3 + len(whole.quantizers)
    assert "x2" in str(whole)
    with pytest.raises(dataclasses.FrozenInstanceError):
        whole.model = "other"  # type: ignore[misc]


def test_changes_nothing() -> None:
    model = prepare(Fork(), X).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    str(summary(model))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), nn.Sequential(), nn.Sequential(nn.BatchNorm1d(2)), nn.ReLU()]
)
def test_a_float_model(model: nn.Module) -> None:
    assert "qatkit.prepare(model, example_inputs) puts quantizers in" in str(summary(model))


def test_a_single_layer_and_a_batch_norm_outside() -> None:
    assert summary(QuantLinear(2, 2)).quantizers[0].role in ("weight", "activation")
    conv = QuantConv2d(3, 4, 1)
    conv.fold(nn.BatchNorm2d(4))
    assert summary(conv).folds[0].batch_norm is None
    assert "outside" in str(summary(conv))


@pytest.mark.parametrize("model", [None, 1, nn.Linear, [nn.Linear(1, 1)]])
def test_no_module(model: Any) -> None:
    with pytest.raises(QatkitTypeError, match=r"not a torch\.nn\.Module"):
        summary(model)
