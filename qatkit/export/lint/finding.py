"""What the lint reports: one frozen value per finding, rendered as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass

from qatkit.errors import QatkitError

LEVELS = ("ERROR", "WARN", "INFO")


@dataclass(frozen=True)
class Finding:
    """One place in a file that breaks one rule.

    Attributes:
        rule: id in the rule list, for example ``P2``.
        level: ``ERROR`` the engine refuses or misreads the file, ``WARN`` speed or accuracy is
            lost, ``INFO`` advice.
        node: name of the node (``OpType(output)`` for an unnamed one), or of the graph.
        message: what is wrong, with the offending value.
        source: where the rule comes from.
        remedy: what to change.

    Raises:
        QatkitError: the level is none of `LEVELS`.

    >>> print(Finding("P2", "ERROR", "conv1/q", "zero point 3", remedy="make it 0"))
    ERROR P2 conv1/q: zero point 3; make it 0
    """

    rule: str
    level: str
    node: str
    message: str
    source: str = ""
    remedy: str = ""

    def __post_init__(self) -> None:
        """Check the level."""
        if self.level not in LEVELS:
            raise QatkitError(f"Finding(level={self.level!r}): choose one of {', '.join(LEVELS)}")

    def __str__(self) -> str:
        """Return the finding as one line."""
        tail = f"; {self.remedy}" if self.remedy else ""
        line = f"{self.level} {self.rule} {self.node}: {self.message}{tail}"
        return " ".join(line.split())


def sort_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings by level, errors first, otherwise in the given order."""
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def count_levels(findings: Iterable[Finding]) -> dict[str, int]:
    """Return how many findings each level has.

    >>> count_levels([])
    {'ERROR': 0, 'WARN': 0, 'INFO': 0}
    """
    counts = dict.fromkeys(LEVELS, 0)
    for finding in findings:
        counts[finding.level] += 1
    return counts


def format_findings(findings: Iterable[Finding]) -> str:
    """Return the findings as a text table with a line of totals.

    >>> format_findings([])
    '0 errors, 0 warnings, 0 infos'
    """
    rows = [
        (one.level, one.rule, one.node, one.message + (f"; {one.remedy}" if one.remedy else ""))
        for one in findings
    ]
    counts = count_levels(Finding(rule, level, node, text) for level, rule, node, text in rows)
    total = f"{counts['ERROR']} errors, {counts['WARN']} warnings, {counts['INFO']} infos"
    if not rows:
        return total
    table = [("level", "rule", "node", "finding"), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in table
    ]
    return "\n".join([*(" ".join(line.split("\n")).rstrip() for line in lines), total])


def findings_to_json(findings: Iterable[Finding], *, indent: int | None = 2) -> str:
    """Return the findings as a JSON array of objects with the fields of `Finding`.

    >>> findings_to_json([])
    '[]'
    """
    return json.dumps([dataclasses.asdict(finding) for finding in findings], indent=indent)
