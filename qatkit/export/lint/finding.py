"""What the lint reports: one frozen value per finding, and what is done to many of them."""

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


def at_least(findings: Iterable[Finding], level: str) -> list[Finding]:
    """Return the findings of ``level`` and worse.

    Raises:
        QatkitError: the level is none of `LEVELS`.

    >>> [one.rule for one in at_least([Finding("F14", "INFO", "fc", "GEMV")], "WARN")]
    []
    """
    if level not in LEVELS:
        raise QatkitError(f"at_least(level={level!r}): choose one of {', '.join(LEVELS)}")
    return [one for one in findings if LEVELS.index(one.level) <= LEVELS.index(level)]


def findings_to_json(findings: Iterable[Finding], *, indent: int | None = 2) -> str:
    """Return the findings as a JSON array, one object for each, in the given order.

    Each object has the six fields of `Finding`, all of them strings: ``rule``, ``level``, ``node``,
    ``message``, ``source``, ``remedy``. Further fields may be added, none is renamed or left out.

    >>> findings_to_json([])
    '[]'
    """
    return json.dumps([dataclasses.asdict(finding) for finding in findings], indent=indent)
