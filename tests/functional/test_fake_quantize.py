from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qatkit.errors import QatkitError
from qatkit.functional import fake_quantize, fake_quantize_unclipped, qparams
from qatkit.kernels import portable
from qatkit.kernels.cpu import first_outside
from qatkit.spec import QuantSpec

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
AXES = (None, 0, 1, -1)
GRIDS = ((-128, 127), (-127, 127), (0, 255), (-8, 7), (-7, 7), (-2, 1), (0, 3), (-32768, 32767))
ROUTES = {
    "eager": fake_quantize,
    "portable": lambda x, s, z, low, high, axis=None: portable.fake_quantize(
        x, s, z, low, high, axis
    ),
}


def native(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, axis: int | None) -> Tensor:
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, low, high)
    return torch.fake_quantize_per_channel_affine(x, scale, zero, axis % x.dim(), low, high)


def data(scale: Tensor, low: int, high: int, axis: int | None, dtype: torch.dtype) -> Tensor:
    """Values around and beyond the grid, among them ties, both ends and their float neighbours."""
    shape = (4, 6, 8, 6)
    count = 4 * 6 * 8 * 6
    codes = torch.rand(count) * (high - low) * 1.4 + low - 0.2 * (high - low)
    codes[: count // 2] = (codes[: count // 2] * 2).round() / 2
    ends = torch.tensor([low - 0.5, low - 1.0, high + 0.5, high + 1.0, low, high])
    codes[::7] = ends.repeat(count)[: len(codes[::7])]
    wide = portable.along(scale, torch.empty(shape), axis)
    x = codes[torch.randperm(count)].reshape(shape) * wide
    steps = torch.randint(-2, 3, shape)
    x = torch.where(steps > 0, torch.nextafter(x, torch.tensor(torch.inf)), x)
    return torch.where(steps < 0, torch.nextafter(x, torch.tensor(-torch.inf)), x).to(dtype)


def run(function, x: Tensor, *args) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = function(x, *args)
    generator = torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad


def grid_of(axis: int | None, low: int, high: int, *, affine: bool) -> tuple[Tensor, Tensor]:
    shape = () if axis is None else ((4, 6, 8, 6)[axis],)
    scale = torch.rand(shape) * 0.2 + 0.01
    if axis is not None:
        scale[0], scale[-1] = 1.0, 2.0**-20
    zero = torch.randint(low, high + 1, shape) if affine else torch.zeros(shape)
    return scale, zero.to(torch.int32)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("low", "high"), GRIDS)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_native(dtype, axis, low, high, affine, route):
    scale, zero = grid_of(axis, low, high, affine=affine)
    if not low <= 0 <= high:
        zero = zero.clamp(low, high)
    x = data(scale, low, high, axis, dtype)
    y, grad = run(ROUTES[route], x, scale, zero, low, high, axis)
    want, want_grad = run(native, x, scale, zero, low, high, axis)
    assert y.dtype == dtype
    assert torch.equal(y, want)
    assert torch.equal(grad, want_grad)


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_for_scale_and_zero_point(dtype, axis):
    scale, _ = grid_of(axis, -128, 127, affine=False)
    zero = torch.full(scale.shape, 3, dtype=torch.int32)
    x = data(scale, -128, 127, axis, dtype)
    want = run(native, x, scale, zero, -128, 127, axis)
    got = run(fake_quantize, x, scale if axis else scale.item(), 3, -128, 127, axis)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("axis", [None, 1])
def test_compiles_whole(axis, backend):
    scale, zero = grid_of(axis, -128, 127, affine=True)
    for dtype in DTYPES:
        x = data(scale, -128, 127, axis, dtype)
        compiled = torch.compile(fake_quantize, fullgraph=True, backend=backend)
        got = run(compiled, x, scale, zero, -128, 127, axis)
        want = run(fake_quantize, x, scale, zero, -128, 127, axis)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@pytest.mark.slow
@pytest.mark.parametrize("axis", [None, 1])
def test_inductor(axis):
    scale, zero = grid_of(axis, -128, 127, affine=False)
    x = data(scale, -128, 127, axis, torch.float32)
    got = run(torch.compile(fake_quantize, fullgraph=True), x, scale, zero, -128, 127, axis)
    want = run(fake_quantize, x, scale, zero, -128, 127, axis)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.permute(3, 1, 0, 2),
        lambda x: x[:, :, ::2],
    ],
)
def test_keeps_the_memory_format(layout, axis):
    x = layout(torch.randn(6, 6, 6, 6))
    scale = torch.full(() if axis is None else (6,), 0.01)
    y, grad = run(fake_quantize, x, scale, 0, -128, 127, axis)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    want, want_grad = run(native, x, scale, zero, -128, 127, axis)
    assert torch.equal(y, want)
    assert torch.equal(grad, want_grad)
    assert y.stride() == torch.empty_like(x).stride() == fake_quantize_unclipped(x, 0.1).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("axis", [None, 0])
def test_unclipped_equals_clipped_where_nothing_is_outside(axis, bits, dtype):
    x = (torch.randn(16, 3, 3, 3) * 10).to(dtype)
    flat = x.float().abs()
    amax = flat.amax() if axis is None else flat.flatten(1).amax(1)
    spec = QuantSpec(num_bits=bits, axis=axis)
    scale, zero = qparams(-amax, amax, spec)
    got = run(fake_quantize_unclipped, x, scale, axis)
    want = run(fake_quantize, x, scale, zero, spec.quant_min, spec.quant_max, axis)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("axis", [None, 0])
def test_not_finite(axis):
    x = torch.tensor([[torch.inf, -torch.inf, 1e38, -1e38, torch.nan, 0.3]])
    scale = torch.full(() if axis is None else (1,), 0.1)
    for route in ROUTES.values():
        y, grad = run(route, x, scale, 0, -8, 7, axis)
        assert torch.allclose(y[0, :4], torch.tensor([0.7, -0.8, 0.7, -0.8]))
        assert y[0, 4].isnan()
        assert not grad[0, :4].any()


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 2.0**-127, 2.0**-126, 1e30, 2.0**127, 3e38])
def test_extreme_scales_never_raise(scale):
    x = torch.tensor([0.0, 1e-40, -1e-40, 1.0, 3e38, -3e38])
    y, grad = run(fake_quantize, x, scale, 0, -128, 127)
    want, want_grad = run(native, x, torch.tensor(scale), torch.tensor(0), -128, 127, None)
    if scale >= 2.0**-126:
        assert torch.equal(y, want)
        assert torch.equal(grad, want_grad)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_empty(shape):
    y, grad = run(fake_quantize, torch.empty(shape), 0.1, 0, -128, 127)
    assert y.shape == grad.shape == shape
    scale = torch.ones(shape[0])
    assert fake_quantize(torch.empty(shape), scale, 0, -128, 127, 0).shape == shape


def test_float32_inside_autocast_and_float64():
    x = torch.randn(100, dtype=torch.float64)
    want = fake_quantize(x.float(), 0.013, 0, -128, 127)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fake_quantize(x.float(), 0.013, 0, -128, 127), want)
    y, grad = run(fake_quantize, x, 0.013, 0, -128, 127)
    assert y.dtype == grad.dtype == torch.float64
    assert torch.equal(y.float(), want)


def test_saves_only_its_input():
    saved: list[Tensor] = []
    x = torch.randn(1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fake_quantize(x, 0.01, 0, -128, 127)
        assert [t.data_ptr() for t in saved] == [x.data_ptr()]
        saved.clear()
        fake_quantize_unclipped(x, 0.01)
        assert not saved


def test_no_gradient_for_frozen_input():
    assert not fake_quantize(torch.randn(3), 0.1, 0, -128, 127).requires_grad


finite = st.floats(-1e4, 1e4, width=32)
scales = st.floats(2.0**-20, 2.0**10, width=32)


@given(st.lists(finite, min_size=1, max_size=20), scales, st.integers(2, 8))
def test_properties(values, scale, bits):
    spec = QuantSpec(num_bits=bits)
    x = torch.tensor(values)
    y = fake_quantize(x, scale, 0, spec.quant_min, spec.quant_max)
    assert torch.equal(fake_quantize(y, scale, 0, spec.quant_min, spec.quant_max), y)
    clipped = x.clamp(spec.quant_min * scale, spec.quant_max * scale)
    assert ((y - clipped).abs() <= scale * 0.50001 + 1e-30).all()
    ordered = fake_quantize(x.sort().values, scale, 0, spec.quant_min, spec.quant_max)
    assert (ordered.diff() >= 0).all()
    doubled = fake_quantize(x * 4, scale * 4, 0, spec.quant_min, spec.quant_max)
    assert torch.equal(doubled, y * 4)


@given(scales, st.integers(0, 300))
def test_thresholds_are_the_first_floats_outside(scale, high):
    below, above = first_outside(scale, -high, high)
    assert below == -above
    ends = torch.tensor([above])
    inside = torch.nextafter(ends, torch.tensor(0.0))
    inverse = torch.tensor(scale).reciprocal()
    assert (ends * inverse).round().item() > high >= (inside * inverse).round().item()


X = torch.zeros(2, 3)
ILLEGAL = [
    ((X, 1.0, 0, 5, 5), "quant_min=5"),
    ((X, 1.0, 0, 7, -8), "quant_max=-8"),
    ((X, torch.ones(3), 0, -8, 7, 2), "axis=2"),
    ((X, torch.ones(3), 0, -8, 7, -3), "axis=-3"),
    ((X, torch.ones(3), 0, -8, 7, 0), r"needs shape \(2,\)"),
    ((X, torch.ones(3, 1), 0, -8, 7, 1), r"needs shape \(3,\)"),
    ((X, torch.ones(3), 0, -8, 7), "give the axis"),
    ((X, torch.ones(3), torch.zeros(2), -8, 7, 1), "zero_point"),
    ((X.int(), 1.0, 0, -8, 7), "int32"),
    (([1.0], 1.0, 0, -8, 7), "list"),
]


@pytest.mark.parametrize(("args", "message"), ILLEGAL)
def test_illegal_arguments(args, message):
    with pytest.raises(QatkitError, match=message) as caught:
        fake_quantize(*args)
    assert "\n" not in str(caught.value)
