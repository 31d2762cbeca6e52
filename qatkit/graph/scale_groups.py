"""Rules F8 and F9: quantizers on both sides of an operator that only copies share one scale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qatkit.backend import Backend
from qatkit.graph.capture import Capture, Value


def find_groups(
    capture: Capture,
    quantizers: Mapping[str, Iterable[Value]],
    backend: Backend,
    *,
    share_concat: bool,
) -> tuple[tuple[str, ...], ...]:
    """Return the sets of quantizer paths that must share a scale.

    Args:
        capture: the recorded run.
        quantizers: what each quantizer reads.
        backend: the engine, for its copying operators.
        share_concat: whether the inputs of a concatenation count as one tensor.
    """
    sets = _DisjointSets()
    for call in capture.operators:
        if call.kind not in backend.copies or (call.kind == "Concat" and not share_concat):
            continue
        moved = [value for value in (*call.data, *call.results) if not value.constant]
        for value in moved[1:]:
            sets.union(moved[0], value)
    members: dict[Value, list[str]] = {}
    for path, values in quantizers.items():
        for root in dict.fromkeys(sets.find(value) for value in values):
            members.setdefault(root, []).append(path)
    return _merged(paths for paths in members.values() if len(paths) > 1)


def _merged(groups: Iterable[list[str]]) -> tuple[tuple[str, ...], ...]:
    """Join groups that have a path in common."""
    result: list[list[str]] = []
    for group in groups:
        touching = [other for other in result if set(other) & set(group)]
        merged = list(dict.fromkeys([path for other in touching for path in other] + group))
        result = [other for other in result if other not in touching] + [merged]
    return tuple(tuple(group) for group in result)


class _DisjointSets:
    """Union-find over values."""

    def __init__(self) -> None:
        self._parent: dict[Value, Value] = {}

    def find(self, value: Value) -> Value:
        """Return the representative of the set of ``value``."""
        while (parent := self._parent.get(value, value)) is not value:
            self._parent[value] = self._parent.get(parent, parent)
            value = parent
        return value

    def union(self, one: Value, other: Value) -> None:
        """Join two sets."""
        self._parent[self.find(one)] = self.find(other)
