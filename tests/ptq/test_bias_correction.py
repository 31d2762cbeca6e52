"""`correct_bias`: channel means as in the float model, measured or computed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import qatkit
from qatkit import QatkitError, QuantConfig, QuantSpec
from qatkit.config import WEIGHT
from qatkit.ptq import correct_bias
from qatkit.ptq.absorb import mean_behind_relu

LOW = QuantConfig(
    weight=WEIGHT.replace(num_bits=3), activation=QuantSpec(num_bits=4, observer="minmax")
)


def means(net: nn.Module, path: str, data: list[Tensor], axes: tuple[int, ...]) -> Tensor:
    """Return the channel means of a module's output over all data, in float64."""
    found: list[Tensor] = []
    handle = net.get_submodule(path).register_forward_hook(lambda _, __, y: found.append(y))
    with torch.no_grad():
        for x in data:
            net(x)
    handle.remove()
    total = sum(y.double().sum(axes) for y in found)
    return total / sum(y.numel() // y.shape[1 if len(axes) > 1 else -1] for y in found)


@pytest.mark.parametrize("net", ["residual"], indirect=True)
def test_the_means_are_those_of_the_float_model(net: nn.Module, images: list[Tensor]) -> None:
    exact = copy.deepcopy(net)
    qatkit.prepare(net, images[0], LOW)
    qatkit.calibrate(net, images, progress=False)
    before = means(net, "layers.2.bn2", images, (0, 2, 3))
    report = correct_bias(net, images, progress=False)
    assert len(report.changes) == 8
    assert all(change.after < 1e-4 < change.before for change in report.changes[1:])
    for path in ("bn", "layers.0.bn1", "layers.2.bn2"):
        wanted = means(exact, path, images, (0, 2, 3))
        torch.testing.assert_close(means(net, path, images, (0, 2, 3)), wanted, atol=1e-5, rtol=0)
    assert (before - wanted).abs().max() > 1e-3
    torch.testing.assert_close(
        means(net, "head", images, (0,)), means(exact, "head", images, (0,)), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("net", ["mobile", "transformer"], indirect=True)
def test_other_networks_and_a_reference(net: nn.Module, images: list[Tensor]) -> None:
    exact = copy.deepcopy(net)
    qatkit.prepare(net, images[0], LOW)
    qatkit.calibrate(net, images, progress=False)
    with torch.no_grad():
        next(m for m in net.modules() if type(m).__name__ == "QuantLinear").bias.add_(1.0)
    report = correct_bias(net, images, reference=exact, progress=False)
    assert any(change.before > 0.5 for change in report.changes)
    assert all(change.after < 1e-4 for change in report.changes if not change.note)


def test_places_of_the_bias() -> None:
    data = [torch.randn(64, 4).abs()]
    net = nn.Sequential(
        *(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, affine=False), nn.ReLU()),
        *(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3)),
    ).eval()
    qatkit.prepare(net, data[0], LOW)
    qatkit.calibrate(net, data, progress=False)
    keys = set(net.state_dict())
    notes = {change.path: change for change in correct_bias(net, data, progress=False).changes}
    assert notes["0"].after < 1e-5 < notes["0"].before  # the running mean takes it
    assert notes["3"].note == "left: no bias"
    assert notes["3"].after == notes["3"].before
    assert notes["5"].after < 1e-5
    assert set(net.state_dict()) == keys


def test_analytic_agrees_with_a_large_sample() -> None:
    torch.manual_seed(0)
    x = torch.randn(20_000, 6) @ torch.randn(6, 6)
    net = nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 4)).eval()
    with torch.no_grad():  # statistics of this very sample, which is normal
        y = net[0](x)
        net[1].running_mean.copy_(y.mean(0))
        net[1].running_var.copy_(y.var(0))
        nn.init.uniform_(net[1].weight, 0.5, 2.0)
        nn.init.normal_(net[1].bias)
    config = QuantConfig(weight=WEIGHT.replace(num_bits=2))
    qatkit.prepare(net, x, config)
    qatkit.calibrate(net, [x], method="max", progress=False)
    last = net[3]
    with torch.no_grad():
        hidden = net[:3](x)  # with the rounding of the first layer
        error = (hidden @ (last.quantized_weight() - last.weight).T).mean(0)
    bias = last.bias.detach().clone()
    report = correct_bias(net, [x[:8]], method="analytic", progress=False)
    assert report.changes[0].path == "3"
    torch.testing.assert_close(bias - last.bias.detach(), error, rtol=0.15, atol=0.03)


def test_the_mean_behind_a_relu() -> None:
    mean, deviation = torch.tensor([0.5, -1.0, 2.0, 1.0, -1.0]), torch.tensor([1.0, 2, 0.5, 0, 0])
    x = mean + deviation * torch.randn(400_000, 5)
    torch.testing.assert_close(
        mean_behind_relu(mean, deviation), x.relu().mean(0), atol=5e-3, rtol=0
    )


def test_illegal_and_restored() -> None:
    x = torch.randn(8, 4)
    net = qatkit.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), x)
    qatkit.calibrate(net, [x], progress=False)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(QatkitError, match="did you mean 'empirical'"):
        correct_bias(net, [x], method="empiric")
    with pytest.raises(QatkitError, match="does not run on batch 1"):
        correct_bias(net, [x, torch.zeros(1, 7)], progress=False)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    calls = [0]

    def fail(*_: object) -> None:
        calls[0] += 1
        if calls[0] == 5:
            raise RuntimeError("boom")

    net[2].register_forward_pre_hook(fail)
    with pytest.raises(QatkitError, match="boom"):
        correct_bias(net, [x, x], progress=False)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
