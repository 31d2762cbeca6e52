"""Gradient checkpointing: a part of a forward that runs again during the backward.

The second run has to compute what the first one did, so a range must neither see the batch twice
nor be another one than in the first run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qatkit.observers import Range

FORWARDS = 8
"""How many forwards may be under way before the backward of the first."""


def is_recomputing() -> bool:
    """Tell whether this forward runs inside a backward, as ``torch.utils.checkpoint`` runs it."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def may_be_recomputed() -> bool:
    """Tell whether this forward is one that ``torch.utils.checkpoint`` may run again.

    Its reentrant variant runs without gradient, the other one with hooks on saved tensors.
    """
    if torch.compiler.is_compiling():
        return False
    if not torch.is_grad_enabled():
        return True
    return _saved_tensors_have_hooks()


def _saved_tensors_have_hooks() -> bool:
    autograd: Any = torch._C._autograd
    if hasattr(autograd, "_top_saved_tensors_default_hooks"):
        return autograd._top_saved_tensors_default_hooks(True) is not None
    try:  # torch 2.6: what is in use cannot be disabled
        autograd._saved_tensors_hooks_disable("")
    except RuntimeError:
        return True
    finally:
        autograd._saved_tensors_hooks_enable()
    return False


class UsedRanges:
    """The ranges that a quantizer used in its latest forwards.

    The forward that is run again is recognized by the range of its tensor, which is the same in
    both runs. No number is read from the device.

    >>> used = UsedRanges()
    >>> one, two = torch.tensor(1.0), torch.tensor(2.0)
    >>> used.add((-one, one), (-two, two))
    >>> used.add((-two, two), (-one, one))
    >>> used.find((-one, one))
    (tensor(-2.), tensor(2.))
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self._entries: list[tuple[Tensor, Tensor]] = []

    def add(self, seen: Range, used: Range) -> None:
        """Remember that a tensor with the range ``seen`` was quantized with the range ``used``."""
        entry = torch.stack(seen), torch.stack(used)
        self._entries = [*self._entries[1 - FORWARDS :], entry]

    def find(self, seen: Range) -> Range | None:
        """Return what the latest tensor with the range ``seen`` was quantized with.

        That of the latest tensor where there is no such one, ``None`` where there is no tensor.
        """
        wanted = torch.stack(seen)
        entries = [entry for entry in self._entries if entry[0].device == wanted.device]
        if not entries:
            return None
        same = (torch.stack([entry[0] for entry in entries]) == wanted).flatten(1).all(1)
        order = torch.arange(len(entries), device=wanted.device)
        found = (order + len(entries) * same).argmax()
        low, high = torch.stack([entry[1] for entry in entries])[found]
        return low, high
