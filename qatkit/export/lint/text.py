"""Findings as a text table for people: one line for many of a kind, sources at the end."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from qatkit.export.lint.finding import Finding, count_levels

HEAD = ("level", "rule", "node", "finding")
# So many findings of one kind are written out; of more, the first, and the names of some others.
WRITTEN_OUT = 2
NAMED = 3
NAME_WIDTH = 36
# Columns up to the last one grow to this width; a longer name moves what follows on its line.
MAX_WIDTH = 56

Row = tuple[str, str, str, str]


def format_findings(findings: Iterable[Finding]) -> str:
    """Return the findings as an aligned text table, with sources and a line of totals.

    Findings of one rule and level whose messages differ in names and numbers alone stand together:
    of three or more the first is written out and the others are counted.

    >>> print(format_findings([Finding("P2", "ERROR", f"q{i}", "zero point 3") for i in range(9)]))
    level  rule  node  finding
    ERROR  P2    q0    zero point 3
                       and 8 more: q1, q2, q3, ...
    9 errors, 0 warnings, 0 infos
    """
    given = list(findings)
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for one in given:
        groups.setdefault((one.level, one.rule, _kind(one)), []).append(one)
    rows = [row for group in groups.values() for row in _rows(group)]
    return "\n".join([*_table([HEAD, *rows] if rows else []), *_sources(given), _totals(given)])


def _kind(finding: Finding) -> str:
    """Return the message without names and numbers."""
    return re.sub(r"'[^']*'|\[[^\]]*\]|-?\b\d[\d.e+-]*", "#", finding.message)


def _rows(group: Sequence[Finding]) -> list[Row]:
    written = len(group) if len(group) <= WRITTEN_OUT else 1
    rows = [(one.level, one.rule, one.node, _text(one)) for one in group[:written]]
    rest = [one.node for one in group[written:]]
    if rest:
        names = ", ".join(_tail(name) for name in rest[:NAMED]) + (
            ", ..." if len(rest) > NAMED else ""
        )
        rows.append(("", "", "", f"and {len(rest)} more: {names}"))
    return rows


def _tail(name: str) -> str:
    """Return the end of a long name, where exporters put what tells one node from another."""
    return name if len(name) <= NAME_WIDTH else "..." + name[3 - NAME_WIDTH :]


def _text(finding: Finding) -> str:
    return finding.message + (f"; {finding.remedy}" if finding.remedy else "")


def _table(rows: Sequence[Row]) -> list[str]:
    lines = [tuple(" ".join(cell.split()) for cell in row) for row in rows]
    widths = [min(MAX_WIDTH, max((len(row[i]) for row in lines), default=0)) for i in range(3)]
    return [
        "  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]).rstrip() for row in lines
    ]


def _sources(findings: Iterable[Finding]) -> list[str]:
    """Return one line per rule that was broken and names its source."""
    sources: dict[str, list[str]] = {}
    for one in findings:
        known = sources.setdefault(one.rule, [])
        if one.source and one.source not in known:
            known.append(one.source)
    width = max(map(len, sources), default=0)
    return [f"{rule.ljust(width)}  {'; '.join(texts)}" for rule, texts in sources.items() if texts]


def _totals(findings: Iterable[Finding]) -> str:
    words = {"ERROR": "error", "WARN": "warning", "INFO": "info"}
    counts = count_levels(findings)
    return ", ".join(
        f"{counts[level]} {word}" + ("" if counts[level] == 1 else "s")
        for level, word in words.items()
    )
