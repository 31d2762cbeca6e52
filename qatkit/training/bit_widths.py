"""Change how many bits the quantizers of a model have while it trains."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.freeze import saved_range
from qatkit.modes import quantizers
from qatkit.prepare import plan_of
from qatkit.quantizer import TensorQuantizer

WIDEST_UNSIGNED = 7
"""Codes from 0 of 7 bits have the step of signed ones of 8 bits, and fit int8 too."""


def own_widths(model: nn.Module) -> dict[str, int]:
    """Return the width of each quantizer by path: of the config, or as it is without a plan."""
    plan = plan_of(model)
    planned = {} if plan is None else {each.path: each.spec.num_bits for each in plan.quantizers}
    return {path: planned.get(each.name, each.spec.num_bits) for path, each in quantizers(model)}


def require_last(widths: Mapping[str, int], last: int) -> None:
    """Raise a `QatkitError` unless the last width is the smallest one, so that all are reached."""
    path = min(widths, key=lambda each: widths[each])
    if last != widths[path]:
        raise QatkitError(
            f"QATSchedule(bits=...): the last width is {last} and {path!r} has {widths[path]} "
            f"in the config; end with {widths[path]}, so that the model ends as it is exported"
        )


def width_at(own: int, stage: int, *, signed: bool) -> int:
    """Return the width of a quantizer in a stage: the wider one of the two.

    So the first and the last layer keep the 8 bits that a config gives them, and none is ever
    narrower than in the exported file. An unsigned one is not widened beyond `WIDEST_UNSIGNED`.

    >>> width_at(4, 6, signed=True), width_at(8, 6, signed=True), width_at(4, 8, signed=False)
    (6, 8, 7)
    """
    return max(own, stage if signed else min(stage, WIDEST_UNSIGNED))


class Rescaled:
    """A quantizer whose tensors were changed so that its range stayed the same.

    Args:
        quantizer: the quantizer, as it is now.
        before: its state before.
    """

    def __init__(self, quantizer: TensorQuantizer, before: Mapping[str, Tensor]) -> None:
        """Remember the state before, and which version of the tensors it is to undo."""
        self._quantizer, self._before = quantizer, before
        self._versions = _versions(quantizer)

    def undo(self) -> None:
        """Give the tensors back their values, unless they were written to since."""
        if _versions(self._quantizer) == self._versions:
            self._quantizer.load_state_dict(self._before)


def set_stage(model: nn.Module, own: Mapping[str, int], stage: int) -> list[Rescaled]:
    """Give each quantizer its width of a stage; ``own`` are the widths of `own_widths`.

    Returns:
        those that keep something else than their range, for example a scale.
    """
    changes = [
        set_num_bits(quantizer, width_at(own[path], stage, signed=quantizer.spec.signed))
        for path, quantizer in quantizers(model)
    ]
    return [change for change in changes if change is not None]


def set_num_bits(quantizer: TensorQuantizer, num_bits: int) -> Rescaled | None:
    """Change the width of a quantizer; its range stays, but that of a weight, if it is learned.

    Returns:
        the change of its tensors, ``None`` where they hold the range itself.

    >>> from qatkit.spec import QuantSpec
    >>> quantizer = TensorQuantizer(QuantSpec())
    >>> quantizer.set_range(-1.0, 1.0)
    >>> set_num_bits(quantizer, 4)
    >>> round(1 / quantizer.scale.item()), quantizer.amax.item()
    (7, 1.0)
    """
    if quantizer.spec.num_bits == num_bits:
        return None
    known = quantizer.calibrated
    low, high = (end.detach().clone() for end in quantizer.own_range)
    state = saved_range(quantizer)
    quantizer.spec = quantizer.spec.replace(num_bits=num_bits)
    if not known or all(map(torch.equal, (low, high), quantizer.own_range)):
        return None
    if quantizer.spec.memory == "latest":
        quantizer.reset_range()  # a learned range of a weight starts anew from the weight
    else:
        quantizer.set_range(low, high)
        quantizer.num_batches.copy_(state["num_batches"])
    return Rescaled(quantizer, state)


def _versions(quantizer: TensorQuantizer) -> list[tuple[int, int]]:
    """Return what changes when a tensor of a quantizer is replaced or written to."""
    kept = (*quantizer.parameters(recurse=False), *quantizer.buffers(recurse=False))
    return [(id(tensor), tensor._version) for tensor in kept]
