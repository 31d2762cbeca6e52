"""The range of a tensor, and how it joins the memory: two passes over the data and a tiny kernel.

| kernel | reads | writes |
|---|---|---|
| extremes | the data | for each of up to 1024 parts of a row: min, max, count of finite elements |
| histogram | the data, the parts | 256 counts for each row |
| finish | parts, counts, the remembered range | the range, the remembered range |

Counts are integers, so that the order in which parts arrive does not matter. Without anything to
trim there is no histogram.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qatkit.kernels.gpu.arithmetic import EXACT, device_of, is_finite, nearest_even
from qatkit.kernels.layout import rows
from qatkit.kernels.portable import DECIMALS, droppable

BLOCK = 4096
PARTS = 1024
RULES = {"blend": 0, "extremes": 1, "latest": 2}


class Join(NamedTuple):
    """How a range joins the remembered one.

    Attributes:
        rule: ``blend`` with the weight ``clip(1 / (count + 1), least, most)``, ``extremes`` or
            ``latest``.
        least: the smallest weight.
        most: the largest weight.
    """

    rule: str
    least: float = 0.0
    most: float = 1.0


@triton.jit
def _extremes(
    x_ptr,
    parts_ptr,
    finite_ptr,
    counts_ptr,
    length,
    blocks,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    here = tl.arange(0, SIZE)
    low = tl.full([SIZE], float("inf"), tl.float32)
    high = tl.full([SIZE], float("-inf"), tl.float32)
    finite = tl.zeros([SIZE], tl.int32)
    for block in range(part, blocks, PARTS):
        start = block * SIZE
        inside = here < length - start
        x = tl.load(x_ptr + row * length + start + here, mask=inside, other=0.0).to(tl.float32)
        counts = inside & is_finite(x)
        low = tl.minimum(low, tl.where(counts, x, float("inf")))
        high = tl.maximum(high, tl.where(counts, x, float("-inf")))
        finite += counts.to(tl.int32)
    at = row * PARTS + part
    tl.store(parts_ptr + 2 * at, tl.min(low, 0))
    tl.store(parts_ptr + 2 * at + 1, tl.max(high, 0))
    tl.store(finite_ptr + at, tl.sum(finite.to(tl.int64), 0))
    if part == 0:
        bins = tl.arange(0, 256)
        tl.store(counts_ptr + row * 256 + bins, tl.zeros([256], tl.int64))


@triton.jit
def _whole(parts_ptr, row, PARTS: tl.constexpr):
    """Return the extremes of a row."""
    at = row * PARTS + tl.arange(0, PARTS)
    return tl.min(tl.load(parts_ptr + 2 * at), 0), tl.max(tl.load(parts_ptr + 2 * at + 1), 0)


@triton.jit
def _bins(low, high):
    """Return origin, factor and unit of the bins, as `qatkit.kernels.portable.bins`."""
    span = high - low
    varied = span > 0
    small = span < 7.888609052210118e-31
    unit = tl.where(span == float("inf"), 0.25, tl.where(small, 1.2676506002282294e30, 1.0))
    unit = tl.where(varied, unit, 1.0)
    origin = tl.where(varied, low, 0.0) * unit
    scaled = tl.where(varied, tl.where(varied, high, 1.0) * unit - origin, 1.0)
    return origin, tl.div_rn(1.0, scaled) * 255.0, unit


@triton.jit
def _histogram(
    x_ptr, parts_ptr, counts_ptr, length, blocks, PARTS: tl.constexpr, SIZE: tl.constexpr
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    here, bins = tl.arange(0, SIZE), tl.arange(0, 256)
    low, high = _whole(parts_ptr, row, PARTS)
    origin, factor, unit = _bins(low, high)
    counts = tl.zeros([256], tl.int32)
    ignored = 0
    for block in range(part, blocks, PARTS):
        start = block * SIZE
        inside = here < length - start
        x = tl.load(x_ptr + row * length + start + here, mask=inside, other=0.0).to(tl.float32)
        seen = inside & is_finite(x)
        index = nearest_even((tl.where(seen, x, low) * unit - origin) * factor)
        index = tl.minimum(tl.maximum(index, 0.0), 255.0)
        index = tl.where(seen, index, 0.0).to(tl.int32)
        counts += tl.histogram(index, 256)
        ignored += SIZE - tl.sum(seen.to(tl.int32), 0)
    counts -= tl.where(bins == 0, ignored, 0)
    tl.atomic_add(counts_ptr + row * 256 + bins, counts.to(tl.int64), mask=counts > 0)


@triton.jit
def _finish(
    parts_ptr,
    finite_ptr,
    counts_ptr,
    range_ptr,
    min_ptr,
    max_ptr,
    seen_ptr,
    share,
    least,
    most,
    rows,
    TRIM: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
    JOIN: tl.constexpr,
    RULE: tl.constexpr,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    low, high = _whole(parts_ptr, row, PARTS)
    some = low <= high
    new_low, new_high = low, high
    if TRIM:
        finite = tl.sum(tl.load(finite_ptr + row * PARTS + tl.arange(0, PARTS)), 0)
        if WIDE:
            whole = tl.full([], WHOLE, tl.float64)
            drop = (finite.to(tl.float64) * (share.to(tl.float64) / whole)).to(tl.int64)
        else:
            drop = finite * share // WHOLE
        counts = tl.load(counts_ptr + row * 256 + tl.arange(0, 256))
        left = tl.cumsum(counts, 0)
        right = tl.sum(counts, 0) - left + counts
        first = tl.sum((left <= drop).to(tl.int32), 0).to(tl.float32)
        last = 255.0 - tl.sum((right <= drop).to(tl.int32), 0).to(tl.float32)
        origin, factor, unit = _bins(low, high)
        back = tl.div_rn(1.0, factor)
        begin, end = tl.maximum(first - 1.0, 0.0), tl.minimum(last + 1.0, 255.0)
        varied = low < high
        low_center = tl.div_rn(begin * back + origin, unit)
        high_center = tl.div_rn(end * back + origin, unit)
        new_low = tl.where(varied & (begin > 0), tl.maximum(low, low_center), low)
        new_high = tl.where(varied & (end < 255.0), tl.minimum(high, high_center), high)
    new_low, new_high = tl.where(some, new_low, 0.0), tl.where(some, new_high, 0.0)
    tl.store(range_ptr + row, new_low)
    tl.store(range_ptr + rows + row, new_high)
    if JOIN:
        seen = tl.load(seen_ptr)
        if RULE != 2:
            old_low, old_high = tl.load(min_ptr + row), tl.load(max_ptr + row)
            if RULE == 1:
                low, high = tl.minimum(old_low, new_low), tl.maximum(old_high, new_high)
            else:
                weight = tl.div_rn(1.0, seen.to(tl.float32) + 1.0)
                weight = tl.minimum(tl.maximum(weight, least), most)
                rest = 1.0 - weight
                low = old_low * rest + new_low * weight
                high = old_high * rest + new_high * weight
            first_one = (seen == 0) | ((old_low == 0) & (old_high == 0))
            nothing = (new_low == 0) & (new_high == 0)
            new_low = tl.where(nothing, old_low, tl.where(first_one, new_low, low))
            new_high = tl.where(nothing, old_high, tl.where(first_one, new_high, high))
        tl.store(min_ptr + row, new_low)
        tl.store(max_ptr + row, new_high)
        if COUNT:
            tl.store(seen_ptr, seen + 1)


def shrink(x: Tensor, percentile: float, axis: int | None) -> tuple[Tensor, Tensor]:
    """Return the range of ``x``; see `qatkit.kernels.shrink`."""
    return _range(x, percentile, axis, None, Join("latest"))


def observe(
    x: Tensor,
    state: tuple[Tensor, Tensor, Tensor],
    percentile: float,
    axis: int | None,
    join: Join,
) -> tuple[Tensor, Tensor]:
    """Return the range of ``x``, which joins the remembered one in place.

    Args:
        x: any shape and float dtype, not empty.
        state: buffers ``(min, max, count)``: () or (C,) float32 twice, () int64; contiguous.
        percentile: percent of the elements that may be cut on each side, 0 <= p < 50.
        axis: one range for each index along this axis, ``None`` for one range.
        join: how it joins.
    """
    return _range(x, percentile, axis, state, join)


def _range(
    x: Tensor,
    percentile: float,
    axis: int | None,
    state: tuple[Tensor, Tensor, Tensor] | None,
    join: Join,
) -> tuple[Tensor, Tensor]:
    x_CM = rows(x.detach(), axis).contiguous()
    channels, length = x_CM.shape
    found = torch.empty((2, channels), dtype=torch.float32, device=x.device)
    if not x_CM.numel():
        found.zero_()
        return _ends(found, axis)
    trim = droppable(length, percentile) > 0
    blocks = triton.cdiv(length, BLOCK)
    parts = triton.next_power_of_2(max(1, min(blocks, PARTS // min(channels, PARTS))))
    ends = torch.empty((channels, parts, 2), dtype=torch.float32, device=x.device)
    finite = torch.empty((channels, parts), dtype=torch.int64, device=x.device)
    counts = torch.empty((channels, 256), dtype=torch.int64, device=x.device)
    share, whole = round(percentile * DECIMALS), 100 * DECIMALS
    low, high, seen = state or (found[0], found[1], finite)
    sizes = {"PARTS": parts, "SIZE": BLOCK}
    with device_of(x):
        _extremes[(channels, parts)](x_CM, ends, finite, counts, length, blocks, **sizes, **EXACT)
        if trim:
            _histogram[(channels, parts)](x_CM, ends, counts, length, blocks, **sizes, **EXACT)
        _finish[(channels,)](
            ends,
            finite,
            counts,
            found,
            low,
            high,
            seen,
            share,
            join.least,
            join.most,
            channels,
            TRIM=trim,
            WIDE=length * share >= 2**62,
            WHOLE=whole,
            JOIN=state is not None,
            RULE=RULES[join.rule],
            COUNT=channels == 1,
            PARTS=parts,
            **EXACT,
        )
        if state is not None and channels > 1:  # all rows have to read it before
            seen.add_(1)
    return _ends(found, axis)


def _ends(found: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    low, high = found.unbind()
    return (low, high) if axis is not None else (low[0], high[0])
