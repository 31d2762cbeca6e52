"""The Triton kernels against the portable ones; `test_gpu.py` runs this file.

On the GPU, or with TRITON_INTERPRET=1 in Triton's interpreter on the CPU.
"""

from __future__ import annotations

import math
import os

import pytest
import torch

from qatkit.kernels import gpu, portable
from qatkit.kernels.layout import rows
from qatkit.observers.eager import join_of
from qatkit.observers.memory import update
from qatkit.observers.registry import OBSERVERS
from qatkit.spec import QuantSpec

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# What overflows or divides by nothing is a warning in NumPy, which the interpreter computes with.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "gaps": lambda x: x[:, :, ::2],
    "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
}


def T(values, **more):
    return torch.tensor(values, device=DEVICE, **more)


def same(found, wanted):
    """Whether two tensors are equal, NaN at the same places."""
    nans = torch.equal(found.isnan(), wanted.isnan())
    return nans and torch.equal(found.nan_to_num(0.5), wanted.nan_to_num(0.5))


def grids():
    per_channel = torch.rand(3, device=DEVICE) * 0.05 + 0.001
    points = torch.randint(-9, 9, (3,), dtype=torch.int32, device=DEVICE)
    return {
        "symmetric": (T(0.02), 0, -128, 127, None),
        "a number": (0.013, 0, -127, 127, None),
        "unsigned": (T(0.01), 0, 0, 255, None),
        "affine": (T(0.013), T(7, dtype=torch.int32), -128, 127, None),
        "per channel": (per_channel, 0, -8, 7, 1),
        "per channel, affine": (per_channel, points, -128, 127, -3),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", grids())
def test_fake_quantize_is_the_portable_one(name, layout, dtype):
    x = (torch.randn(2, 3, 46, 32, device=DEVICE) * 1.5).to(dtype)
    x.view(-1)[:4] = T([math.nan, math.inf, -math.inf, 1e30]).to(dtype)
    grid = grids()[name]
    one, other = (LAYOUTS[layout](x).detach().requires_grad_() for _ in range(2))
    found, wanted = gpu.fake_quantize(one, *grid), portable.fake_quantize(other, *grid)
    assert found.dtype == dtype
    assert same(found, wanted)
    # A gradient in another layout than the input.
    grad = torch.randn(found.shape, device=DEVICE).to(dtype)
    passed = torch.autograd.grad(found, one, grad)[0], torch.autograd.grad(wanted, other, grad)[0]
    numbers = ~one.isnan()
    assert torch.equal(passed[0][numbers], passed[1][numbers])


@pytest.mark.parametrize("bits", [2, 8, 16])
def test_ties_round_to_even(bits):
    top = 2 ** (bits - 1)
    x = torch.arange(-2 * top - 3, 2 * top + 4, device=DEVICE) / 2
    found = gpu.fake_quantize(x, T(1.0), 0, -top, top - 1, None)
    assert torch.equal(found, x.round().clamp(-top, top - 1))
    assert torch.equal(gpu.fake_quantize_unclipped(x, T(1.0), None), x.round())


def test_a_hard_reciprocal_and_values_beyond_integers():
    x = torch.randn(5000, device=DEVICE) * 1e12
    x[0], x[1] = 2.0**23 + 1, -(2.0**23) - 1
    for scale in (0.1, 3.0, 1e-30, 7e37):
        found = gpu.fake_quantize_unclipped(x, T(scale), None)
        assert same(found, portable.fake_quantize_unclipped(x, T(scale), None))


def data(kind, count, dtype):
    x = torch.randn(count, device=DEVICE)
    if kind == "relu":
        x = x.relu()
    if kind == "constant":
        x = torch.full_like(x, 2.5)
    if kind == "dirty":
        x[::7], x[1::9], x[2::11] = math.nan, math.inf, -math.inf
    if kind == "nothing":
        x = torch.full_like(x, math.nan)
    if kind == "tiny":
        x = x * 1e-37
    if kind == "huge":
        x = x.clamp(-1, 1) * 3e38
    return x.to(dtype)


@pytest.mark.parametrize("kind", ["normal", "relu", "constant", "dirty", "nothing", "tiny", "huge"])
@pytest.mark.parametrize("count", [1, 37, 9001])
def test_shrink_is_the_portable_one(count, kind):
    for dtype in DTYPES[: 3 if kind in ("normal", "relu") else 1]:
        x = data(kind, count, dtype)
        for percentile in (0.0, 0.05, 3.0, 49.0):
            found = gpu.shrink(x, percentile, None)
            wanted = portable.shrink(x[None].to(torch.float32), percentile)
            assert [float(end) for end in found] == [float(end) for end in wanted], percentile


@pytest.mark.parametrize("percentile", [0.0, 2.0])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_shrink_of_each_index_along_an_axis(axis, percentile):
    x = torch.randn(3, 40, 5, device=DEVICE)
    found = gpu.shrink(x, percentile, axis)
    for one, other in zip(found, portable.shrink(rows(x, axis), percentile), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(gpu.shrink(x[:, :0], percentile, 0)[0], T([0.0] * 3))


SPECS = {
    "shrink": QuantSpec(percentile=1.0),
    "shrink, momentum": QuantSpec(percentile=1.0, momentum=0.3),
    "minmax": QuantSpec(observer="minmax"),
    "ema": QuantSpec(observer="ema"),
    "average": QuantSpec(observer="average"),
    "latest": QuantSpec(observer="minmax", memory="latest"),
}


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("name", SPECS)
def test_ranges_join_the_memory_as_on_the_cpu(name, axis):
    spec = SPECS[name].replace(axis=axis)
    percentile = spec.percentile if spec.observer == "shrink" else 0.0
    shape = () if axis is None else (3,)
    state, oracle = ([torch.zeros(shape), torch.zeros(shape), torch.tensor(0)] for _ in range(2))
    state = [each.to(DEVICE) for each in state]
    for batch in range(5):
        x = torch.randn(2, 3, 700, device=DEVICE) * (batch + 1)
        if batch == 2:
            x[:, :2] = 0.0
        new = gpu.observe(x, tuple(state), percentile, axis, gpu.Join(*join_of(spec)))
        ends = [end.cpu() for end in portable.shrink(rows(x, axis), percentile)]
        assert all(torch.equal(a.cpu().reshape(-1), b) for a, b in zip(new, ends, strict=True))
        if spec.memory == "latest":
            oracle = [end.reshape(shape) for end in ends] + [oracle[2] + 1]
        else:
            rule = OBSERVERS[spec.observer].remember
            update(rule, tuple(oracle), tuple(end.reshape(shape) for end in ends), spec)
        for found, wanted in zip(state, oracle, strict=True):
            assert torch.equal(found.cpu(), wanted), batch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [None, 0])
def test_weights_in_one_kernel(axis, dtype):
    w = torch.randn(5, 3, 3, 7, device=DEVICE).to(dtype).to(memory_format=torch.channels_last)
    w[0] = 0.0
    w.requires_grad_()
    assert gpu.fits(w, axis)
    low, high = portable.shrink(rows(w.detach(), axis).to(torch.float32), 0.0)
    scale = torch.maximum(low.abs(), high.abs()) / 127.0
    scale = torch.where(scale > 0, scale, 1.0)
    shape = () if axis is None else (5,)
    state = torch.zeros(shape), torch.zeros(shape), torch.tensor(3)
    state = tuple(each.to(DEVICE) for each in state)
    found = gpu.quantize_rows(w, axis, 127, state)
    wanted = portable.fake_quantize_unclipped(w, scale if axis == 0 else scale[0], axis)
    if axis == 0:
        wanted = portable.fake_quantize_unclipped(w, scale[:, None, None, None], None)
    assert torch.equal(found, wanted)
    assert torch.equal(state[0].reshape(-1), low)
    assert torch.equal(state[1].reshape(-1), high)
    assert state[2] == 4
    assert torch.equal(torch.autograd.grad(found.sum(), w)[0], torch.ones_like(w))


def test_rows_that_do_not_fit():
    w = torch.zeros(4, 3, 2, device=DEVICE)
    assert not gpu.fits(w, 1)
    assert not gpu.fits(w[:, :2], 0)
    assert not gpu.fits(w[:0], 0)
    assert not gpu.fits(torch.zeros(1, 2**15, device=DEVICE), 0)
