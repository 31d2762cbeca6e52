"""Adaptive average pooling in operators that ONNX has.

ONNX knows windows of one size at one distance. Adaptive pooling from L to K numbers averages
``x[floor(i L / K) : ceil((i + 1) L / K)]`` for ``i = 0 .. K - 1``: windows of several sizes where K
does not divide L, and copies where K > L.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ADAPTIVE_POOLS: dict[Any, tuple[int, Callable[..., Tensor]]] = {
    F.adaptive_avg_pool1d: (1, F.avg_pool1d),
    F.adaptive_avg_pool2d: (2, F.avg_pool2d),
    F.adaptive_avg_pool3d: (3, F.avg_pool3d),
}
"""Number of spatial dimensions, and the pooling with one window, of each adaptive pooling."""


def adaptive_pool(function: Any, input: Tensor, output_size: Any) -> Tensor:
    """Do what an adaptive average pooling does, where ONNX has no such operator.

    Args:
        function: one of `ADAPTIVE_POOLS`.
        input: (..., C, *lengths).
        output_size: the wanted length of each dimension, ``None`` to keep one, or one for all. A
            length that is computed in the model becomes the number that it is in this run.

    Returns:
        (..., C, *output_size)

    >>> adaptive_pool(F.adaptive_avg_pool1d, torch.tensor([[0.0, 1.0, 2.0, 3.0]]), 3)
    tensor([[0.5000, 1.5000, 2.5000]])
    """
    count, plain = ADAPTIVE_POOLS[function]
    given = [int(length) for length in input.shape[-count:]]
    asked = output_size if isinstance(output_size, tuple | list) else [output_size] * count
    wanted = [before if n is None else int(n) for n, before in zip(asked, given, strict=True)]
    if set(wanted) == {1} or min(wanted) < 1:
        pooled: Tensor = function(input, wanted)
        return pooled
    if all(before % n == 0 for n, before in zip(wanted, given, strict=True)):
        return plain(input, [before // n for n, before in zip(wanted, given, strict=True)])
    for dim, before, n in zip(range(-count, 0), given, wanted, strict=True):
        if n != before:
            input = torch.cat([_mean(input, dim, i, before, n) for i in range(n)], dim)
    return input


def _mean(x: Tensor, dim: int, i: int, before: int, after: int) -> Tensor:
    """Return the average of one window, in which ``dim`` has the length 1."""
    start, end = i * before // after, -(-(i + 1) * before // after)
    window = x.narrow(dim, start, end - start)
    return window if end - start == 1 else window.mean(dim, keepdim=True)
