"""`fit_weight_ranges`: the least squared error, frozen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qatkit
from qatkit import QatkitError, QuantConfig
from qatkit.config import WEIGHT
from qatkit.ptq import fit_weight_ranges


@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_about_as_good_as_a_fine_search(axis: int | None, bits: int) -> None:
    x = torch.randn(4, 400)
    net = nn.Sequential(nn.Linear(400, 6))
    qatkit.prepare(net, x, QuantConfig(weight=WEIGHT.replace(num_bits=bits, axis=axis)))
    weight, quantizer = net[0].weight.detach(), net[0].weight_quantizer
    report = fit_weight_ranges(net)

    def error() -> Tensor:
        wrong = (quantizer(weight) - weight).square()
        return wrong.sum(1) if axis == 0 else wrong.sum()

    found, (low, high) = error(), quantizer.range
    top = weight.abs().amax(1) if axis == 0 else weight.abs().amax()
    best = torch.full_like(found, torch.inf)
    for factor in torch.linspace(0.2, 1.0, 400):
        quantizer.set_range(-top * factor, top * factor)
        best = torch.minimum(best, error())
    assert (found <= best * 1.1).all()
    quantizer.set_range(low, high)
    assert report.changes[0].after == pytest.approx(float(found.sum() / weight.square().sum()))
    assert report.changes[0].after <= report.changes[0].before
    with torch.no_grad():
        net[0].weight.mul_(3)
    net.train()(x)
    assert torch.equal(quantizer.range[1], high)


def test_bits_below_and_errors() -> None:
    x = torch.randn(4, 8)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    config = QuantConfig(weight=WEIGHT.replace(num_bits=4), first_last_bits=8)
    qatkit.prepare(net, x, config)
    report = fit_weight_ranges(net, bits_below=8)
    assert [change.path for change in report.changes] == ["2.weight_quantizer"]
    assert net[0].weight_quantizer.observe == "training"
    with pytest.raises(QatkitError, match="has no quantizers"):
        fit_weight_ranges(nn.Linear(2, 2))
