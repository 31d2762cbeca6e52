"""What the processes of a ``torch.distributed`` run tell each other.

Everything here is a collective of the default process group: either all ranks call it, or none.
"""

from __future__ import annotations

import sys
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from qatkit.errors import QatkitError
from qatkit.observers import OBSERVERS, Range, is_empty
from qatkit.observers.estimators import estimate_minmax
from qatkit.spec import QuantSpec

GATHER = (
    "take get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of "
    "torch.distributed.checkpoint.state_dict and load it into an unsharded prepared model"
)

_Value = TypeVar("_Value")


def world_size() -> int:
    """Return how many processes run together; 1 outside of a distributed run."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def rank() -> int:
    """Return the number of this process, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def stacked_over_ranks(mine: Tensor) -> Tensor:
    """Return the tensors of all ranks, ``(ranks, *mine.shape)``, by one ``all_reduce``.

    Each rank adds its own to a row of zeros, which is exact in any order of the sums.
    """
    if world_size() == 1:
        return mine[None]
    nothing = torch.zeros_like(mine)
    rows = torch.stack([mine if other == rank() else nothing for other in range(world_size())])
    distributed.all_reduce(rows)
    return rows


def summed_over_ranks(mine: Tensor) -> Tensor:
    """Add up the tensors of all ranks in place, by one ``all_reduce``."""
    if world_size() > 1:
        distributed.all_reduce(mine)
    return mine


def values_of_ranks(mine: _Value) -> list[_Value]:
    """Return the objects of all ranks in their order; they have to be picklable."""
    if world_size() == 1:
        return [mine]
    found: list[_Value | None] = [None] * world_size()
    distributed.all_gather_object(found, mine)
    return found  # type: ignore[return-value]


def range_of_parts(lows: Tensor, highs: Tensor, spec: QuantSpec) -> Range:
    """Return the range of one tensor out of those of its parts.

    The smallest and the largest element of the whole are those of its parts. Any other range is
    estimated as the mean over the parts. A part whose range is ``(0, 0)`` saw nothing and does not
    count.

    Args:
        lows: (parts, ...) float32.
        highs: (parts, ...) float32.
        spec: says how the ranges were estimated.

    Returns:
        ``(low, high)``, (...) float32; ``(0, 0)`` where no part saw anything.

    >>> lows, highs = torch.tensor([-1.0, 0.0, -3.0]), torch.tensor([2.0, 0.0, 1.0])
    >>> range_of_parts(lows, highs, QuantSpec(observer="minmax"))
    (tensor(-3.), tensor(2.))
    >>> range_of_parts(lows, highs, QuantSpec(observer="shrink"))
    (tensor(-2.), tensor(1.5000))
    """
    seen = torch.logical_not(is_empty(lows, highs))
    if OBSERVERS[spec.observer].estimate is estimate_minmax:
        nothing = torch.logical_not(seen.any(0))
        low = torch.where(seen, lows, torch.inf).amin(0).masked_fill(nothing, 0.0)
        return low, torch.where(seen, highs, -torch.inf).amax(0).masked_fill(nothing, 0.0)
    count = seen.sum(0).clamp(min=1)
    return lows.sum(0) / count, highs.sum(0) / count


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a parameter, also of one that ``fully_shard`` has split over the ranks.

    Outside of a forward such a one has to be gathered, which is a collective.
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether this rank holds only a part of ``tensor``."""
    if type(tensor) is Tensor or type(tensor) is nn.Parameter:
        return False
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def require_whole(model: nn.Module, where: str, remedy: str) -> None:
    """Raise a `QatkitError` if a parameter of ``model`` is split over the ranks."""
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise QatkitError(f"{where}: {name!r} is split over the ranks by FSDP; {remedy}")
