"""Rule F6: which operand of a residual addition is quantized, by what produced the operands."""

from __future__ import annotations

from dataclasses import dataclass

from qatkit.backend import Backend
from qatkit.graph.capture import Call, Value

_CONVOLUTIONS = ("Conv", "ConvTranspose")
_TRANSPARENT = frozenset(
    {
        "BatchNormalization",
        "Mul",
        "Add",
        *("Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice"),
    }
)
"""Between a layer and the add behind it, as long as everything else that they read is constant."""


@dataclass(frozen=True, eq=False)
class Join:
    """The decision about one addition.

    Attributes:
        quantized: the operands to quantize.
        reason: why these, or why none.
    """

    quantized: tuple[Value, ...]
    reason: str


def is_join(call: Call) -> bool:
    """Tell whether a call adds two activations of one shape."""
    if call.kind != "Add" or len(call.inputs) != 2:
        return False
    left, right = call.inputs
    return left.shape == right.shape and not (left.constant or right.constant)


def place_join(call: Call, quantized: set[Call], backend: Backend) -> Join:
    """Decide which operands of ``call`` are quantized.

    Args:
        call: an addition, see `is_join`.
        quantized: the weighted operators whose input and weight are quantized.
        backend: the engine, for its policies.
    """
    left, right = call.inputs
    common = _ancestors(left) & _ancestors(right)
    ends = {value: branch_end(value, quantized) for value in (left, right)}
    fusable = [value for value in (left, right) if ends[value] is not None and value not in common]
    conv = [value for value in fusable if _ends_in(ends[value], _CONVOLUTIONS)]
    if len(set(conv)) == 2:
        skip = _shallower(left, right, common)
        return _decide(skip, conv, backend.residual, "F6: shallower of two convolution branches")
    if conv:
        skip = right if conv[0] is left else left
        return _decide(skip, conv, backend.residual, "F6: skip input of a residual add")
    if len(set(fusable)) == 1:
        skip = right if fusable[0] is left else left
        return _decide(
            skip, fusable, backend.transformer_residual, "F6c: skip of a transformer residual"
        )
    if fusable:
        return Join((), "F6c: both operands come from linear layers, none is a skip input")
    return Join(
        (), "F6: no operand comes straight from a quantized layer that could fuse with the add"
    )


def branch_end(value: Value, quantized: set[Call]) -> Call | None:
    """Return the quantized operator that ``value`` comes from, seen through what fuses with it."""
    while value.producer is not None:
        call = value.producer
        if call in quantized:
            return call
        data = [source for source in call.data if not source.constant]
        if call.kind not in _TRANSPARENT or len(data) != 1:
            return None
        value = data[0]
    return None


def _decide(skip: Value, fused: list[Value], policy: str, reason: str) -> Join:
    if policy == "none":
        return Join((), f"{reason}, which this engine leaves in float")
    if policy == "both":
        return Join((skip, *(value for value in fused if value is not skip)), reason)
    return Join((skip,), reason)


def _ends_in(end: Call | None, kinds: tuple[str, ...]) -> bool:
    return end is not None and end.kind in kinds


def _shallower(left: Value, right: Value, common: set[Value]) -> Value:
    """Return the operand with the shorter longest path from ``common``, on a tie the earlier."""
    depths = _depth(left, common), _depth(right, common)
    if depths[0] != depths[1]:
        return left if depths[0] < depths[1] else right
    return left if _made_at(left) < _made_at(right) else right


def _made_at(value: Value) -> int:
    return -1 if value.producer is None else value.producer.index


def _ancestors(value: Value) -> set[Value]:
    """Return ``value`` and all values that it was computed from."""
    found: set[Value] = set()
    todo = [value]
    while todo:
        current = todo.pop()
        if current in found:
            continue
        found.add(current)
        if current.producer is not None:
            todo.extend(current.producer.inputs)
    return found


def _depth(value: Value, common: set[Value]) -> int:
    """Return the number of operators on the longest path from ``common`` to ``value``."""
    own = [v for v in _ancestors(value) if v not in common and v.producer is not None]
    depth: dict[Value, int] = {}
    for current in sorted(own, key=_made_at):
        assert current.producer is not None
        depth[current] = 1 + max(
            (depth.get(source, 0) for source in current.producer.inputs), default=0
        )
    return depth.get(value, 0)
