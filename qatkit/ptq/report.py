"""`PtqReport`: what a post-training algorithm did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from qatkit.graph.plan import table


class Change(NamedTuple):
    """The error of one layer, block or quantizer, before and after.

    Attributes:
        path: where it is in the model.
        before: the error as `PtqReport.measure` says, before the algorithm.
        after: the error after it, with the same data.
        note: what was done, or why nothing was.
    """

    path: str
    before: float
    after: float
    note: str = ""


@dataclass(frozen=True)
class PtqReport:
    """What an algorithm did; print it.

    Attributes:
        algorithm: its name.
        measure: what ``before`` and ``after`` are.
        changes: one entry for each layer, block or quantizer, in the order of the work.
    """

    algorithm: str
    measure: str
    changes: tuple[Change, ...]

    def __str__(self) -> str:
        """Return the totals, and a table with a line for each entry."""
        better = sum(change.after < change.before for change in self.changes)
        head = f"{self.algorithm}: {len(self.changes)} entries, {better} better; {self.measure}"
        rows = [("path", "before", "after", "note")]
        rows += [(c.path, f"{c.before:.4g}", f"{c.after:.4g}", c.note) for c in self.changes]
        return "\n".join([head, "", *table(rows)])
