"""Fake quantization of a tensor with one scale."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qatkit.kernels.cpu.bounds import first_outside, reciprocal
from qatkit.kernels.cpu.compiled import compiled_loops
from qatkit.kernels.cpu.gradients import SMALL, needs_gradient, stopped, straight
from qatkit.kernels.cpu.grids import ActivationNumbers, GridNumbers
from qatkit.kernels.cpu.listing import round_and_list
from qatkit.kernels.cpu.state import read_address
from qatkit.kernels.cpu.threads import in_threads, pieces
from qatkit.kernels.layout import is_dense

_RUN = 4096
"""Elements that are looked at in one go: they stay in the nearest cache."""


def fake_quantize_number(x: Tensor, scale: float, low: int, high: int) -> Tensor:
    """Fake-quantize ``x``, float32, with one scale and a zero point of 0.

    Args:
        x: any shape and memory format.
        scale: a number of float32 that has a reciprocal.
        low: the lowest code, not above 0.
        high: the highest code, not below 0.
    """
    if not needs_gradient(x):
        return round_clamp(x, scale, low, high)
    if x.numel() <= SMALL:
        return fake_quantize_inside(x, scale, low, high, first_outside(scale, low, high))
    if compiled_loops() is None or not is_dense(x):
        y = round_clamp(x.detach(), scale, low, high)
        return stopped(x, scale, low, high, y)
    y = torch.empty_like(x)
    step = torch.tensor([scale], dtype=torch.float32, device="cpu")
    places = round_and_list(x, y, _RUN, step, (low, high))
    if places is None:
        return stopped(x, scale, low, high, y)
    return straight(x, y, places)


def fake_quantize_inside(
    x: Tensor, scale: float, low: int, high: int, bounds: tuple[float, float]
) -> Tensor:
    """Fake-quantize a tensor whose gradient passes inside ``bounds``."""
    y = functional.hardtanh(x, *bounds)
    _round_clamp(y, y, scale, low, high)
    return y


def fake_quantize_on_grid(x: Tensor, numbers: ActivationNumbers, grid: GridNumbers) -> Tensor:
    """Fake-quantize ``x``.

    Args:
        x: float32.
        numbers: the codes.
        grid: the grid.
    """
    low, high = numbers.low, numbers.high
    if needs_gradient(x) and x.numel() <= SMALL:
        return fake_quantize_inside(x, grid.scale, low, high, (grid.below, grid.above))
    return fake_quantize_number(x, grid.scale, low, high)


def round_clamp(x: Tensor, scale: Tensor | float, low: int, high: int) -> Tensor:
    """Return ``clamp(round(x * (1 / scale)), low, high) * scale`` in a buffer of its own."""
    if isinstance(scale, Tensor):
        steps = x.to(torch.float32).mul(scale.reciprocal()).round_().clamp_(low, high)
        return steps.mul_(scale).to(x.dtype)
    if x.dtype == torch.float32 and is_dense(x):
        y = torch.empty_like(x)
        _round_clamp(x, y, scale, low, high)
        return y
    y = x.to(torch.float32, copy=True)
    _round_clamp(y, y, scale, low, high)
    return y.to(x.dtype)


def _round_clamp(x: Tensor, y: Tensor, scale: float, low: int, high: int) -> None:
    """Write the same for ``x`` to ``y``; both float32 and dense, in the same order."""
    loops = compiled_loops()
    if loops is None:
        y = y.detach()
        torch.mul(x.detach(), reciprocal(scale), out=y).round_().clamp_(low, high).mul_(scale)
        return
    addresses = read_address(x), y.data_ptr()
    parts = pieces(x.numel(), x.numel())
    if len(parts) == 1:
        loops.round_clamp(*addresses, x.numel(), scale, low, high)
        return

    def part(some: slice) -> None:
        at = [address + 4 * some.start for address in addresses]
        loops.round_clamp(*at, some.stop - some.start, scale, low, high)

    in_threads(part, parts, (x, y))
