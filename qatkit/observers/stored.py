"""The range in a ``state_dict``, whichever observer wrote it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qatkit.observers.learned import parameter_names, range_of, to_parameters
from qatkit.spec import LEARNED, QuantSpec

OBSERVED = ("min_val", "max_val")
COUNT = "num_batches"


def names_of(spec: QuantSpec) -> tuple[str, ...]:
    """Return the names of the tensors that hold the range of a quantizer with this spec.

    >>> names_of(QuantSpec()), names_of(QuantSpec(observer="lsq"))
    (('min_val', 'max_val'), ('step',))
    """
    return parameter_names(spec) or OBSERVED


def holds_range(state_dict: dict[str, Any], prefix: str) -> bool:
    """Tell whether anything of a quantizer is there."""
    names = {COUNT, *OBSERVED, "step", "offset", "threshold", "log2_threshold"}
    return any(prefix + name in state_dict for name in names)


def translated(state_dict: dict[str, Any], prefix: str, spec: QuantSpec) -> dict[str, Any]:
    """Return a state with the range in the tensors of ``spec``, if it is there in others."""
    if all(prefix + name in state_dict for name in names_of(spec)):
        return state_dict
    for writer in _writers(spec):
        names = [prefix + name for name in names_of(writer)]
        if all(name in state_dict for name in names):
            low, high = _range([state_dict[name] for name in names], writer)
            values = to_parameters(low, high, spec) if spec.learned else (low, high)
            kept = {key: value for key, value in state_dict.items() if key not in names}
            return kept | {
                prefix + name: value for name, value in zip(names_of(spec), values, strict=True)
            }
    return state_dict


def _writers(spec: QuantSpec) -> list[QuantSpec]:
    """Return the specs that could have written the range of the same grid."""
    plain = spec.replace(observer="minmax", fixed_range=None)
    observers = LEARNED if spec.symmetric else ("lsq+",)
    settings = {"memory": "running", "momentum": None}
    return [plain, *(plain.replace(observer=name, **settings) for name in observers)]


def _range(values: list[Tensor], writer: QuantSpec) -> tuple[Tensor, Tensor]:
    if not writer.learned:
        return values[0], values[1]
    low, high = range_of(tuple(values), writer)
    return low.detach(), high.detach()
