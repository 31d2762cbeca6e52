"""Whether a gradient may be written to, because nobody else will read it.

A backward pass that changes a few elements of a large gradient is free if it may do so in place.
Mostly it may: the gradient was made for it by the node before. Not where the same tensor goes to
two branches of a sum, where the user passed it in or keeps it in a hook, or where it is a view.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor


def is_unshared(grad: Tensor) -> bool:
    """Tell whether a `torch.autograd.Function` alone holds the gradient it was given.

    Call it in ``backward`` itself, on an argument of that. What counts as alone, PyTorch says: the
    counts of references are compared with those of a gradient that is known to be.
    """
    if torch.is_grad_enabled() or grad.requires_grad or type(grad) is not Tensor:
        return False
    if not grad.untyped_storage().resizable():  # memory of somebody else
        return False
    alone = _alone()
    return alone is not None and all(
        count <= least for count, least in zip(_references(grad), alone, strict=True)
    )


@functools.cache
def _alone() -> tuple[int, int, int] | None:
    """Return the counts for a gradient that nobody else holds, ``None`` if they are not known."""
    if not (hasattr(Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count")):
        return None
    found: list[tuple[int, int, int]] = []
    with torch.enable_grad():
        x = torch.zeros(2, dtype=torch.float32, device="cpu", requires_grad=True)
        (_Probe.apply(x, found) * 2.0).sum().backward()
    return found[0]


class _Probe(torch.autograd.Function):
    """Notes the counts of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: list[Any]) -> Tensor:
        ctx.found = found
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _note(grad, ctx.found)
        return grad, None


def _note(grad: Tensor, found: list[Any]) -> None:
    """Call `_references` from as deep as `is_unshared` does."""
    found.append(_references(grad))


def _references(grad: Tensor) -> tuple[int, int, int]:
    """Return how many hold the tensor, its memory and its Python object."""
    counts: Any = grad
    memory: Any = torch._C
    of_memory = memory._storage_Use_Count(grad.untyped_storage()._cdata)
    return counts._use_count(), of_memory, sys.getrefcount(grad)
