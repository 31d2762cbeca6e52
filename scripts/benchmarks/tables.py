"""What a benchmark gives: tables of numbers, and bars beside the values that must meet them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows of one benchmark.

    Attributes:
        title: what was measured.
        setting: how.
        columns: their names.
        rows: a cell for each column; ``None`` for no value.
    """

    title: str
    setting: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [f"**{self.title}**", "", self.setting, ""]
        lines += [_line(self.columns), "|" + "---|" * len(self.columns)]
        return "\n".join([*lines, *(_line(row) for row in self.rows)])


@dataclass(frozen=True)
class Bar:
    """A value and the bound that it must keep.

    Attributes:
        what: what was measured.
        value: the measured value.
        bound: the bound.
        at_most: whether it is an upper bound.
        unit: what both are in.
    """

    what: str
    value: float
    bound: float
    at_most: bool = True
    unit: str = "x"

    @property
    def met(self) -> bool:
        """Whether the value keeps the bound."""
        return self.value <= self.bound if self.at_most else self.value >= self.bound


@dataclass(frozen=True)
class Result:
    """What one benchmark found.

    Attributes:
        tables: the numbers.
        bars: the values that must meet a bound.
        notes: what else must be said, such as a package that is not installed.
    """

    tables: tuple[Table, ...]
    bars: tuple[Bar, ...] = ()
    notes: tuple[str, ...] = ()

    def markdown(self, command: str, about: dict[str, Any]) -> str:
        """Return the whole result as Markdown, with what it was taken on."""
        parts = [f"`{command}`", describe(about), *(table.markdown() for table in self.tables)]
        if self.bars:
            parts.append(_bars(self.bars))
        if self.notes:
            parts.append("\n".join(f"- {note}" for note in self.notes))
        return "\n\n".join(parts) + "\n"

    def json(self, command: str, about: dict[str, Any]) -> str:
        """Return the whole result as JSON."""
        bars = [asdict(bar) | {"met": bar.met} for bar in self.bars]
        tables = [asdict(table) for table in self.tables]
        document = {"command": command, "machine": about, "tables": tables, "bars": bars}
        return json.dumps(document | {"notes": list(self.notes)}, indent=1) + "\n"


def describe(about: dict[str, Any]) -> str:
    """Return one line about the machine and the versions."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    flags = " ".join(about["int8 flags"]) or "none"
    return (
        f"{about['date']}; {about['cpu']} ({about['family, model, stepping']}), "
        f"{about['cores']} cores, INT8 instructions: {flags}; Python {about['python']}, {versions}."
    )


def _bars(bars: Sequence[Bar]) -> str:
    lines = ["| bar | wanted | measured | met |", "|---|---|---|---|"]
    for bar in bars:
        sign = "<=" if bar.at_most else ">="
        verdict = "yes" if bar.met else "**no**"
        bound = f"{sign} {number(bar.bound)} {bar.unit}"
        lines.append(f"| {bar.what} | {bound} | {number(bar.value)} {bar.unit} | {verdict} |")
    return "\n".join(lines)


def _line(cells: Sequence[Cell]) -> str:
    return "| " + " | ".join(number(cell) for cell in cells) + " |"


def number(cell: Cell) -> str:
    """Return a cell as text.

    >>> number(1.2345), number(123.456), number(7), number(None)
    ('1.234', '123.5', '7', '')
    """
    if cell is None:
        return ""
    if not isinstance(cell, float):
        return str(cell)
    digits = 0 if abs(cell) >= 1000 else 1 if abs(cell) >= 100 else 2 if abs(cell) >= 10 else 3
    return f"{cell:.{digits}f}"
