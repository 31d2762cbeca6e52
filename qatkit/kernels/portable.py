"""The reference kernels: tensor operations only, on any device, no sync, whole when compiled."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

LAST_BIN = 255
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-126, 2.0**126
"""Between these a scale and its reciprocal are normal float32 numbers."""
BLOCK_SIZES = (128, 64, 32)
_BLOCKS_PER_ELEMENT = 8
DECIMALS = 10**8


class Tails(NamedTuple):
    """The extremes of the finite elements of each row, and the bins at which its tails end.

    Attributes:
        low: (C,) smallest element; +inf for a row without a finite element.
        high: (C,) largest element; -inf for a row without a finite element.
        first: (C,) first bin that cannot be dropped from the left, 0..255 as float32.
        last: (C,) last bin that cannot be dropped from the right.
    """

    low: Tensor
    high: Tensor
    first: Tensor
    last: Tensor


class Bins(NamedTuple):
    """The 256 bins of a row: ``bin = round((x * unit - origin) * factor)``, half to even.

    Attributes:
        origin: (C,) the smallest element times ``unit``.
        factor: (C,) bins per unit length, ``1 / (high - low) * 255`` in float32.
        unit: (C,) a power of two that keeps the factor finite, 1 for ordinary data.

    Source: TI edgeai-modeloptimization, range shrink (reciprocal first, then times 255).
    """

    origin: Tensor
    factor: Tensor
    unit: Tensor

    def of(self, values: Tensor) -> Tensor:
        """Return the bin of each of ``values``, whose last axis broadcasts against (C,)."""
        return ((values * self.unit - self.origin) * self.factor).round()

    def center(self, index: Tensor) -> Tensor:
        """Return the value in the middle of bin ``index``, (C,)."""
        return (index * self.factor.reciprocal() + self.origin) / self.unit


def bins(low: Tensor, high: Tensor) -> Bins:
    """Return the bins between ``low`` and ``high``, each (C,) float32; any where they are equal."""
    span = high - low
    unit = torch.where(torch.isinf(span), 0.25, torch.where(span < 2.0**-100, 2.0**100, 1.0))
    degenerate = ~(span > 0)
    unit = torch.where(degenerate, 1.0, unit).to(low.dtype)
    origin = torch.where(degenerate, 0.0, low) * unit
    scaled = torch.where(degenerate, 1.0, torch.where(degenerate, 1.0, high) * unit - origin)
    return Bins(origin, scaled.reciprocal() * float(LAST_BIN), unit)


def droppable(count: int, percentile: float) -> int:
    """Return floor(percentile * count / 100), exactly for a percentile of up to 8 decimals.

    >>> droppable(200, 0.5), droppable(199, 0.5), droppable(10000, 0.29)
    (1, 0, 29)
    """
    return int(count * round(percentile * DECIMALS) // (100 * DECIMALS))


def tails(x_CM: Tensor, percentile: float) -> Tails:
    """Return where the tails of each row end; elements that are not finite do not count."""
    total = x_CM.shape[1]
    above_CM = torch.nan_to_num(x_CM, torch.inf, torch.inf, torch.inf)
    below_CM = torch.nan_to_num(x_CM, -torch.inf, -torch.inf, -torch.inf)
    most = droppable(total, percentile)
    block = block_size(total, most)
    if most and block:
        drop = _droppable_finite(x_CM, percentile)[:, None]
        left_Ck = extremes(above_CM, most + 1, block, largest=False)
        right_Ck = extremes(below_CM, most + 1, block, largest=True)
        ends = left_Ck.gather(1, drop)[:, 0], right_Ck.gather(1, drop)[:, 0]
        return tails_from(left_Ck[:, 0], right_Ck[:, 0], *ends)
    low, high = above_CM.amin(1), below_CM.amax(1)
    if most == 0:
        return untrimmed(low, high)
    columns = Bins(*(part[:, None] for part in bins(low, high)))
    bins_CM = torch.where(torch.isfinite(x_CM), columns.of(x_CM), torch.nan)
    return Tails(low, high, *_bisect(bins_CM, _droppable_finite(x_CM, percentile)))


def shrink(x_CM: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """Return the shrunk range of each row, (C,), of its finite elements; 0, 0 without any.

    Args:
        x_CM: (C, M) float32, M > 0.
        percentile: percent of each row that may be cut on each side, 0 <= p < 50.
    """
    low, high, first, last = tails(x_CM, percentile)
    edges = bins(low, high)
    start, stop = (first - 1).clamp(min=0), (last + 1).clamp(max=LAST_BIN)
    varied = low < high
    cut_low, cut_high = varied & (start > 0), varied & (stop < LAST_BIN)
    from_low = torch.where(cut_low, torch.maximum(low, edges.center(start)), low)
    to_high = torch.where(cut_high, torch.minimum(high, edges.center(stop)), high)
    some = low <= high
    return torch.where(some, from_low, 0.0), torch.where(some, to_high, 0.0)


def untrimmed(low: Tensor, high: Tensor) -> Tails:
    """Return the tails of rows from which nothing may be dropped."""
    return Tails(low, high, torch.zeros_like(low), torch.full_like(high, LAST_BIN))


def tails_from(low: Tensor, high: Tensor, left: Tensor, right: Tensor) -> Tails:
    """Return the tails that end at the bins of the elements ``left`` and ``right``, each (C,)."""
    edges = bins(low, high)
    return Tails(low, high, edges.of(left), edges.of(right))


def block_size(total: int, most: int) -> int:
    """Return the length of the blocks to find ``most + 1`` extremes, 0 where blocks do not pay."""
    for size in BLOCK_SIZES:
        if total // size >= _BLOCKS_PER_ELEMENT * (most + 1):
            return size
    return 0


def extremes(x_CM: Tensor, k: int, block: int, *, largest: bool) -> Tensor:
    """Return the ``k`` largest (smallest) elements of each row, (C, k), the most extreme first.

    The ``k`` blocks with the most extreme elements contain them all, so only those are looked into.

    >>> extremes(torch.arange(100.0).reshape(1, -1), 3, 8, largest=True)
    tensor([[99., 98., 97.]])
    """
    channels, total = x_CM.shape
    blocks = total // block
    x_CRB = x_CM[:, : blocks * block].reshape(channels, blocks, block)
    peaks_CR = x_CRB.amax(2) if largest else x_CRB.amin(2)
    chosen_Ck = peaks_CR.topk(min(k, blocks), dim=1, largest=largest, sorted=False).indices
    if channels == 1:  # whole rows of one matrix: several times faster than gather
        candidates = x_CRB[0].index_select(0, chosen_Ck[0]).reshape(1, -1)
    else:
        candidates = x_CRB.gather(1, chosen_Ck[:, :, None].expand(-1, -1, block)).flatten(1)
    rest = x_CM[:, blocks * block :]
    return torch.cat([candidates, rest], 1).topk(k, dim=1, largest=largest).values


def _droppable_finite(x_CM: Tensor, percentile: float) -> Tensor:
    numerator, denominator = round(percentile * DECIMALS), 100 * DECIMALS
    finite: Tensor = torch.isfinite(x_CM).sum(1)
    if x_CM.shape[1] * numerator < 2**62:
        return finite.mul_(numerator).floor_divide_(denominator)
    return finite.double().mul_(numerator / denominator).long()


def _bisect(bins_CM: Tensor, drop: Tensor) -> tuple[Tensor, Tensor]:
    # From both sides, the first bin whose inclusive cumulative count exceeds `drop`.
    first, last = torch.zeros_like(drop), torch.full_like(drop, LAST_BIN)
    for step in (128, 64, 32, 16, 8, 4, 2, 1):
        few = (bins_CM <= (first + (step - 1))[:, None]).sum(1) <= drop
        first = torch.where(few, first + step, first)
        few = (bins_CM >= (last - (step - 1))[:, None]).sum(1) <= drop
        last = torch.where(few, last - step, last)
    return first.to(torch.float32), last.to(torch.float32)


def along(values: Tensor | float | int, x: Tensor, axis: int | None) -> Tensor | float | int:
    """Return per-channel ``values`` in a shape that broadcasts against ``x``."""
    if axis is None or not isinstance(values, Tensor) or values.dim() == 0:
        return values
    return values.reshape([-1 if d == axis % x.dim() else 1 for d in range(x.dim())])


def inverse(scale: Tensor | float, x: Tensor) -> Tensor:
    """Return 1 / scale in float32 on the device of ``x``."""
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=torch.float32, device=x.device)
    return scale.to(torch.float32).reciprocal()


def codes(x: Tensor, scale: Tensor | float) -> Tensor:
    """Return round(x / scale), ties to even, in a float32 buffer of its own."""
    return torch.mul(x.to(torch.float32), inverse(scale, x)).round_()


def passed(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | int, low: int, high: int
) -> Tensor:
    """Return the gradient where the code of ``x`` is inside ``low..high``, else 0."""
    shifted = codes(x, scale) + zero_point
    inside = (shifted >= low) & (shifted <= high)
    return torch.where(inside, grad, 0.0)


class _FakeQuantize(torch.autograd.Function):
    """The clipped straight-through estimator, its mask computed again in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
        shifted = (codes(x, scale) + zero_point).clamp(low, high)
        return (shifted - zero_point).mul_(scale).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, zero_point, ctx.low, ctx.high = inputs
        ctx.save_for_backward(x, scale, zero_point)
        ctx.save_for_forward(x, scale, zero_point)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        x, scale, zero_point = ctx.saved_tensors
        return passed(tangent, x, scale, zero_point, ctx.low, ctx.high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, scale, zero_point = ctx.saved_tensors
        return passed(grad, x, scale, zero_point, ctx.low, ctx.high), None, None, None, None


class _FakeQuantizeUnclipped(torch.autograd.Function):
    """The straight-through estimator where nothing is outside the grid: nothing is saved."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor | float) -> Tensor:
        return codes(x, scale).mul_(scale).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is needed."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return tangent.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    axis: int | None,
) -> Tensor:
    """Fake-quantize ``x`` with tensor operations only."""
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=torch.float32, device=x.device)
    if not isinstance(zero_point, Tensor):
        zero_point = torch.full((), zero_point, dtype=torch.int32, device=x.device)
    wide, shift = along(scale, x, axis), along(zero_point, x, axis)
    result: Tensor = _FakeQuantize.apply(x, wide, shift, quant_min, quant_max)
    return result


def fake_quantize_unclipped(x: Tensor, scale: Tensor | float, axis: int | None) -> Tensor:
    """Fake-quantize ``x``, all of it inside the grid, with tensor operations only."""
    result: Tensor = _FakeQuantizeUnclipped.apply(x, along(scale, x, axis))
    return result
