"""Bit sensitivity and allocation: costs by hand, all allocations of small models, the rules."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch import nn

import qatkit
from qatkit.analysis.bit_sensitivity import LayerBits
from qatkit.analysis.parts import Part
from qatkit.config import WEIGHT
from qatkit.modes import quantizers
from tests.training.nets import Net, X

WIDTHS = (2, 3, 4, 8)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    net = qatkit.prepare(Net().eval(), X)
    qatkit.calibrate(net, [X], progress=False)
    return net


@pytest.fixture(scope="module")
def table(model: nn.Module) -> qatkit.BitSensitivity:
    return qatkit.bit_sensitivity(model, [X], WIDTHS, progress=False)


def layer(name: str, weights: int, macs: float, costs, input_bits: int = 8) -> LayerBits:
    path = f"{name}.weight_quantizer"
    return LayerBits(Part(name, "layer", (path,), (path,)), weights, macs, input_bits, costs)


def noise(model: nn.Module, on: set[str]) -> float:
    with torch.no_grad(), qatkit.disable_quantization(model):
        wanted = model(X).double()
        for path in on:
            model.get_submodule(path).quantize = True
        found = model(X).double()
    return float((found - wanted).square().sum() / wanted.square().sum())


def test_costs_and_sizes_by_hand(model: nn.Module, table: qatkit.BitSensitivity) -> None:
    assert [each.name for each in table.layers] == [
        "conv", "layer1.conv1", "layer1.conv2", "layer2.conv1", "layer2.conv2", "fc",
    ]  # fmt: skip
    assert [each.weights for each in table.layers] == [216, 576, 576, 576, 576, 80]
    assert [each.macs for each in table.layers] == [216 * 64, *[576 * 64] * 4, 80]
    assert {each.input_bits for each in table.layers} == {8}
    for each in table.layers:
        quantizer = model.get_submodule(f"{each.name}.weight_quantizer")
        spec = quantizer.spec
        for bits, cost in each.costs:
            quantizer.spec = spec.replace(num_bits=bits)
            assert cost == pytest.approx(noise(model, {f"{each.name}.weight_quantizer"}), rel=1e-4)
        quantizer.spec = spec
        assert each.costs[0][1] > each.costs[-1][1]


def test_with_activations(model: nn.Module) -> None:
    both = qatkit.bit_sensitivity(model, [X], (4,), activations=True, progress=False)
    paths = {"fc.weight_quantizer", "fc.input_quantizer"}
    saved = {path: model.get_submodule(path).spec for path in paths}
    for path, spec in saved.items():
        model.get_submodule(path).spec = spec.replace(num_bits=4)
    wanted = noise(model, paths)
    for path, spec in saved.items():
        model.get_submodule(path).spec = spec
    assert dict(both.layers[-1].costs)[4] == pytest.approx(wanted, rel=1e-4)
    found = qatkit.allocate_bits(both, bops=1e9)
    assert found.load == sum(each.macs * 16 for each in both.layers)
    fresh = qatkit.prepare(Net(), X, found.config())
    own = {path for each in both.layers for path in each.part.quantizers}
    assert {each.spec.num_bits for path, each in quantizers(fresh) if path in own} == {4}
    assert fresh.mean_quantizer.spec.num_bits == 8


def test_the_perturbation_of_a_loss(model: nn.Module) -> None:
    def minus_loss(model: nn.Module, batches: list[torch.Tensor]) -> float:
        return -float(model(batches[0]).square().mean())

    table = qatkit.bit_sensitivity(model, [X], (2,), metric=minus_loss, progress=False)
    assert table.metric == "minus_loss"
    with torch.no_grad(), qatkit.disable_quantization(model):
        before = model(X).square().mean().item()
        quantizer = model.fc.weight_quantizer
        spec = quantizer.spec
        quantizer.quantize, quantizer.spec = True, spec.replace(num_bits=2)
        after = model(X).square().mean().item()
        quantizer.spec = spec
    assert dict(table.layers[-1].costs)[2] == pytest.approx(after - before, rel=1e-3)


def loads(table: qatkit.BitSensitivity, kind: str, latency):
    for each in table.layers:
        for bits, _ in each.costs:
            if kind == "latency":
                yield (each.name, bits), latency[each.name][bits]
            elif kind == "bops":
                yield (each.name, bits), each.macs * bits * each.input_bits
            else:
                yield (each.name, bits), each.weights * bits


@pytest.mark.parametrize("kind", ["average_bits", "model_bits", "bops", "latency"])
@pytest.mark.parametrize("share", [0.3, 0.55, 0.9])
def test_the_least_cost_of_all_allocations(table, kind: str, share: float) -> None:
    latency = {each.name: {b: each.macs * (1 + b) ** 0.5 for b in WIDTHS} for each in table.layers}
    load = dict(loads(table, kind, latency))
    budget = share * sum(load[each.name, 8] for each in table.layers)
    cost = {(each.name, bits): value for each in table.layers for bits, value in each.costs}
    names = [each.name for each in table.layers]
    feasible = [
        sum(cost[pair] for pair in zip(names, widths, strict=True))
        for widths in itertools.product(WIDTHS, repeat=len(names))
        if sum(load[pair] for pair in zip(names, widths, strict=True)) <= budget * (1 + 1e-12)
    ]
    weights = sum(each.weights for each in table.layers)
    given = budget / weights if kind == "average_bits" else budget
    extra = {"latency_table": latency} if kind == "latency" else {}
    if not feasible:
        with pytest.raises(qatkit.QatkitError, match="least widths"):
            qatkit.allocate_bits(table, **{kind: given}, **extra)
        return
    found = qatkit.allocate_bits(table, **{kind: given}, **extra)
    assert found.cost == pytest.approx(min(feasible), rel=1e-9)
    assert found.load <= budget * (1 + 1e-9)
    assert found.optimal
    assert found.gap == 0
    if kind == "average_bits":
        assert found.average_bits <= given + 1e-9
        assert found.load == sum(each.bits * each.weights for each in found.layers)


def test_limits(table) -> None:
    found = qatkit.allocate_bits(
        table, average_bits=8, min_bits=3, max_bits=4, limits={"layer1": (2, 3)}
    )
    assert {found.bits[name] for name in ("layer1.conv1", "layer1.conv2")} == {3}
    assert {bits for name, bits in found.bits.items() if not name.startswith("layer1")} == {4}
    fixed = qatkit.allocate_bits(table, average_bits=4, limits={"conv": (8, 8), "fc": (8, 8)})
    assert (fixed.bits["conv"], fixed.bits["fc"]) == (8, 8)


def test_the_rules_give_a_fresh_model_these_widths(table) -> None:
    found = qatkit.allocate_bits(table, average_bits=4)
    assert len(set(found.bits.values())) > 1
    base = qatkit.QuantConfig(rules=(qatkit.Rule("fc", observer="minmax"),), first_last_bits=8)
    fresh = qatkit.prepare(Net(), X, found.config(base))
    for name, bits in found.bits.items():
        assert fresh.get_submodule(f"{name}.weight_quantizer").spec.num_bits == bits
        assert fresh.get_submodule(f"{name}.weight_quantizer").spec.axis == 0
        assert fresh.get_submodule(f"{name}.input_quantizer").spec.num_bits == 8
    assert fresh.fc.input_quantizer.spec.observer == "minmax"


def test_a_layer_that_is_not_measured_finite_is_left_out() -> None:
    costs = ((2, float("inf")), (4, 1.0), (8, 0.0))
    table = qatkit.BitSensitivity("noise", False, (layer("a", 10, 1.0, costs),))
    assert qatkit.allocate_bits(table, model_bits=40).bits == {"a": 4}
    with pytest.raises(qatkit.QatkitError, match="least widths of all layers take 40"):
        qatkit.allocate_bits(table, model_bits=39)


def test_tables_are_data(table) -> None:
    again = qatkit.BitSensitivity.from_dict(json.loads(json.dumps(table.to_dict())))
    assert again == table
    found = qatkit.allocate_bits(table, average_bits=4)
    plain = json.loads(json.dumps(found.to_dict()))
    assert {each["name"]: each["bits"] for each in plain["layers"]} == found.bits
    assert "optimal" in str(found)
    assert "layer1.conv1" in str(found)
    assert "layer1.conv1" in str(table)


def test_composite_and_recurrent_layers() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.rnn = nn.LSTM(8, 4, batch_first=True)

        def forward(self, x):
            return self.rnn(self.attention(x, x, x)[0])[0]

    x = torch.randn(2, 5, 8)
    net = qatkit.prepare(Mixed(), x)
    qatkit.calibrate(net, [x], progress=False)
    table = qatkit.bit_sensitivity(net, [x], (2, 8), progress=False)
    sizes = {each.name: each.weights for each in table.layers}
    assert sizes == {"attention": 4 * 64, "rnn": 16 * 8 + 16 * 4}
    macs = {each.name: each.macs for each in table.layers}
    assert macs["attention"] == 5 * 4 * 64 + 2 * 5 * 5 * 8
    assert macs["rnn"] == 5 * (16 * 8 + 16 * 4)
    found = qatkit.allocate_bits(table, average_bits=5)
    fresh = qatkit.prepare(Mixed(), x, found.config())
    assert fresh.attention.out_proj.weight_quantizer.spec.num_bits == found.bits["attention"]
    assert fresh.rnn.weight_ih_l0_quantizer.spec.num_bits == found.bits["rnn"]


ILLEGAL = [
    ({}, "none given"),
    ({"average_bits": 4, "bops": 1}, "average_bits, bops given"),
    ({"average_bits": -1}, "positive number"),
    ({"average_bits": 1.5}, "least widths of all layers take 2;"),
    ({"average_bits": 4, "min_bits": 9}, "was measured"),
    ({"average_bits": 4, "min_bits": 9, "max_bits": 8}, "min <= max"),
    ({"average_bits": 4, "limits": {"layer9": (2, 4)}}, "no layer 'layer9'"),
    ({"average_bits": 4, "limits": {"conv": 4}}, "two integers"),
    ({"latency": 1.0}, "go together"),
    ({"average_bits": 4, "latency_table": {}}, "go together"),
    ({"latency": 1.0, "latency_table": {}}, "no entry for the layer 'conv'"),
    ({"latency": 1.0, "latency_table": {"stem": {2: 1}}}, "no layer 'stem'"),
]


@pytest.mark.parametrize(("given", "message"), ILLEGAL)
def test_illegal_budgets(table, given, message: str) -> None:
    with pytest.raises(qatkit.QatkitError, match=message) as caught:
        qatkit.allocate_bits(table, **given)
    assert "\n" not in str(caught.value)


def test_illegal_measurements(model: nn.Module) -> None:
    with pytest.raises(qatkit.QatkitError, match="layers"):
        qatkit.allocate_bits({}, average_bits=4)
    with pytest.raises(qatkit.QatkitError, match="integer from 2 to 16"):
        qatkit.bit_sensitivity(model, [X], (1, 4), progress=False)
    with pytest.raises(qatkit.QatkitError, match="give widths"):
        qatkit.bit_sensitivity(model, [X], (), progress=False)
    with pytest.raises(qatkit.QatkitError, match="metric='sqnr'"):
        qatkit.bit_sensitivity(model, [X], metric="sqnr", progress=False)


LEARNED = {"observer": "lsq", "num_bits": 4}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        qatkit.QuantConfig(WEIGHT.replace(**LEARNED), qatkit.QuantSpec(**LEARNED)),
        qatkit.QuantConfig.preset("openvino-int8"),
    ],
    ids=["learned", "unsigned"],
)
def test_widths_and_ranges_are_as_before(config: qatkit.QuantConfig, frozen: bool) -> None:
    net = qatkit.prepare(Net(), X, config)
    qatkit.calibrate(net, [X], method="minmax", progress=False)
    net.train()
    net(X).sum().backward()
    if frozen:
        qatkit.freeze_ranges(net).apply()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    specs = [(path, each.spec, each.observe, each.quantize) for path, each in quantizers(net)]
    gradients = [None if each.grad is None else each.grad.clone() for each in net.parameters()]

    def fail(model: nn.Module, batches: object) -> float:
        if model.fc.weight_quantizer.spec.num_bits == 3:
            raise KeyError("stop")
        return 0.0

    table = qatkit.bit_sensitivity(net, [X], WIDTHS, activations=True, progress=False)
    assert all(each.costs[0][1] > each.costs[-1][1] for each in table.layers)
    with pytest.raises(KeyError):
        qatkit.bit_sensitivity(net, [X], WIDTHS, metric=fail, activations=True, progress=False)
    after = net.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    now = [(path, each.spec, each.observe, each.quantize) for path, each in quantizers(net)]
    assert now == specs
    assert all(module.training for module in net.modules())
    for old, parameter in zip(gradients, net.parameters(), strict=True):
        assert old is None or torch.equal(old, parameter.grad)
