"""Which tensors cannot be negative, and which activations get unsigned codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qatkit
from qatkit import QuantConfig, QuantSpec, Rule
from qatkit.graph.capture import capture
from qatkit.graph.nonnegative import nonnegative_values
from tests.graph.blocks import X, conv, prepared

UNSIGNED_4 = QuantConfig(activation=QuantSpec(num_bits=4), unsigned_activations=True)
Function = Callable[[Tensor], Any]


class Calls(nn.Module):
    """A module that calls a function."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


NONNEGATIVE: dict[str, Function] = {
    "relu": torch.relu,
    "relu in place": lambda x: x.clone().relu_(),
    "relu6": F.relu6,
    "sigmoid": lambda x: x.sigmoid(),
    "hardsigmoid": F.hardsigmoid,
    "softmax": lambda x: x.softmax(1),
    "clamp": lambda x: x.clamp(0, 6),
    "clamp by keyword": lambda x: x.clamp(max=3.0, min=0.5),
    "hardtanh": lambda x: F.hardtanh(x, 0.0, 6.0),
    "copies": lambda x: x.relu().permute(0, 2, 3, 1).flatten(1)[:, 3:].reshape(2, 3, -1),
    "split": lambda x: x.relu().chunk(3, 1),
    "max pool": lambda x: F.max_pool2d(x.relu(), 3, 1, 1),
    "avg pool": lambda x: F.adaptive_avg_pool2d(x.abs(), 1),
    "mean": lambda x: x.relu().mean((2, 3)),
    "concat": lambda x: torch.cat([x.relu(), x.sigmoid()], 1),
    "sum": lambda x: x.relu() + x.sigmoid() + 3,
    "product": lambda x: x.relu() * x.sigmoid() * 0.5 / 6,
    "maximum": lambda x: torch.maximum(x, x.relu()),
    "dropout": lambda x: F.dropout(x.relu(), training=False),
    "zeros around": lambda x: F.pad(x.relu(), (1, 1, 1, 1)),
    "bilinear": lambda x: F.interpolate(x.relu(), scale_factor=2, mode="bilinear"),
    "square": lambda x: x.square(),
}
UNKNOWN: dict[str, Function] = {
    "input": lambda x: x.clone(),
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "hardswish": F.hardswish,
    "clamp from above": lambda x: x.clamp(max=6),
    "clamp below zero": lambda x: x.clamp(-1, 1),
    "clamp by a tensor": lambda x: x.clamp(torch.zeros(()) - 1),
    "hardtanh": F.hardtanh,
    "mixed concat": lambda x: torch.cat([x.relu(), x], 1),
    "mixed sum": lambda x: x.relu() + x,
    "difference": lambda x: x.relu() - x.sigmoid(),
    "minus by alpha": lambda x: torch.add(x.relu(), x.relu(), alpha=-1),
    "negative factor": lambda x: x.relu() * -1,
    "negative shift": lambda x: x.relu() + -0.5,
    "negative border": lambda x: F.pad(x.relu(), (1, 1), value=-1.0),
    "bicubic": lambda x: F.interpolate(x.relu(), scale_factor=2.0, mode="bicubic"),
    "alpha dropout": lambda x: F.alpha_dropout(x.relu(), training=False),
    "log": lambda x: (x.relu() + 1).log(),
    "overwritten": lambda x: x.relu().sub_(1),
}


def known(function: Function) -> list[bool]:
    seen = capture(Calls(function), torch.randn(2, 3, 8, 8))
    found = nonnegative_values(seen)
    return [value in found for value in seen.root.results]


@pytest.mark.parametrize("name", NONNEGATIVE)
def test_nonnegative(name: str) -> None:
    results = known(NONNEGATIVE[name])
    assert results
    assert all(results)
    outputs = NONNEGATIVE[name](torch.randn(2, 3, 8, 8))
    assert all(bool((part >= 0).all()) for part in outputs)


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown(name: str) -> None:
    results = known(UNKNOWN[name])
    assert results
    assert not any(results)


class Gain(nn.Module):
    """A factor that training may turn negative."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() * self.gain


MODULES = [
    (Gain(), False),
    (nn.ReLU(), True),
    (nn.ReLU6(), True),
    (nn.Hardtanh(0.0, 4.0), True),
    (nn.Hardtanh(), False),
    (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout()), True),
    (nn.Sequential(nn.ReLU(), nn.AlphaDropout()), False),
    (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), False),
    (nn.Sequential(nn.ReLU(), nn.ZeroPad2d(1)), True),
    (nn.Sequential(nn.ReLU(), nn.Upsample(scale_factor=2)), True),
    (nn.Sequential(nn.ReLU(), nn.Upsample(scale_factor=2, mode="bicubic")), False),
]


@pytest.mark.parametrize(("module", "expected"), MODULES)
def test_modules(module: nn.Module, expected: bool) -> None:
    seen = capture(module, torch.randn(2, 3, 8, 8))
    assert (seen.root.results[0] in nonnegative_values(seen)) is expected


def test_a_module_that_only_hands_through_in_eval_is_not_trusted() -> None:
    class ReLU(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - torch.rand_like(x) if self.training else x

    assert not nonnegative_values(capture(ReLU(), torch.randn(2, 3)))


class Net(nn.Module):
    """Two convolutions behind a ReLU, one behind none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv(3), conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(torch.relu(self.first(x))))


def signs(model: nn.Module, config: QuantConfig) -> dict[str, bool]:
    plan = qatkit.plan(model, X, config)
    return {q.path: q.spec.signed for q in plan.quantizers if q.role == "activation"}


def test_only_what_cannot_be_negative_becomes_unsigned() -> None:
    assert signs(Net(), UNSIGNED_4) == {
        "first.input_quantizer": True,
        "second.input_quantizer": False,
        "third.input_quantizer": True,
    }


def test_off_by_default() -> None:
    assert all(signs(Net(), QuantConfig(activation=QuantSpec(num_bits=4))).values())


def test_what_the_engine_does_not_take_stays_signed() -> None:
    config = QuantConfig(
        activation=QuantSpec(num_bits=4),
        unsigned_activations=True,
        rules=(Rule("second", num_bits=8),),
    )
    assert all(signs(Net(), config).values())


def test_a_spec_with_a_zero_point_stays_as_it_is() -> None:
    config = QuantConfig(
        backend="onnxruntime", activation=QuantSpec(symmetric=False), unsigned_activations=True
    )
    assert all(signs(Net(), config).values())


class Joined(nn.Module):
    """A concatenation, whose parts share a scale."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.stem, self.left, self.right = conv(3), conv(), conv()
        self.activation = activation
        self.out, self.other = conv(16), conv()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        left, right = torch.relu(self.left(x)), self.activation(self.right(x))
        return self.out(torch.cat([left, right], 1)) + self.other(left)


@pytest.mark.parametrize(("activation", "signed"), [(nn.ReLU(), False), (nn.LeakyReLU(), True)])
def test_a_shared_scale_has_one_sign(activation: nn.Module, signed: bool) -> None:
    model = Joined(activation)
    (group,) = qatkit.plan(model, X, UNSIGNED_4).groups
    found = signs(model, UNSIGNED_4)
    assert {found[path] for path in group} == {signed}
    assert prepared(Joined(activation), config=UNSIGNED_4)(X).shape == (2, 8, 12, 12)


def test_a_layer_called_twice_is_unsigned_only_if_both_inputs_are() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.second(self.second(torch.relu(x)))

    assert signs(Twice(), UNSIGNED_4)["second.input_quantizer"] is True


def test_the_codes_use_the_whole_unsigned_grid() -> None:
    model = prepared(Net(), config=UNSIGNED_4)
    quantizer = model.get_submodule("second.input_quantizer")
    assert isinstance(quantizer, qatkit.TensorQuantizer)
    codes = quantizer(torch.linspace(0, float(quantizer.amax), 97)) / quantizer.scale
    assert sorted(set(codes.round().int().tolist())) == list(range(16))
