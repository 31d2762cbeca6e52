"""Gradients of scale, offset and x against the formulas of the papers, in float64 NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qatkit import kernels
from qatkit.functional import fake_quantize, fake_quantize_learned
from qatkit.kernels import Gradient
from qatkit.kernels.learned import fake_quantize as chosen
from qatkit.observers import gradient_of
from qatkit.spec import QuantSpec

LSQ = Gradient(by_code=False, normalized=True)
PACT = Gradient(inside=False, by_code=False)
TQT = Gradient()
GRIDS = {"int4": (-8, 7), "narrow": (-7, 7), "uint4": (0, 15), "int2": (-2, 1), "int8": (-128, 127)}


def oracle(
    x: Any, grad: Any, scale: Any, zero_point: Any, low: int, high: int, rule: Gradient, count: int
) -> tuple[Any, Any, Any]:
    """Return the gradients of x, of the scale and of the offset before the sum, all float64."""
    v = x / scale + zero_point
    code = np.rint(x / scale) + zero_point
    below, above = (code < low, code > high) if rule.by_code else (v <= low, v >= high)
    inside = ~(below | above)
    error = x / scale - np.rint(x / scale)
    factor = np.ones_like(x)
    if rule.estimator == "ewgs":
        factor = 1 + rule.strength * np.sign(grad) * error
    if rule.estimator == "dsq":
        k = math.log(2 / rule.strength - 1)
        middle = np.floor(x / scale) + 0.5  # where the code changes
        factor = k / 2 / np.tanh(k / 2) * (1 - np.tanh(k * (x / scale - middle)) ** 2)
    local = np.where(inside, -error if rule.inside else 0.0, np.where(below, low, high))
    normal = 1 / np.sqrt(count * high) if rule.normalized else 1.0
    clipped = np.where(inside, 0.0, grad)
    return np.where(inside, grad * factor, 0.0), grad * local * normal, clipped * normal


def samples(shape: tuple[int, ...], reach: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * reach
    return x, torch.randn(shape, generator=generator)


def gradients(
    x: Tensor, grad: Tensor, scale: Tensor, axis: int | None, grid: tuple[int, int], rule: Gradient,
    fast: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    y = chosen(x, scale, 0, None, *grid, axis, rule, fast)
    y.backward(grad)
    assert x.grad is not None
    assert scale.grad is not None
    return y.detach(), x.grad, scale.grad


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rule", [LSQ, PACT, TQT], ids=["lsq", "pact", "tqt"])
def test_gradients_are_those_of_the_papers(
    rule: Gradient, grid: str, axis: int | None, fast: bool
) -> None:
    low, high = GRIDS[grid]
    x, grad = samples((6, 5, 7), 0.7 * high)
    scale = torch.tensor(1.3) if axis is None else torch.linspace(0.5, 2.0, x.shape[axis])
    y, by_x, by_scale = gradients(x, grad, scale, axis, (low, high), rule, fast)
    assert torch.equal(y, fake_quantize(x, scale, 0, low, high, axis))
    wide = scale if axis is None else scale.reshape([-1 if d == axis % 3 else 1 for d in range(3)])
    numbers = (each.double().numpy() for each in (x, grad, wide))
    count = x.numel() // scale.numel()
    want_x, want_scale, _ = oracle(*numbers, 0, low, high, rule, count)
    others = None if axis is None else tuple(d for d in range(3) if d != axis % 3)
    np.testing.assert_allclose(by_x.numpy(), want_x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by_scale.numpy(), want_scale.sum(others), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("by_code", [True, False])
@pytest.mark.parametrize(("estimator", "strength"), [("ewgs", 0.3), ("dsq", 0.2), ("dsq", 0.7)])
def test_estimators(
    estimator: str, strength: float, by_code: bool, axis: int | None, fast: bool
) -> None:
    rule = Gradient(estimator, strength, by_code=by_code)
    x, grad = samples((4, 3, 50), 4.0)
    scale = torch.tensor(0.9) if axis is None else torch.tensor([0.5, 1.0, 2.0])
    _, by_x, by_scale = gradients(x, grad, scale, axis, (-8, 7), rule, fast)
    wide = scale if axis is None else scale[:, None]
    numbers = (each.double().numpy() for each in (x, grad, wide))
    want_x, want_scale, _ = oracle(*numbers, 0, -8, 7, rule, 1)
    np.testing.assert_allclose(by_x.numpy(), want_x, rtol=2e-5, atol=2e-5)
    summed = want_scale.sum(None if axis is None else (0, 2))
    np.testing.assert_allclose(by_scale.numpy(), summed, rtol=2e-4, atol=2e-4)


def test_dsq_has_a_mean_gradient_of_one() -> None:
    x = torch.linspace(0.5, 3.5, 30_001)[:-1].requires_grad_()
    rule = Gradient("dsq", 0.2)
    fake_quantize_learned(x, torch.tensor(1.0), 0, -8, 7, rule=rule).sum().backward()
    assert x.grad is not None
    assert x.grad.mean().item() == pytest.approx(1.0, abs=1e-4)
    assert x.grad.argmax() % 10_000 in (0, 9_999)  # steepest where the code changes


@pytest.mark.parametrize("axis", [None, 1])
def test_offset(axis: int | None) -> None:
    x, grad = samples((40, 3, 6), 2.0)
    x.requires_grad_()
    shape = () if axis is None else (3,)
    scale = torch.full(shape, 0.4, requires_grad=True)
    offset = torch.full(shape, 1.2, requires_grad=True)
    zero_point = torch.full(shape, -3, dtype=torch.int32)
    y = fake_quantize_learned(x, scale, zero_point, -8, 7, axis, offset=offset, rule=LSQ)
    y.backward(grad)
    assert torch.equal(y, fake_quantize(x.detach(), scale.detach(), zero_point, -8, 7, axis))
    # (x - offset) / scale = x / scale - 3: the formula of the paper with a whole number of steps.
    numbers = (each.detach().double().numpy() for each in (x, grad, torch.tensor(0.4)))
    want = oracle(*numbers, -3, -8, 7, LSQ, x.numel() // scale.numel())
    others = None if axis is None else (0, 2)
    assert x.grad is not None
    assert scale.grad is not None
    assert offset.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), want[0], atol=1e-6)
    np.testing.assert_allclose(scale.grad.numpy(), want[1].sum(others), rtol=2e-4, atol=1e-4)
    np.testing.assert_allclose(offset.grad.numpy(), want[2].sum(others), rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("observer", ["lsq", "pact", "tqt"])
@pytest.mark.parametrize("axis", [None, 1])
def test_finite_differences(observer: str, axis: int | None) -> None:
    """With rounding errors and clipped elements held, the result is smooth in the scale."""
    x, grad = samples((5, 4, 30), 3.0)
    spec = QuantSpec(num_bits=3, observer=observer, axis=axis)
    rule = gradient_of(spec)
    scale = torch.tensor(0.8) if axis is None else torch.tensor([0.5, 0.8, 1.1, 1.4])
    _, _, by_scale = gradients(x, grad, scale, axis, (-4, 3), rule, True)
    x64, g64 = x.double().numpy(), grad.double().numpy()
    s64 = scale.double().numpy().reshape(-1, 1) if axis else scale.double().numpy()
    v, code = x64 / s64, np.rint(x64 / s64)
    low, high = (code < -4, code > 3) if rule.by_code else (v <= -4, v >= 3)
    residual = code - v

    def loss(s: Any) -> Any:
        """Return the sum for each scale; PACT takes a clipping that is not rounded."""
        inner = x64 + residual * s if rule.inside else x64
        return (g64 * np.where(low, -4 * s, np.where(high, 3 * s, inner))).sum(
            (0, 2) if axis else None
        )

    step = 1e-6
    want = (loss(s64 + step) - loss(s64 - step)) / (2 * step)
    if rule.normalized:
        want = want / np.sqrt(x.numel() / scale.numel() * 3)
    np.testing.assert_allclose(by_scale.numpy(), want, rtol=3e-4, atol=3e-4)


@pytest.mark.parametrize("axis", [None, 0])
def test_result_overwritten_and_second_backward(axis: int | None) -> None:
    x, grad = samples((4, 9), 3.0)
    start = torch.tensor(0.7) if axis is None else torch.full((4,), 0.7)
    plain = gradients(x, grad, start, axis, (-4, 3), LSQ, True)[1:]
    for overwrite in (True, False):
        leaf, scale = x.clone().requires_grad_(), start.clone().requires_grad_()
        y = fake_quantize_learned(leaf, scale, 0, -4, 3, axis, rule=LSQ)
        out = y.add_(1.0) if overwrite else y
        got = torch.autograd.grad(out, (leaf, scale), grad, retain_graph=True)
        again = torch.autograd.grad(out, (leaf, scale), grad)
        for one, two, want in zip(got, again, plain, strict=True):
            assert torch.equal(one, want)
            assert torch.equal(two, want)


@pytest.mark.parametrize("layout", ["x", "grad", "both"])
def test_layouts(layout: str) -> None:
    x, grad = samples((2, 3, 4, 5), 3.0)
    want = gradients(x, grad, torch.tensor(0.7), None, (-4, 3), LSQ, True)
    if layout != "grad":
        x = x.to(memory_format=torch.channels_last)
    if layout != "x":
        grad = grad.to(memory_format=torch.channels_last)
    got = gradients(x, grad, torch.tensor(0.7), None, (-4, 3), LSQ, True)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    x, grad = samples((50,), 3.0)
    x, grad = x.to(dtype), grad.to(dtype)
    x.requires_grad_()
    scale = torch.tensor(0.7, requires_grad=True)
    y = fake_quantize_learned(x, scale, 0, -4, 3, rule=LSQ)
    y.backward(grad)
    assert torch.equal(y, fake_quantize(x.detach(), 0.7, 0, -4, 3))
    assert x.grad is not None
    assert scale.grad is not None
    assert (x.grad.dtype, scale.grad.dtype) == (dtype, torch.float32)
    numbers = (each.detach().double().numpy() for each in (x, grad, scale))
    want = oracle(*numbers, 0, -4, 3, LSQ, 50)[1].sum()
    assert scale.grad.item() == pytest.approx(want, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("rule", [LSQ, PACT, Gradient("dsq", 0.2)])
def test_infinite_and_empty(axis: int | None, rule: Gradient) -> None:
    for x in (torch.tensor([[math.inf, -math.inf, 1.0]]), torch.zeros(1, 0), torch.zeros(1, 3)):
        x.requires_grad_()
        scale = torch.ones(() if axis is None else (1,), requires_grad=True)
        fake_quantize_learned(x, scale, 0, -4, 3, axis, rule=rule).sum().backward()
        assert x.grad is not None
        assert scale.grad is not None
        assert torch.isfinite(x.grad).all()
        assert torch.isfinite(scale.grad).all()


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, scale = torch.randn(9), torch.tensor(0.3, requires_grad=True)
    fake_quantize_learned(x, scale, 0, -4, 3).sum().backward()
    assert x.grad is None
    assert scale.grad is not None
    x.requires_grad_()
    fake_quantize_learned(x, torch.tensor(0.3), 0, -4, 3).sum().backward()
    mask = x.detach().clone().requires_grad_()
    fake_quantize(mask, 0.3, 0, -4, 3).sum().backward()
    assert mask.grad is not None
    assert torch.equal(x.grad, mask.grad)


def test_the_fast_path_is_taken_on_the_cpu() -> None:
    y = kernels.fake_quantize_learned(
        torch.randn(3, requires_grad=True), torch.tensor(1.0), 0, None, -4, 3, None, LSQ
    )
    assert "OneScale" in type(y.grad_fn).__name__
