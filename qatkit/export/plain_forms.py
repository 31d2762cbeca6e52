"""What a model calls, in a form that the ONNX exporter can write."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qatkit.export.adaptive_pool import ADAPTIVE_POOLS, adaptive_pool
from qatkit.export.grid_sample import GRID_SAMPLE_OPSET, grid_sample


class PlainForms(TorchFunctionMode):
    """Inside, functions that the exporter refuses are computed by others.

    Args:
        opset: the opset that is written.

    >>> with PlainForms(13):
    ...     F.adaptive_avg_pool1d(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), 3)
    tensor([[0.5000, 1.5000, 2.5000]])
    """

    def __init__(self, opset: int) -> None:
        """Choose the forms."""
        super().__init__()
        self._forms: dict[Any, Callable[..., Any]] = {
            function: partial(adaptive_pool, function) for function in ADAPTIVE_POOLS
        }
        for split in (torch.tensor_split, Tensor.tensor_split):
            self._forms[split] = partial(_tensor_split, split)
        if opset < GRID_SAMPLE_OPSET:
            self._forms[F.grid_sample] = grid_sample

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the other form of a function, or the function itself."""
        return self._forms.get(func, func)(*args, **(kwargs or {}))


def _tensor_split(
    function: Callable[..., Any], input: Tensor, where: Any = None, dim: int = 0, **named: Any
) -> Any:
    """Slice between the given indices: the exporter crashes on parts of unknown length."""
    where = named.pop("indices", named.pop("indices_or_sections", where))
    if not isinstance(where, (list, tuple)):
        return function(input, named.pop("sections", where), dim, **named)
    before = (slice(None),) * (dim % input.dim())
    ends = [0, *map(int, where), None]
    places = [(*before, slice(*pair)) for pair in pairwise(ends)]
    return tuple(input[place] for place in places)
