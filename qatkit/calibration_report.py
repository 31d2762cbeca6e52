"""`CalibrationReport`: what `qatkit.calibrate` did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from qatkit.graph.plan import table


class CalibratedRange(NamedTuple):
    """The range of one quantizer; of the widest channel where there are several.

    Attributes:
        path: where the quantizer is registered.
        min: lower end.
        max: upper end.
        scale: step of the grid.
    """

    path: str
    min: float
    max: float
    scale: float


@dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate` did; print it.

    Attributes:
        batches: how many batches have run.
        samples: how many samples were in them, by the first axis of the first tensor.
        ranges: the range of each quantizer that saw data.
        unreached: paths of the quantizers that saw nothing and keep the range they had, if any.
        nonfinite: pairs (path, how many NaN and Inf the quantizer saw); they do not count.
    """

    batches: int
    samples: int
    ranges: tuple[CalibratedRange, ...]
    unreached: tuple[str, ...]
    nonfinite: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        """Return the totals, and a table with a line for each quantizer."""
        odd = dict(self.nonfinite)
        head = (
            f"{len(self.ranges)} ranges from {self.batches} batches, {self.samples} samples; "
            f"{len(self.unreached)} quantizers unreached, {len(odd)} saw NaN or Inf"
        )
        rows = [("quantizer", "min", "max", "scale", "note")]
        for path, *ends in self.ranges:
            note = f"ignored {odd[path]} NaN or Inf" if path in odd else ""
            low, high, scale = (f"{end:.4g}" for end in ends)
            rows.append((path, low, high, scale, note))
        rows += [(path, "-", "-", "-", "saw nothing") for path in self.unreached]
        return "\n".join([head, "", *table(rows)])
