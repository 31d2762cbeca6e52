"""The traced forwards of a model's blocks, each made when it is first asked for."""

from __future__ import annotations

from collections import Counter

from torch import nn

from qatkit.graph.capture import Call, Capture
from qatkit.graph.level import LevelError
from qatkit.graph.matching import Level, match


class Levels:
    """Traces blocks on demand and remembers the result, also that it is not possible.

    Args:
        capture: the recorded run.
    """

    def __init__(self, capture: Capture) -> None:
        """Index the calls of every block."""
        self.calls = _calls_of_modules(capture.root)
        self._known: dict[str, tuple[Level, ...] | LevelError] = {}

    def of(self, block: Call | None) -> tuple[Level, ...]:
        """Return the forward of a block as a graph, matched with each recorded call of it.

        Raises:
            LevelError: it cannot be rewritten.
        """
        if block is None or block.module is None:
            raise LevelError("it has no block around it")
        if block.name not in self._known:
            self._known[block.name] = self._trace(block)
        known = self._known[block.name]
        if isinstance(known, LevelError):
            raise known
        return known

    def why_not(self, block: Call | None) -> str:
        """Return why a block cannot be rewritten, empty if it can."""
        try:
            self.of(block)
        except LevelError as error:
            return str(error)
        return ""

    def functions(self, block: Call | None) -> Counter[str] | None:
        """Return how often the own forward of a block calls each function.

        ``None`` where that tells nothing: it differs between the recorded calls, or the forward
        belongs to the object and not to its class.
        """
        if block is None or block.module is None or "forward" in block.module.__dict__:
            return None
        counted = [
            Counter(child.name for child in call.children if child.module is None)
            for call in self.calls[block.name]
        ]
        return counted[0] if all(one == counted[0] for one in counted) else None

    def _trace(self, block: Call) -> tuple[Level, ...] | LevelError:
        assert block.module is not None
        calls = self.calls[block.name]
        if any(_writes_argument(call) and not self._owns_argument(call) for call in calls):
            return LevelError("it writes to its argument, which the code around it can see")
        try:
            return match(block.module, calls)
        except LevelError as error:
            return error

    def _owns_argument(self, block: Call) -> bool:
        """Tell whether nothing outside reads the argument of a block after the call."""
        parent = block.parent
        if parent is None:
            return False
        return type(parent.module) is nn.Sequential or not self.why_not(parent)


def name_of(block: Call | None) -> str:
    """Return what to call the forward of a block in a message."""
    if block is None or not block.name:
        return "the model's own forward"
    return f"the forward of {block.name!r}"


def _writes_argument(block: Call) -> bool:
    """Tell whether an operation of a block's own forward, as in ``x += y``, changes its input."""
    own = [call for call in block.children if call.module is None]
    return any(value in call.writes for call in own for value in block.inputs)


def _calls_of_modules(root: Call) -> dict[str, list[Call]]:
    """Return the recorded calls of each module by path, in order of execution."""
    calls: dict[str, list[Call]] = {}
    todo = [root]
    while todo:
        call = todo.pop()
        if call.module is not None:
            calls.setdefault(call.name, []).append(call)
        todo.extend(call.children)
    return {path: sorted(found, key=lambda call: call.index) for path, found in calls.items()}
