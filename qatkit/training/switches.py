"""The settings of a model that a training changes and a ``state_dict`` lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from torch import nn

from qatkit.errors import QatkitError
from qatkit.modes import quantizers
from qatkit.nn.batchnorm import (
    batch_norms,
    freeze_statistics,
    statistics_are_frozen,
    thaw_statistics,
)
from qatkit.quantizer import Observe
from qatkit.spec import QuantSpec

Switches = dict[str, Any]


def switches(model: nn.Module) -> Switches:
    """Return plain values: on or off, observing and width of each quantizer; frozen batch norms."""
    return {
        "quantizers": {
            path: [each.quantize, each.observe, each.spec.num_bits]
            for path, each in quantizers(model)
        },
        "frozen_batch_norms": [
            path for path, norm in batch_norms(model) if statistics_are_frozen(norm)
        ],
    }


def check_switches(model: nn.Module, state: Mapping[str, Any], where: str) -> None:
    """Check that `switches` of another model fit this one.

    Raises:
        QatkitError: they do not; the message starts with ``where``.
    """
    given, frozen = state.get("quantizers"), state.get("frozen_batch_norms")
    if not isinstance(given, Mapping) or not isinstance(frozen, list | tuple):
        raise QatkitError(
            f"{where}: has no switches of quantizers; give what state_dict() returned"
        )
    odd = {path for path, _ in quantizers(model)} ^ set(given)
    odd |= set(frozen) - {path for path, _ in batch_norms(model)}
    if odd:
        raise QatkitError(
            f"{where}: the state and {type(model).__name__} differ in {min(odd, key=str)!r}, "
            "a quantizer or a frozen batch norm; prepare the same model in the same way"
        )
    for path, switch in given.items():
        try:
            quantize, observe, num_bits = switch
            QuantSpec(num_bits=num_bits)
        except (TypeError, ValueError):
            quantize, observe = None, None
        if not isinstance(quantize, bool) or observe not in get_args(Observe):
            raise QatkitError(f"{where}: {path!r} has {switch!r}; give what state_dict() returned")


def set_switches(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Bring a model into the state of `switches`, which `check_switches` has checked.

    Tensors stay as they are: they are those of such a state already, or are loaded next.
    """
    for path, quantizer in quantizers(model):
        quantizer.quantize, quantizer.observe, num_bits = state["quantizers"][path]
        quantizer.spec = quantizer.spec.replace(num_bits=num_bits)
    for path, norm in batch_norms(model):
        (freeze_statistics if path in state["frozen_batch_norms"] else thaw_statistics)(norm)
