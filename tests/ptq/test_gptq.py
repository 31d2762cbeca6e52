"""GPTQ: the codes against a plain NumPy version, what stays as it is, and illegal input."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

import qatkit
from qatkit import QatkitError, QuantConfig, QuantSpec
from qatkit.config import WEIGHT
from qatkit.nn.weights import weights_of
from qatkit.ptq import gptq


def codes_of(layer: nn.Module) -> np.ndarray:
    quantizer = layer.weight_quantizer
    fold = layer.weight_fold_scale()
    raw = layer.weight if fold is None else layer.weight * fold
    shape = [-1, *[1] * (raw.dim() - 1)]
    scale = quantizer.scale.expand(raw.shape[0]).reshape(shape)
    return torch.round(quantizer(raw) / scale).detach().numpy().astype(int)


def reference(
    w: np.ndarray, scale: np.ndarray, x_KN: np.ndarray, low: int, high: int
) -> np.ndarray:
    """The algorithm for one matrix (O, K), as in the paper, in float64."""
    h = x_KN @ x_KN.T
    h += np.eye(len(h)) * 0.01 * np.diag(h).mean()
    order = np.argsort(-np.diag(x_KN @ x_KN.T), kind="stable")
    w, inverse = w[:, order].copy(), np.linalg.inv(h[order][:, order])
    q = np.zeros_like(w)
    for j in range(w.shape[1]):
        q[:, j] = np.clip(np.rint(w[:, j] / scale), low, high)
        error = (w[:, j] - q[:, j] * scale) / inverse[j, j]
        w -= np.outer(error, inverse[j])  # the whole row: what is behind j is not read again
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    result = np.zeros_like(q)
    result[:, order] = q
    return result.astype(int)


def prepared(model: nn.Module, x: torch.Tensor, bits: int = 3, **weight) -> nn.Module:
    config = QuantConfig(weight=WEIGHT.replace(num_bits=bits, **weight), activation=QuantSpec())
    qatkit.prepare(model, x, config)
    qatkit.calibrate(model, [x], progress=False)
    return model.eval()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("observer", ["minmax", "lsq"])
def test_linear_codes_equal_the_reference(observer: str) -> None:
    x = torch.randn(200, 12) @ torch.randn(12, 12)
    model = prepared(nn.Sequential(nn.Linear(12, 5)), x, observer=observer)
    layer, before = model[0], model[0].weight.detach().double().numpy().copy()
    scale = layer.weight_quantizer.grid_for(layer.weight)[0].double().numpy()
    seen = layer.quantized_input(x).double().numpy().T
    report = gptq(model, [x])
    nearest = np.clip(np.rint(before / scale[:, None]), -3, 3).astype(int)
    chosen = reference(before, scale, seen, -3, 3)
    errors = [
        np.square((before - codes * scale[:, None]) @ seen).sum(1) for codes in (nearest, chosen)
    ]
    wanted = np.where((errors[1] <= errors[0])[:, None], chosen, nearest)
    assert np.array_equal(codes_of(layer), wanted)
    assert (wanted == chosen).all(1).any()
    assert layer.weight_quantizer.scale.double().numpy() == pytest.approx(scale, rel=1e-6)
    assert report.changes[0].path == "0"
    assert report.changes[0].after < report.changes[0].before


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.Conv2d(4, 4, 3, groups=4, dilation=2, padding="same"),
        nn.Conv2d(4, 6, (1, 3), padding=(0, 1), padding_mode="circular"),
    ],
    ids=str,
)
def test_the_errors_are_those_of_the_output(convolution: nn.Conv2d) -> None:
    x = torch.randn(16, 4, 8, 8).cumsum(3)  # fewer than 64 places are all used
    model = prepared(nn.Sequential(copy.deepcopy(convolution)), x)
    layer = model[0]
    seen, weight = layer.quantized_input(x), layer.weight.detach().clone()
    zero = torch.zeros_like(weight)
    wanted = layer._conv_forward(seen, weight, None) - layer._conv_forward(seen, zero, None)
    report = gptq(model, [x[:8], x[8:]])
    found = layer._conv_forward(seen, layer.quantized_weight().detach(), None)
    error = float((found - wanted).norm() / wanted.norm())
    assert report.changes[0].after == pytest.approx(error, rel=1e-3)
    assert report.changes[0].after <= report.changes[0].before


def test_conv1d_and_a_folded_batch_norm() -> None:
    model = nn.Sequential(nn.Conv1d(4, 8, 3, bias=False), nn.BatchNorm1d(8), nn.ReLU())
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -2.0, 0.0, 0.5, -0.1, 3.0, 1.0, 1.0]))
        model[1].running_var.uniform_(0.1, 4.0)
    x = torch.randn(32, 4, 10).cumsum(2)
    model = prepared(model, x, narrow_range=False)  # so that the fold does not cancel
    report = gptq(model, [x])
    assert report.changes[0].after < report.changes[0].before
    assert np.abs(codes_of(model[0])).max() <= 4


def test_later_layers_read_what_rounded_ones_give_and_weights_stay_in_their_cells() -> None:
    x = torch.randn(64, 8)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    model = prepared(net, x, bits=2, observer="lsq")
    float_weights = [model[0].weight.clone(), model[2].weight.clone()]
    rounded = [codes_of(model[0]), codes_of(model[2])]
    report = gptq(model, [x])
    assert [each.path for each in report.changes] == ["0", "2"]
    assert "gptq: 2 entries" in str(report)
    for layer, old, codes in zip((model[0], model[2]), float_weights, rounded, strict=True):
        same = torch.from_numpy(codes_of(layer) == codes)
        assert torch.equal(layer.weight[same], old[same])
        assert 0 < (~same).sum() < same.numel()
    again = [codes_of(model[0]), codes_of(model[2])]
    gptq(model, [x], bits_below=2)
    assert all(
        np.array_equal(a, codes_of(b)) for a, b in zip(again, (model[0], model[2]), strict=True)
    )


def test_what_does_not_take_part() -> None:
    x = torch.randn(4, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Conv2d(4, 2, 3))
    config = QuantConfig(weight=WEIGHT.replace(num_bits=4), rules=(qatkit.Rule("0", num_bits=8),))
    qatkit.prepare(net, x, config)
    qatkit.calibrate(net, [x], progress=False)
    before = [weight.seen.clone() for weight in weights_of(net)]
    net.train()
    report = gptq(net, [(x, torch.zeros(4))])
    assert [each.path for each in report.changes] == ["2"]
    assert net.training
    same = [torch.equal(a, b.seen) for a, b in zip(before, weights_of(net), strict=True)]
    assert same == [True, True, False]


def test_dead_inputs_and_constant_weights() -> None:
    x = torch.randn(16, 6)
    x[:, 2] = 0
    net = nn.Sequential(nn.Linear(6, 3))
    with torch.no_grad():
        net[0].weight[1] = 0
    model = prepared(net, x)
    gptq(model, [x])
    assert torch.isfinite(model[0].weight).all()
    assert not codes_of(model[0])[1].any()
    assert gptq(prepared(nn.Sequential(nn.Linear(6, 3)), x * 0 + 1), [x * 0]).changes[0].after == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, x: gptq(nn.Linear(2, 2), [x]), "qatkit.prepare"),
        (lambda model, x: gptq(model, []), "has no batches"),
        (lambda model, x: gptq(model, [x], damping=0.0), "damping=0.0): give a positive share"),
    ],
)
def test_illegal(call, message: str) -> None:
    x = torch.randn(4, 6)
    with pytest.raises(QatkitError, match=re.escape(message)):
        call(prepared(nn.Sequential(nn.Linear(6, 3)), x), x)


def test_data_that_are_not_finite_change_nothing() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    net = qatkit.prepare(net, x, QuantConfig(weight=WEIGHT.replace(num_bits=4)))
    qatkit.calibrate(net, [x], progress=False)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(QatkitError, match="0 reads NaN or infinity; give finite data"):
        gptq(net, [x, x * float("nan")])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
