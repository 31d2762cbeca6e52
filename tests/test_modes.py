"""Context managers restore what they found, also nested; globs match whole paths."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from qatkit.errors import QatkitError, QatkitTypeError
from qatkit.modes import (
    Mode,
    disable_quantization,
    enable_quantization,
    quantizers,
    select_quantizers,
)
from qatkit.nn import QuantConv2d, QuantLinear


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = QuantConv2d(3, 4, 3)
        self.layer1 = nn.Sequential(QuantConv2d(4, 4, 3), nn.ReLU())
        self.layer1.add_module("conv1", QuantConv2d(4, 4, 3))
        self.fc = QuantLinear(4, 2)
        self.fc.input_quantizer = self.layer1.conv1.input_quantizer


def on(model: nn.Module) -> dict[str, bool]:
    return {path: quantizer.quantize for path, quantizer in quantizers(model)}


def off(model: nn.Module) -> set[str]:
    return {path for path, state in on(model).items() if not state}


def test_each_quantizer_comes_once() -> None:
    found = [quantizer for _, quantizer in quantizers(Net())]
    assert len(found) == len({id(quantizer) for quantizer in found}) == 7


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("conv1", {"conv1.input_quantizer", "conv1.weight_quantizer"}),
        ("*.conv1", {"layer1.conv1.input_quantizer", "layer1.conv1.weight_quantizer"}),
        ("layer1.?", {"layer1.0.input_quantizer", "layer1.0.weight_quantizer"}),
        ("fc.weight_quantizer", {"fc.weight_quantizer"}),
        ("fc.input_quantizer", {"layer1.conv1.input_quantizer"}),
        ("[cf]*.weight_quantizer", {"conv1.weight_quantizer", "fc.weight_quantizer"}),
    ],
)
def test_patterns(pattern: str, expected: set[str]) -> None:
    model = Net()
    with disable_quantization(model, pattern):
        assert off(model) == expected
    assert not off(model)
    disable_quantization(model, pattern).apply()
    assert off(model) == expected
    enable_quantization(model).apply()
    assert not off(model)


def test_everything_by_default() -> None:
    model = Net()
    with disable_quantization(model):
        assert off(model) == set(on(model))


def test_nested_and_after_an_exception() -> None:
    model = Net()
    disable_quantization(model, "fc").apply()
    before = on(model)

    def fail() -> None:
        with disable_quantization(model):
            within = on(model)
            with enable_quantization(model, "conv1"):
                assert on(model)["conv1.weight_quantizer"]
            assert on(model) == within
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert on(model) == before


def test_one_object_can_be_entered_again_within_itself() -> None:
    model = Net()
    mode = disable_quantization(model, "fc")
    before = on(model)
    with mode:
        with mode:
            pass
        assert off(model) == {"layer1.conv1.input_quantizer", "fc.weight_quantizer"}
    assert on(model) == before
    with mode:
        assert off(model)
    assert on(model) == before


def test_nothing_happens_before_it_is_used() -> None:
    model = Net()
    disable_quantization(model)
    assert not off(model)


def test_a_failed_change_leaves_nothing_to_undo() -> None:
    def change() -> Any:
        raise QatkitError("no")

    mode = Mode(change)
    with pytest.raises(QatkitError, match="no"), mode:
        pass


ILLEGAL = [
    ("conv2", "the glob matches no module path"),
    ("Conv1", "the glob matches no module path"),
    ("0", r"write '\*\.0' to hit 'layer1.0'"),
    ("layer1.1", "has no quantizer inside"),
    ("", "has no quantizer inside|matches no module path"),
]


@pytest.mark.parametrize("verb", [disable_quantization, enable_quantization])
@pytest.mark.parametrize(("pattern", "message"), ILLEGAL)
def test_a_pattern_that_hits_nothing(verb: Any, pattern: str, message: str) -> None:
    with pytest.raises(QatkitError, match=message) as caught:
        verb(Net(), pattern)
    assert str(caught.value).startswith(f"{verb.__name__}")
    assert "\n" not in str(caught.value)


def test_a_float_model() -> None:
    with pytest.raises(QatkitError, match=r"Linear has no quantizers, call qatkit\.prepare"):
        disable_quantization(nn.Linear(2, 2))


@pytest.mark.parametrize("model", [None, 3, Net, "resnet18"])
def test_no_module(model: Any) -> None:
    with pytest.raises(QatkitTypeError, match=r"not a torch\.nn\.Module"):
        select_quantizers(model, "*", "here")
