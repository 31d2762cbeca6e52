r"""The calibration table of tpu-mlir.

Comment lines start with ``#``; every other line is ``name threshold min max``, each number with
seven decimals, with single spaces, in the order of the graph.

Source: tpu-mlir, ``calibration_table``.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import NamedTuple

from qatkit.errors import QatkitError
from qatkit.tables.text import finite, read_text, write_text

FIELDS = ("name", "threshold", "min", "max")


class TableEntry(NamedTuple):
    """The range of one tensor.

    Attributes:
        name: of the tensor, without a space.
        threshold: the largest magnitude that symmetric codes represent.
        min: lower end of the data.
        max: upper end.
    """

    name: str
    threshold: float
    min: float
    max: float


@dataclass(frozen=True)
class CalibrationTable:
    r"""A calibration table; ``parse(text).text() == text`` for what tpu-mlir wrote.

    Attributes:
        entries: in the order of the graph.
        comments: pairs (how many entries stand before it, the line with its ``#``).

    Raises:
        QatkitError: a name is taken twice or cannot be written, or a number is not finite.

    >>> table = CalibrationTable((TableEntry("conv1", 2.5, -2.6, 2.0),), ((0, "# a comment"),))
    >>> print(table.text(), end="")
    # a comment
    conv1 2.5000000 -2.6000000 2.0000000
    >>> CalibrationTable.parse("conv1 2.5 -2.6\n")
    Traceback (most recent call last):
    qatkit.errors.QatkitError: calibration table, line 1: 3 fields, give 4: name threshold min max
    """

    entries: tuple[TableEntry, ...]
    comments: tuple[tuple[int, str], ...] = ()

    def __post_init__(self) -> None:
        """Check every entry."""
        seen: set[str] = set()
        for index, entry in enumerate(self.entries):
            _check_entry(entry, seen, f"calibration table, entry {index}")
            seen.add(entry.name)
        for _, comment in self.comments:
            if not comment.startswith("#") or "\n" in comment:
                raise QatkitError(
                    f"calibration table: comment {comment!r}, give one line that starts with '#'"
                )

    def text(self) -> str:
        """Return the lines of the file."""
        lines = [f"{e.name} {e.threshold:.7f} {e.min:.7f} {e.max:.7f}" for e in self.entries]
        for position, comment in reversed(self.comments):
            lines.insert(position, comment)
        return "".join(f"{line}\n" for line in lines)

    @classmethod
    def parse(cls, text: str, where: str = "calibration table") -> CalibrationTable:
        """Read the lines of a file; ``where`` names it in messages.

        Raises:
            QatkitError: a line is neither a comment nor an entry; the message has its number.
        """
        entries: dict[str, TableEntry] = {}
        comments = []
        lines = text.removesuffix("\n").split("\n") if text else []
        for number, line in enumerate(lines, 1):
            if line.startswith("#"):
                comments.append((len(entries), line))
                continue
            entry = _parse_line(line, f"{where}, line {number}")
            _check_entry(entry, set(entries), f"{where}, line {number}")
            entries[entry.name] = entry
        return cls(tuple(entries.values()), tuple(comments))


def read_calibration_table(path: str | os.PathLike[str]) -> CalibrationTable:
    """Read a calibration table.

    Raises:
        QatkitError: the file cannot be read, or one of its lines, of which the message has the
            number.
    """
    return CalibrationTable.parse(read_text(path), os.fspath(path))


def write_calibration_table(table: CalibrationTable, path: str | os.PathLike[str]) -> None:
    """Write a calibration table, completely or not at all.

    Raises:
        QatkitError: a file cannot be made there.
    """
    write_text(path, table.text())


def _parse_line(line: str, where: str) -> TableEntry:
    fields = line.split()
    if len(fields) != len(FIELDS):
        raise QatkitError(f"{where}: {len(fields)} fields, give 4: {' '.join(FIELDS)}")
    threshold, low, high = (
        finite(field, where, f"the {name}")
        for name, field in zip(FIELDS[1:], fields[1:], strict=True)
    )
    return TableEntry(fields[0], threshold, low, high)


def _check_entry(entry: TableEntry, seen: set[str], where: str) -> None:
    name = entry.name
    if not name or name.split() != [name] or name.startswith("#"):
        raise QatkitError(
            f"{where}: name {name!r}, a name has no white space and no '#' in front; rename it"
        )
    if name in seen:
        raise QatkitError(f"{where}: {name!r} is there already, give each name once")
    if not all(math.isfinite(number) for number in entry[1:]):
        raise QatkitError(f"{where}: {name!r} has {entry[1:]}, give finite numbers")
    if entry.threshold < 0 or entry.min > entry.max:
        raise QatkitError(
            f"{where}: {name!r} has threshold, min, max {entry[1:]}, give a threshold that is not "
            "negative and min <= max"
        )
