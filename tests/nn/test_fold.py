"""The weight quantizer sees the folded weight: the oracle folds in float64 and convolves once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import qatkit.nn as qnn
from qatkit.config import WEIGHT
from qatkit.nn.quantized import QuantizedWeight
from qatkit.spec import QuantSpec

GAMMAS = {
    "positive": [0.5, 1.0, 2.0, 0.1, 3.0, 0.7],
    "negative": [-0.5, 1.0, -2.0, 0.1, -3.0, 0.7],
    "zero": [0.0, 1.0, -2.0, 0.0, 3.0, 0.7],
    "tiny": [1e-30, 1.0, -1e-30, 0.1, 3.0, 0.7],
}
SPECS = {
    "per channel": WEIGHT,
    "per tensor": WEIGHT.replace(axis=None),
    "power of two": WEIGHT.replace(power_of_two=True),
    "wide": WEIGHT.replace(narrow_range=False),
    "asymmetric": WEIGHT.replace(symmetric=False, narrow_range=False),
    "4 bit": WEIGHT.replace(num_bits=4),
    "shrink": WEIGHT.replace(observer="shrink", percentile=2.0, axis=None),
}
LAYERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "conv1d": (qnn.QuantConv1d, nn.BatchNorm1d, {}),
    "conv2d": (qnn.QuantConv2d, nn.BatchNorm2d, {}),
    "conv2d groups": (qnn.QuantConv2d, nn.BatchNorm2d, {"groups": 2}),
    "conv3d": (qnn.QuantConv3d, nn.BatchNorm3d, {}),
    "transposed1d": (qnn.QuantConvTranspose1d, nn.BatchNorm1d, {}),
    "transposed2d": (qnn.QuantConvTranspose2d, nn.BatchNorm2d, {"stride": 2}),
    "transposed2d groups": (qnn.QuantConvTranspose2d, nn.BatchNorm2d, {"groups": 2}),
    "transposed3d": (qnn.QuantConvTranspose3d, nn.BatchNorm3d, {"groups": 2}),
    "linear": (qnn.QuantLinear, nn.BatchNorm1d, {}),
}
FUNCTIONS: dict[str, Any] = {
    "QuantConv1d": F.conv1d,
    "QuantConv2d": F.conv2d,
    "QuantConv3d": F.conv3d,
    "QuantConvTranspose1d": F.conv_transpose1d,
    "QuantConvTranspose2d": F.conv_transpose2d,
    "QuantConvTranspose3d": F.conv_transpose3d,
}


def build(kind: str, gamma: str, spec: QuantSpec, *, bias: bool = False) -> nn.Sequential:
    layer_class, norm_class, options = LAYERS[kind]
    size = () if kind == "linear" else (3,)
    layer = layer_class(4, 6, *size, bias=bias, **options)
    norm = norm_class(6)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(GAMMAS[gamma]))
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.2, 4.0)
    layer.attach_weight(spec)
    layer.fold(norm)
    layer.input_quantizer.quantize = False
    return nn.Sequential(layer, norm).eval()


def inputs(kind: str) -> Tensor:
    if kind == "linear":
        return torch.randn(3, 4)
    dimensions = next(int(c) for c in kind if c.isdigit())
    return torch.randn(3, 4, *(7,) * dimensions)


def factor(norm: Any) -> Tensor:
    """Return gamma / sqrt(var + eps), (C,) float64."""
    return norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()


def spread(layer: Any, vector: Tensor) -> Tensor:
    """Return (C_out,) as it multiplies the weight, written out index by index."""
    scale = torch.zeros_like(layer.weight, dtype=torch.float64)
    groups = getattr(layer, "groups", 1)
    outputs = len(vector) // groups
    for i in range(scale.shape[0]):
        if "Transpose" in type(layer).__name__:
            group = i // (scale.shape[0] // groups)
            for o in range(outputs):
                scale[i, o] = vector[group * outputs + o]
        else:
            scale[i] = vector[i]
    return scale


def quantized(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Return minmax-quantized float64 weights."""
    w = weight if spec.axis is None else weight.movedim(spec.axis, 0).flatten(1)
    low, high = (w.min(), w.max()) if spec.axis is None else (w.amin(1), w.amax(1))
    zero_point = torch.zeros(())
    if spec.symmetric:
        amax = torch.maximum(low.abs(), high.abs())
        scale = amax / spec.quant_max
        if spec.power_of_two:
            scale = 2 ** amax.log2().ceil() / 2 ** (spec.num_bits - 1)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / (spec.quant_max - spec.quant_min)
    scale = torch.where(scale > 0, scale, 1.0)
    if not spec.symmetric:
        zero_point = (spec.quant_min - low / scale).round()
    if spec.axis is not None:
        shape = [-1 if d == spec.axis else 1 for d in range(weight.dim())]
        scale, zero_point = scale.reshape(shape), zero_point.expand(len(low)).reshape(shape)
    codes = ((weight / scale).round() + zero_point).clamp(spec.quant_min, spec.quant_max)
    return (codes - zero_point) * scale


def convolve(layer: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    options = {"stride": layer.stride, "groups": layer.groups}
    return FUNCTIONS[type(layer).__name__](x, weight, bias, **options)


def close(ours: Tensor, theirs: Tensor) -> None:
    """Compare channel by channel, so that a small channel cannot hide behind a large one."""
    for channel in range(ours.shape[1]):
        a, b = ours[:, channel].double(), theirs[:, channel]
        assert (a - b).abs().max() <= 2e-5 * b.abs().max().clamp(min=1e-3), channel


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("kind", LAYERS)
def test_eval_is_the_folded_quantized_layer(kind: str, gamma: str) -> None:
    spec = WEIGHT.replace(axis=LAYERS[kind][0].default_axis)
    net, x = build(kind, gamma, spec, bias=True), inputs(kind)
    layer, norm = net
    s = factor(norm)
    bias = norm.bias.double() + (layer.bias.double() - norm.running_mean.double()) * s
    weight = quantized(layer.weight.detach().double() * spread(layer, s), spec)
    close(net(x).detach(), convolve(layer, x.double(), weight, bias).detach())


@pytest.mark.parametrize("gamma", ["positive", "negative", "zero"])
@pytest.mark.parametrize("name", [name for name in SPECS if name != "shrink"])
@pytest.mark.parametrize("kind", ["conv2d", "transposed2d", "linear"])
def test_every_kind_of_grid(kind: str, name: str, gamma: str) -> None:
    spec = SPECS[name]
    if kind == "transposed2d" and spec.axis is not None:
        spec = spec.replace(axis=1)
    net, x = build(kind, gamma, spec), inputs(kind)
    layer, norm = net
    s = factor(norm)
    bias = norm.bias.double() - norm.running_mean.double() * s
    weight = quantized(layer.weight.detach().double() * spread(layer, s), spec)
    # A tie may fall to the other side in float32: allow for single codes that differ.
    ours, theirs = net(x).detach(), convolve(layer, x.double(), weight, bias).detach()
    close(ours, theirs)


def codes(layer: QuantizedWeight, weight: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the integer codes of a weight for a range."""
    spec = layer.weight_quantizer.spec
    amax = torch.maximum(low.abs(), high.abs())
    scale = torch.where(amax > 0, amax / spec.quant_max, 1.0)
    if spec.axis is not None:
        scale = scale.reshape([-1 if d == spec.axis else 1 for d in range(weight.dim())])
    return (weight / scale).round().clamp(spec.quant_min, spec.quant_max)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("kind", ["conv2d", "conv2d groups", "linear"])
def test_codes_do_not_change_where_the_fold_cancels(kind: str, gamma: str) -> None:
    net = build(kind, gamma, WEIGHT)
    layer, norm = net
    assert layer.fold_cancels
    assert layer.weight_fold_scale() is None
    w = layer.weight.detach()
    amax = w.flatten(1).abs().amax(1)
    plain = codes(layer, w, -amax, amax)
    s = factor(norm)
    used = torch.where(s == 0, 1.0, s).float()
    folded = w * layer.along_output(used)
    bound = amax * used.abs()
    after = codes(layer, folded, -bound, bound) * layer.along_output(used.sign())
    assert torch.equal(plain, after)


@pytest.mark.parametrize("name", SPECS)
def test_fold_cancels_only_where_it_does(name: str) -> None:
    layer = build("conv2d", "negative", SPECS[name])[0]
    assert layer.fold_cancels == (name in ("per channel", "4 bit"))
    assert (layer.weight_fold_scale() is None) == layer.fold_cancels


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_with_groups_keeps_the_scale_per_axis(groups: int) -> None:
    layer = qnn.QuantConvTranspose2d(4, 6, 3, groups=groups)
    layer.attach_weight(WEIGHT.replace(axis=1))
    layer.fold(nn.BatchNorm2d(6))
    assert layer.fold_cancels == (groups == 1)
    vector = torch.arange(1.0, 7.0)
    wanted = spread(layer, vector.double()).float()
    assert torch.equal(layer.along_output(vector).expand_as(layer.weight), wanted)


@pytest.mark.parametrize("name", ["per channel", "per tensor"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_frozen_batch_norm_of_torchvision(name: str, gamma: str) -> None:
    reference = build("conv2d", gamma, SPECS[name])
    layer, norm = reference
    frozen = FrozenBatchNorm2d(6, eps=norm.eps)
    frozen.load_state_dict(norm.state_dict(), strict=False)
    x = inputs("conv2d")
    expected = reference(x)
    layer.fold(frozen)
    torch.testing.assert_close(nn.Sequential(layer, frozen)(x), expected)


def test_the_fold_scale_follows_the_batch_norm_and_takes_no_gradient() -> None:
    net = build("conv2d", "positive", SPECS["per tensor"]).train()
    layer, norm = net
    before = layer.weight_fold_scale()
    net(10 * inputs("conv2d")).square().sum().backward()
    after = layer.weight_fold_scale()
    assert before is not None
    assert after is not None
    assert not torch.equal(before, after)
    assert not after.requires_grad
    assert layer.weight.grad is not None
    assert norm.weight.grad is not None


@pytest.mark.parametrize("name", ["per channel", "per tensor"])
def test_one_convolution_per_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, calls = build("conv2d", "negative", SPECS[name]).train(), []
    layer = net[0]
    original = layer._conv_forward

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(layer, "_conv_forward", counted)
    net(inputs("conv2d")).sum().backward()
    assert calls == [1]


@pytest.mark.parametrize("name", SPECS)
def test_switched_off_the_fold_costs_no_accuracy(name: str) -> None:
    net, x = build("conv2d", "negative", SPECS[name]), inputs("conv2d")
    net[0].weight_quantizer.quantize = False
    layer, norm = net
    plain = norm(F.conv2d(x, layer.weight, layer.bias))
    torch.testing.assert_close(net(x), plain, rtol=1e-5, atol=1e-5)
    if layer.fold_cancels:
        assert torch.equal(net(x), plain)


def test_the_batch_norm_is_registered_once() -> None:
    net = build("conv2d", "positive", WEIGHT)
    assert [name for name, _ in net.named_modules() if "batch_norm" in name] == []
    assert not any(name.startswith("0.") and "running" in name for name in net.state_dict())


def test_a_batch_norm_without_affine() -> None:
    layer, norm = qnn.QuantConv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)
    layer.attach_weight(SPECS["per tensor"])
    layer.fold(norm)
    norm.running_var.fill_(4.0)
    scale = layer.weight_fold_scale()
    assert scale is not None
    torch.testing.assert_close(scale.flatten(), torch.full((6,), (4 + norm.eps) ** -0.5))
