"""`tune`: the true minimum of the distance, and the largest threshold of several readers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qatkit
from qatkit import QatkitError, QuantConfig, QuantSpec, Rule
from qatkit.ptq import tune

HEAVY = QuantConfig(activation=QuantSpec(num_bits=4, observer="minmax"))


def heavy(*shape: int) -> Tensor:
    return torch.randn(*shape).pow(3)


def distance(found: Tensor, wanted: Tensor, metric: str) -> float:
    a, b = found.double(), wanted.double()
    if metric == "euclidean":
        return float((a - b).square().sum().sqrt())
    if metric == "sqnr":
        return float((a - b).square().sum() / b.square().sum())
    return 1 - float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "sqnr"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_threshold_beside_it_is_better(metric: str, symmetric: bool) -> None:
    data = [heavy(64, 16), heavy(64, 16)]
    backend = "tensorrt" if symmetric else "onnxruntime"
    spec = QuantSpec(num_bits=4, observer="minmax", symmetric=symmetric)
    exact = nn.Linear(16, 8)
    net = nn.Sequential(copy.deepcopy(exact))
    qatkit.prepare(net, data[0], QuantConfig(activation=spec, backend=backend))
    report = tune(net, data, metric, candidates=12, progress=False)
    quantizer = net[0].input_quantizer

    def total() -> float:
        with torch.no_grad():
            return sum(distance(net.eval()(x), exact(x), metric) for x in data) / len(data)

    found = total()
    assert report.changes[0].after == pytest.approx(found, rel=1e-4)
    low, high = quantizer.range
    top = max(float(x.abs().max()) for x in data)
    for factor in torch.linspace(0.1, 1.0, 12):  # no coarse search finds much better
        quantizer.set_range(-top * factor, top * factor)
        assert total() > 0.93 * found
    quantizer.set_range(low, high)
    qatkit.calibrate(net, data, progress=False)
    assert total() > found


def test_it_is_never_worse_than_the_range_there_was() -> None:
    data = [heavy(64, 16)]
    net = qatkit.prepare(nn.Sequential(nn.Linear(16, 8)), data[0], HEAVY)
    net[0].input_quantizer.set_range(-2.5, 2.5)
    first = tune(net, data, progress=False).changes[0]
    assert first.after <= first.before
    again = tune(net, data, progress=False).changes[0]
    assert again.before == pytest.approx(first.after)
    assert again.after <= again.before


class Readers(nn.Module):
    """Two layers read one tensor: one all of it, the other only what is small."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
        with torch.no_grad():
            self.narrow.weight[:, 0] = 0
            self.wide.weight[:, 1:] *= 0.01

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return self.wide(x) + self.narrow(x)


def test_several_readers_keep_the_largest() -> None:
    x = torch.rand(256, 8)
    x[:, 0] *= 8
    thresholds = {}
    for pattern in ("wide", "narrow", None):
        rules = () if pattern is None else (Rule(pattern, enabled=False),)
        config = QuantConfig(activation=HEAVY.activation, rules=rules)
        net = qatkit.prepare(Readers(), x, config)
        report = tune(net, [x], progress=False)
        (quantizer,) = {
            m for m in net.modules() if getattr(m, "name", "").endswith("input_quantizer")
        }
        thresholds[pattern] = float(quantizer.range[1])
        change = next(c for c in report.changes if "input" in c.path)
        assert change.note == ("2 readers" if pattern is None else "")
    assert thresholds["wide"] < thresholds["narrow"]  # named: the one that is left out
    assert thresholds[None] == thresholds["narrow"]


@pytest.mark.parametrize("net", ["residual", "mobile", "transformer"], indirect=True)
def test_networks(net: nn.Module, images: list[Tensor]) -> None:
    qatkit.prepare(net, images[0], HEAVY)
    net.train()
    report = tune(net, images, candidates=4, progress=False)
    assert net.training
    quantizers = {m.name: m for m in net.modules() if isinstance(m, qatkit.TensorQuantizer)}
    paths = [change.path for change in report.changes]
    assert set(paths) == {name for name in quantizers if "weight" not in name}
    assert all(quantizers[path].has_range for path in paths)
    assert len(str(report).splitlines()) == 3 + len(paths)


def test_zeros_fixed_ranges_and_errors() -> None:
    x = torch.zeros(8, 4)
    fixed = QuantSpec(observer="fixed", fixed_range=(-1.0, 1.0))
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    qatkit.prepare(net, x, QuantConfig(rules=(Rule("1", activation=fixed),)))
    report = tune(net, [x], progress=False)
    assert [change.path for change in report.changes] == ["0.input_quantizer"]
    assert report.changes[0].note == "left: saw nothing but zeros"
    with pytest.raises(QatkitError, match="did you mean 'euclidean'"):
        tune(net, [x], "euclid")
    with pytest.raises(QatkitError, match="candidates=1"):
        tune(net, [x], candidates=1)
    with pytest.raises(QatkitError, match="does not run on batch 1"):
        tune(net, [x, torch.zeros(2, 3)], progress=False)
    assert not net[0].input_quantizer.calibrated
