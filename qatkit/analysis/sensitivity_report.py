"""`Sensitivity`: the table of how much each part of a model loses by quantization."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from qatkit.analysis.parts import Part
from qatkit.config import Rule
from qatkit.errors import QatkitError
from qatkit.graph.plan import table

Mode = Literal["leave-one-out", "one-at-a-time"]


class Quality(NamedTuple):
    """How good a model is in one state; a metric that was not asked for is ``None``.

    Attributes:
        sqnr: signal to quantization noise of the outputs in dB; ``inf`` if they are the float ones.
        kl: Kullback-Leibler divergence from the float outputs, in nats.
        score: what the metric of the user says, the higher the better.
    """

    sqnr: float | None = None
    kl: float | None = None
    score: float | None = None


@dataclass(frozen=True)
class PartSensitivity:
    """One row of the table.

    Attributes:
        part: the layer or function, with its quantizers.
        quality: of the model with this part alone in float (leave-one-out) or this part alone
            quantized (one-at-a-time).
        sensitivity: the higher, the more the model loses by quantizing the part. Leave-one-out:
            what is gained by leaving it in float. One-at-a-time: what is lost by quantizing it,
            for SQNR minus the decibels.
    """

    part: Part
    quality: Quality
    sensitivity: float

    @property
    def name(self) -> str:
        """Path of the layer, or of the first quantizer of a function."""
        return self.part.name


@dataclass(frozen=True)
class Sensitivity:
    """How much each part of a model loses by quantization; print it.

    Attributes:
        mode: ``"leave-one-out"`` or ``"one-at-a-time"``.
        metric: what decides: ``"sqnr"``, ``"kl"`` or the name of a function.
        unquantized: the quality of the float model.
        quantized: the quality with everything quantized.
        rows: one for each part, in the order of the modules.
        batches: how many batches have run.
    """

    mode: Mode
    metric: str
    unquantized: Quality
    quantized: Quality
    rows: tuple[PartSensitivity, ...]
    batches: int

    @property
    def ranking(self) -> tuple[PartSensitivity, ...]:
        """All rows, the most sensitive first; of two equal ones the earlier."""
        return tuple(sorted(self.rows, key=lambda row: -row.sensitivity))

    def top(self, count: int) -> tuple[PartSensitivity, ...]:
        """Return the ``count`` most sensitive rows, all if there are fewer.

        Raises:
            QatkitError: ``count`` is no integer from 0.
        """
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise QatkitError(f"Sensitivity.top({count!r}): give how many rows, 0 or more")
        return self.ranking[:count]

    def rules(self, count: int) -> tuple[Rule, ...]:
        """Return the rules that keep the ``count`` most sensitive parts in float.

        They go into the `qatkit.QuantConfig` of a fresh float model.

        Raises:
            QatkitError: as for `top`.
        """
        return tuple(rule for row in self.top(count) for rule in row.part.rules)

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain values; an infinite SQNR stays ``inf``."""
        rows = [
            {**asdict(row.part), **row.quality._asdict(), "sensitivity": row.sensitivity}
            for row in self.rows
        ]
        return {
            "mode": self.mode,
            "metric": self.metric,
            "batches": self.batches,
            "unquantized": self.unquantized._asdict(),
            "quantized": self.quantized._asdict(),
            "rows": rows,
        }

    def __str__(self) -> str:
        """Return the totals, and a table with the most sensitive part first."""
        head = (
            f"{len(self.rows)} parts, {self.mode} by {self.metric} on {self.batches} batches, "
            "most sensitive first"
        )
        ends = [
            ("all in float", "", *_cells(self.unquantized), ""),
            ("all quantized", "", *_cells(self.quantized), ""),
        ]
        rows = [("part", "kind", "SQNR dB", "KL", "score", "sensitivity")]
        rows += [
            (row.name, row.part.kind, *_cells(row.quality), f"{row.sensitivity:.4g}")
            for row in self.ranking
        ]
        return "\n".join([head, "", *table([*rows, *ends])])


def loss_of(quality: Quality, metric: str) -> float:
    """Return how bad a model is by one metric, ``inf`` where that is no number."""
    if metric == "sqnr":
        value = quality.sqnr
        loss = math.inf if value is None else -value
    elif metric == "kl":
        loss = math.inf if quality.kl is None else quality.kl
    else:
        loss = math.inf if quality.score is None else -quality.score
    return math.inf if math.isnan(loss) else loss


def difference(worse: float, better: float) -> float:
    """Return ``worse - better``, 0 for two equal infinities."""
    return 0.0 if worse == better else worse - better


def _cells(quality: Quality) -> tuple[str, str, str]:
    cells = ["-" if value is None else f"{value:.4g}" for value in quality]
    return cells[0], cells[1], cells[2]
