"""What a rule is: an id, where it comes from, and a pure function from a graph to its findings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

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

    @property
    def text(self) -> str:
        """The rule in one sentence."""
        check = self.check.func if isinstance(self.check, partial) else self.check
        lines = (check.__doc__ or self.title).strip().splitlines()
        return lines[0].partition(": ")[2] or self.title


def rule_table(rules: Iterable[Rule]) -> str:
    """Return a table of rules in Markdown, sorted by id.

    >>> print(rule_table([]))
    | rule | says | source |
    |---|---|---|
    """
    rows = sorted(rules, key=lambda rule: _sort_key(rule.id))
    lines = [f"| {rule.id} | {rule.text.rstrip('.')} | {rule.source} |" for rule in rows]
    return "\n".join(["| rule | says | source |", "|---|---|---|", *lines])


def _sort_key(rule_id: str) -> tuple[int, int, str]:
    """Sort P before B before F, as the levels are, then by number."""
    match = re.fullmatch(r"([PBF])(\d+)(.*)", rule_id)
    if match is None:
        return (3, 0, rule_id)
    return ("PBF".index(match[1]), int(match[2]), match[3])
