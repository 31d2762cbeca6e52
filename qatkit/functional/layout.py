"""Views of a tensor in which the order of its elements does not matter."""

from __future__ import annotations

from torch import Tensor


def dense_order(x: Tensor) -> Tensor:
    """Return ``x`` flat, (N,), in the order of its memory: a view where there are no gaps.

    >>> import torch
    >>> x = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    >>> dense_order(x).data_ptr() == x.data_ptr()
    True
    """
    if x.is_contiguous():
        return x.reshape(-1)
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return x.permute(order).reshape(-1)


def rows(x: Tensor, axis: int | None) -> Tensor:
    """Return ``x`` as (C, M): a row for each index along ``axis``, for ``None`` a single row.

    >>> import torch
    >>> rows(torch.zeros(2, 3, 5), 1).shape
    torch.Size([3, 10])
    """
    if axis is None:
        return dense_order(x)[None]
    if axis == 0 and x.numel():
        inner = () if x.is_contiguous() else range(1, x.dim())
        order = sorted(inner, key=x.stride, reverse=True)
        return (x.permute(0, *order) if order else x).reshape(x.shape[0], -1)
    moved = x.movedim(axis, 0)
    return moved.reshape(moved.shape[0], -1) if moved.numel() else moved.flatten(1)
