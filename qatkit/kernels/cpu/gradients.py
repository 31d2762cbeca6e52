"""The gradients of results that loops have written.

A `torch.autograd.Function` comes back to Python in the backward pass, which costs more than a small
tensor itself. With one scale the gradient of fake quantization is that of ``clip(x)``, with a grid
that holds all of x that of ``clone(x)``, and else that of ``masked_fill``. On small tensors PyTorch
records only this, and what is computed is written to its result unseen. What it saves for the
backward pass is complete by then, for a hook may copy it at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qatkit.kernels.cpu.bounds import first_outside, gate
from qatkit.kernels.cpu.sharing import is_unshared

SMALL = 2**18
"""Elements for which a second pass is cheaper than a backward pass in Python."""


def needs_gradient(x: Tensor) -> bool:
    """Tell whether anything is to be recorded for the backward pass."""
    return x.requires_grad and torch.is_grad_enabled()


def carrier(x: Tensor) -> Tensor:
    """Return where the result for ``x`` is written; on small tensors it carries the gradient."""
    return x.clone() if needs_gradient(x) and x.numel() <= SMALL else torch.empty_like(x)


def with_gradient(x: Tensor, y: Tensor) -> Tensor:
    """Return what was written to a carrier with the gradient of ``x``."""
    return straight(x, y, None) if needs_gradient(x) and x.numel() > SMALL else y


def straight(x: Tensor, result: Tensor, places: Tensor | None) -> Tensor:
    """Return ``result`` with the gradient passed on to ``x``.

    Args:
        x: the tensor that was quantized.
        result: what became of it.
        places: those of the elements that get no gradient, in the order of memory; ``None`` for
            none.
    """
    y: Tensor = _Straight.apply(x, result, places)
    return y


class Kept(NamedTuple):
    """A result that can be used for another forward, see `straight`."""

    result: Tensor
    places: Tensor | None


def kept_from(y: Tensor) -> Kept | None:
    """Return what `straight` made ``y`` of, ``None`` if something else made it."""
    node: Any = y.grad_fn
    if getattr(node, "_forward_cls", None) is not _Straight:
        return None
    return Kept(y.detach(), node.places)


def stopped(x: Tensor, scale: float, low: int, high: int, result: Tensor) -> Tensor:
    """Return ``result`` with the gradient passed on to the elements of ``x`` inside the grid."""
    y: Tensor = _PerTensor.apply(x, scale, low, high, result)
    return y


def stopped_by_channel(x: Tensor, scale: Tensor, low: int, high: int, result: Tensor) -> Tensor:
    """Return the same with a scale for each channel, in a shape that broadcasts against ``x``."""
    y: Tensor = _PerChannel.apply(x, scale, low, high, result)
    return y


class _Straight(torch.autograd.Function):
    """The straight-through estimator, but for some elements."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, result: Tensor, places: Tensor | None) -> Tensor:
        ctx.shape, ctx.stride = x.shape, x.stride()
        ctx.places = places if places is not None and len(places) else None
        return result.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.places is not None:
            if is_batched(grad):
                kept = torch.empty_strided(ctx.shape, ctx.stride, dtype=torch.bool).fill_(True)
                kept.as_strided((kept.numel(),), (1,))[ctx.places] = False
                return torch.where(kept, grad, 0.0), None, None
            if grad.stride() != ctx.stride or not is_unshared(grad):
                grad = torch.empty_strided(grad.shape, ctx.stride, dtype=grad.dtype).copy_(grad)
            grad.as_strided((grad.numel(),), (1,)).index_fill_(0, ctx.places, 0.0)
        return grad, None, None


def is_batched(grad: Tensor) -> bool:
    """Tell whether ``grad`` stands for several, one of which has no memory of its own."""
    functorch: Any = torch._C._functorch
    level, legacy = functorch.maybe_current_level(), functorch.is_legacy_batchedtensor(grad)
    return type(grad) is not Tensor or level is not None or bool(legacy)


class _PerTensor(torch.autograd.Function):
    """One scale: the backward pass compares ``x`` itself with the first floats outside the grid."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, low: int, high: int, result: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.grid = scale, low, high
        return result.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        below, above = first_outside(*ctx.grid)
        rounded = x.to(torch.float32) if x.dtype == torch.float64 else x
        return gate(grad, rounded, below, above), None, None, None, None


class _PerChannel(torch.autograd.Function):
    """One scale for each channel and one zero point: the backward pass compares ``x / scale``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, result: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.grid = low, high
        return result.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, scale = ctx.saved_tensors
        below, above = first_outside(1.0, *ctx.grid)
        steps = x.to(torch.float32) * scale.reciprocal()
        return gate(grad, steps, below, above), None, None, None, None
