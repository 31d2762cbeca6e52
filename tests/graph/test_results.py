"""F20 and F11: placements for engines that fuse a layer only with a quantizer behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qatkit
from qatkit import QuantConfig, Rule
from tests.graph.blocks import X, conv, conv_bn, prepared, quantizer_paths, skipped

ORT, OPENVINO = "onnxruntime-uint8", "openvino-int8"


class Act(nn.Module):
    """An activation between two convolutions, in place where it can be."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, bias=False), nn.BatchNorm2d(8), activation)
        self.out = conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x))


def reasons(model: nn.Module, config: Any, start: str = "") -> dict[str, str]:
    plan = qatkit.plan(model, X, config)
    return {q.path: q.reason for q in plan.quantizers if q.reason.startswith(start)}


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(0.0, 1.0)])
def test_no_quantizer_in_front_of_an_activation_that_it_makes_superfluous(
    activation: nn.Module,
) -> None:
    assert not reasons(Act(activation), ORT, "F20")
    assert qatkit.plan(Act(activation), X, ORT).quantizers[-2].spec.signed is False


@pytest.mark.parametrize(
    "activation",
    [nn.Hardswish(inplace=True), nn.SiLU(), nn.LeakyReLU(0.1), nn.GELU(), nn.PReLU(), nn.Mish()],
)
def test_a_quantizer_in_front_of_every_other_activation(activation: nn.Module) -> None:
    assert reasons(Act(activation), ORT, "F20") == {"body.2.input_quantizer": "F20: result of Conv"}
    assert not reasons(Act(activation), OPENVINO, "F20")  # fuses
    assert not reasons(Act(activation), None, "F20")
    model = prepared(Act(activation), config=ORT)
    assert len(list(model.body.children())) == 3  # type: ignore[union-attr]


def test_a_function_in_place_behind_the_quantizer_trains() -> None:
    class Net(Act):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.hardswish(self.body(x), inplace=True))

    model = prepared(Net(nn.Identity()), config=ORT)
    assert "hardswish_quantizer" in quantizer_paths(model)


@pytest.mark.parametrize("activation", [nn.Hardswish(inplace=True), nn.LeakyReLU(inplace=True)])
def test_an_activation_in_place_whose_result_is_not_taken_stays_float(
    activation: nn.Module,
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act, self.out = conv(3), activation, conv()

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            self.act(y)
            return self.out(y)

    plan = qatkit.plan(Net(), X, ORT)
    assert not any(q.reason.startswith("F20") for q in plan.quantizers)
    assert "cannot be rewritten" in skipped(plan)["act_quantizer"]
    prepared(Net(), config=ORT)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.down = conv_bn(3), conv_bn(), conv_bn(), conv_bn(size=1)
        self.out = conv()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.b(torch.relu(self.a(x)))
        y += self.down(x)
        return self.out(torch.relu(y))


@pytest.mark.parametrize("preset", [ORT, OPENVINO])
def test_both_operands_of_a_residual_add(preset: str) -> None:
    paths = quantizer_paths(prepared(Residual(), config=preset))
    assert paths == {
        *(f"{name}.0.input_quantizer" for name in ("stem", "a", "b")),
        "add_quantizer",  # the skip input, as for TensorRT
        "add_input_0_quantizer",
        "out.input_quantizer",
    }


@pytest.mark.parametrize("preset", [ORT, OPENVINO])
def test_the_quantizers_of_tensorrt_are_among_those_of_the_others(preset: str) -> None:
    trained, other = prepared(Residual()), prepared(Residual(), config=preset)
    assert set(trained.state_dict()) <= set(other.state_dict())
    result = other.load_state_dict(trained.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all("add_input_0_quantizer" in key for key in result.missing_keys)


class Gate(nn.Module):
    """A squeeze-excite block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = conv_bn(3), conv()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        gate = F.hardsigmoid(self.up(torch.relu(self.down(self.pool(x)))))
        return self.out(gate * x)


def test_both_factors_of_a_gate() -> None:
    found = reasons(Gate(), ORT)
    assert "F20: result of Conv" in found["hardswish_quantizer"]
    assert "F20: result of Conv" in found["hardsigmoid_quantizer"]
    assert "F11" in found["mul_input_0_quantizer"]
    assert "F11" in found["pool.input_quantizer"]  # pool and product share it
    prepared(Gate(), config=ORT)
    prepared(Gate(), config=OPENVINO)


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3), nn.ReLU())
        self.a, self.b, self.c = conv_bn(), conv_bn(), conv_bn(16)
        self.pool, self.d = nn.MaxPool2d(3, 1, 1), conv_bn(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([torch.relu(self.a(x)), torch.relu(self.b(x))], 1)
        return self.c(x) + self.d(self.pool(x))


def test_concat_and_max_pool_are_read_and_written_in_integers() -> None:
    found = reasons(Inception(), ORT)
    assert found["cat_input_0_quantizer"] == found["cat_input_1_quantizer"] == "F20: result of Conv"
    assert found["c.0.input_quantizer"] == "F1: input of Conv; F20: result of Concat"
    (group,) = qatkit.plan(Inception(), X, ORT).groups
    assert len(group) == 4
    prepared(Inception(), config=ORT)


def test_a_max_pool_in_front_of_quantizers_needs_none() -> None:
    class Net(Act):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.max_pool2d(self.body(x), 2))

    assert not reasons(Net(nn.ReLU()), ORT, "F20")


class Dense(nn.ModuleDict):
    """Walks over its children, among which a quantizer must not be."""

    def __init__(self) -> None:
        super().__init__({"a": conv(8), "b": conv(16)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.values():
            x = torch.cat([x, layer(x)], 1)
        return x


class Tail(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dense, self.out = conv(3), Dense(), conv(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.dense(torch.relu(self.stem(x)))))


def test_a_container_that_walks_over_its_children() -> None:
    model = prepared(Tail(), config=ORT)
    assert any(path.startswith("dense.cat") for path in quantizer_paths(model))


def test_a_module_in_a_sequential_keeps_its_neighbours() -> None:
    net = nn.Sequential(conv(3), nn.PReLU(), conv())
    model = prepared(net, config=ORT)
    assert [type(child).__name__ for child in model.children()][1] == "PReLU"
    assert "1.input_quantizer" in quantizer_paths(model)


def test_an_activation_used_twice_has_two_quantizers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.act = conv(3), conv(), conv(), nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.act(self.b(self.act(self.a(x)))))

    paths = quantizer_paths(prepared(Net(), config=ORT))
    assert {"act_quantizer", "act_1_quantizer"} <= paths


def test_a_result_that_leaves_the_model_stays_float() -> None:
    class Net(Act):
        def forward(self, x: Tensor) -> Any:
            y = self.body(x)
            return y, self.out(F.silu(y))

    assert not reasons(Net(nn.Identity()), ORT, "F20")


def test_in_front_of_a_layer_that_stays_float_there_is_no_quantizer() -> None:
    config = QuantConfig(backend="onnxruntime", rules=(Rule("out", enabled=False),))
    assert not reasons(Act(nn.ReLU()), config, "F20")


def test_a_rule_disables_it() -> None:
    config = QuantConfig(backend="onnxruntime", rules=(Rule("body.2", enabled=False),))
    assert not reasons(Act(nn.SiLU()), config, "F20")


def test_transposed_convolutions_stay_float_where_there_is_no_kernel() -> None:
    net = nn.Sequential(conv(3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, 2))
    assert skipped(qatkit.plan(net, X, ORT)) == {"2": "onnxruntime has no INT8 ConvTranspose"}
    assert "2" not in skipped(qatkit.plan(net, X, OPENVINO))


@pytest.mark.parametrize("net", [Residual, Gate, Inception, Tail])
def test_tensorrt_is_placed_as_before(net: type[nn.Module]) -> None:
    plan = qatkit.plan(net(), X)
    assert all(q.spec.signed for q in plan.quantizers)
    assert not any(q.reason.startswith(("F20", "F11: operand")) for q in plan.quantizers)
