"""What a loop may read and write by its address: a wrong layout would be a wrong memory access."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

State: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""The buffers ``(min, max, count)`` of a quantizer: () or (C,) float32 twice, () int64."""
read_address: Callable[[Tensor], int] = getattr(Tensor, "const_data_ptr", Tensor.data_ptr)
"""Return the address of a tensor that is only read: a lazy clone stays one, see `is_lazy`."""


def is_lazy(x: Tensor) -> bool:
    """Tell whether the address of ``x`` cannot be had without a copy of what it shares."""
    torch_c: Any = torch._C
    return read_address is Tensor.data_ptr and bool(torch_c._is_cow_tensor(x))


def is_state(state: State, shape: torch.Size) -> bool:
    """Tell whether the buffers of a quantizer are what they were made as.

    A user may have assigned others, or pruned a weight.
    """
    low, high, count = state
    counts = type(count) is Tensor and count.dtype is torch.int64 and count.is_cpu
    return counts and count.numel() == 1 and is_numbers(low, shape) and is_numbers(high, shape)


def is_numbers(x: Tensor, shape: torch.Size) -> bool:
    """Tell whether ``x`` is that many float32 numbers, dense on the CPU.

    >>> is_numbers(torch.zeros(3), torch.Size([3])), is_numbers(torch.zeros(3), torch.Size([4]))
    (True, False)
    """
    plain = type(x) is Tensor and x.dtype is torch.float32 and x.is_cpu
    return plain and x.shape == shape and x.is_contiguous()
