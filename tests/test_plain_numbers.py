"""The short way of the common quantizers gives what the general one gives, bit by bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from qatkit import QuantSpec
from qatkit.functional import qparams
from qatkit.kernels import cpu, portable
from qatkit.plain_numbers import knows_activation, knows_weight
from qatkit.quantizer import TensorQuantizer

WEIGHT = QuantSpec(axis=0, observer="minmax", narrow_range=True, memory="latest")
ACTIVATIONS = [
    QuantSpec(),
    QuantSpec(percentile=2.0),
    QuantSpec(percentile=0.0, num_bits=4),
    QuantSpec(signed=False, num_bits=7, observer="ema"),
    QuantSpec(observer="minmax"),
    QuantSpec(observer="average", narrow_range=True),
]


def general(quantizer: TensorQuantizer) -> TensorQuantizer:
    """Keep the quantizer from taking the short way."""
    quantizer._is_plain = lambda x: False  # type: ignore[method-assign]
    return quantizer


def run(quantizer: TensorQuantizer, tensors: list[Tensor]) -> list[Tensor]:
    """Return values, gradients and state after some steps, the last ones frozen and in eval."""
    results = []
    for step, tensor in enumerate([*tensors, tensors[0], tensors[1]]):
        if step == len(tensors):
            quantizer.observe = "never"
        if step == len(tensors) + 1:
            quantizer.eval()
        x = tensor.clone().requires_grad_()
        y = quantizer(x)
        y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape))
        state = (quantizer.min_val, quantizer.max_val, quantizer.num_batches)
        results += [y.detach(), x.grad, *(each.clone() for each in state)]
    return results


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Tell whether all are equal, NaN too."""
    return all(
        torch.equal(a.nan_to_num(1.5), b.nan_to_num(1.5)) for a, b in zip(one, other, strict=True)
    )


def tensors(shape: tuple[int, ...]) -> list[Tensor]:
    """Return tensors of all sorts."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    hole = x.clone()
    hole.view(-1)[3] = math.nan
    infinite = x.relu()
    infinite.view(-1)[5] = math.inf
    return [x, x.relu() * 3, x * 1e-30, x - 9, hole, infinite, torch.zeros(shape), x * 1e38]


@pytest.mark.parametrize("spec", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (4, 8, 64, 64), (3, 7, 41, 43)])
def test_activation(spec: QuantSpec, shape: tuple[int, ...]) -> None:
    assert knows_activation(spec)
    data = tensors(shape)
    assert same(run(TensorQuantizer(spec), data), run(general(TensorQuantizer(spec)), data))


@pytest.mark.parametrize("shape", [(6, 3, 3, 3), (32, 1, 3, 3), (300, 400)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weight(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    assert knows_weight(WEIGHT)
    data = [
        x.contiguous(memory_format=layout) if x.dim() == 4 else x
        for x in tensors(shape)
        if bool(torch.isfinite(x).all()) and x.abs().max() < 1e20
    ]
    data[1][2] = 0.0  # a dead channel
    data[0][:1] *= 1.5  # outside its frozen range afterwards
    made = [TensorQuantizer(WEIGHT, shape[0]) for _ in range(2)]
    assert same(run(made[0], data), run(general(made[1]), data))


def test_few_rows_outside_a_frozen_range() -> None:
    torch.manual_seed(0)
    w = torch.randn(64, 32, 6, 6).to(memory_format=torch.channels_last)
    scale = w.abs().amax((1, 2, 3)) / 127
    for factor in (1.0, 1.5):
        w[5] *= factor
        one, other = (w.clone().requires_grad_() for _ in range(2))
        grad = torch.randn_like(w)
        fast = cpu.fake_quantize(one, scale, 0, -127, 127, 0)
        slow = portable.fake_quantize(other, scale, 0, -127, 127, 0)
        fast.backward(grad)
        slow.backward(grad)
        assert torch.equal(fast, slow)
        assert torch.equal(one.grad, other.grad)
        assert fast.stride() == w.stride()
    assert int((one.grad == 0).sum()) > 0


def test_scales_like_the_general_ones() -> None:
    low = torch.tensor([-1.0, 0.0, -1e-44, -3e38, 0.1])
    high = torch.tensor([0.5, 0.0, 1e-44, 3e38, 0.3])
    w = torch.randn(5, 7)
    scale, zero_point = qparams(low, high, WEIGHT)
    expected = portable.fake_quantize(w, scale, zero_point, -127, 127, 0)
    state = low, high, torch.tensor(1)
    assert torch.equal(cpu.fake_quantize_rows_in_ranges(w, state, -127, 127), expected)
    for odd in (math.nan, math.inf):
        high[3] = odd
        assert cpu.fake_quantize_rows_in_ranges(w, state, -127, 127) is None


def test_hooks_of_a_quantizer_run() -> None:
    quantizer, seen = TensorQuantizer(WEIGHT, 4), []
    quantizer.register_forward_hook(lambda *_: seen.append(1))
    quantizer(nn.Linear(3, 4).weight)
    assert seen == [1]
