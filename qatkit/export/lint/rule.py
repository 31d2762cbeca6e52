"""What a rule is: an id, where it comes from, and a pure function from a graph to its findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from qatkit.backend import Backend
from qatkit.export.lint.finding import Finding
from qatkit.export.lint.graph_view import GraphView

Check = Callable[[GraphView, Backend], Iterator[Finding]]


@dataclass(frozen=True)
class Rule:
    """One rule of the list.

    Attributes:
        id: name in the rule list.
        title: the rule in a few words.
        source: where the rule comes from.
        check: yields the findings of one graph.
    """

    id: str
    title: str
    source: str
    check: Check

    def run(self, view: GraphView, backend: Backend) -> Iterator[Finding]:
        """Yield the findings of one graph, each with the source of this rule."""
        for finding in self.check(view, backend):
            yield replace(finding, source=self.source)
