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
        if not x.is_contiguous():
            x = x.permute(0, *sorted(range(1, x.dim()), key=x.stride, reverse=True))
        return x.reshape(x.shape[0], -1)
    moved = x.movedim(axis, 0)
    return moved.reshape(moved.shape[0], -1) if moved.numel() else moved.flatten(1)


def is_dense(x: Tensor) -> bool:
    """Tell whether the elements of ``x`` fill a piece of memory, each once, in whatever order.

    >>> import torch
    >>> is_dense(torch.zeros(2, 3).T), is_dense(torch.zeros(2, 3)[:, :2])
    (True, False)
    """
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
