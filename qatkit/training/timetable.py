"""When in a training what happens: frozen values, in epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from qatkit.errors import QatkitError
from qatkit.spec import QuantSpec

Position = int | float
Stages = tuple[tuple[Position, int], ...]

_POSITIONS = (
    "freeze_batch_norm_at",
    "freeze_ranges_at",
    "quantize_weights_at",
    "quantize_activations_at",
)


@dataclass(frozen=True)
class Timetable:
    """When what happens. "At n" means epoch n, counted from 0, and all after it.

    Attributes:
        epochs: how many epochs the training has.
        freeze_batch_norm_at: batch norms use their running statistics.
        freeze_ranges_at: ranges stay as they are.
        quantize_weights_at: weights are quantized.
        quantize_activations_at: activations are quantized.
        bits: pairs ``(epoch, width)`` in the order of the epochs, ``None`` for the config's widths.
        damping: weight of the damping loss at the end.
        steps_per_epoch: how many steps an epoch has; above 1 the epochs may be fractions.

    Raises:
        QatkitError: a number is out of its range.

    >>> Timetable(4, 1, 3, bits=((0, 8), (2, 4))).bits_after(3)
    4
    """

    epochs: int
    freeze_batch_norm_at: Position
    freeze_ranges_at: Position
    quantize_weights_at: Position = 0
    quantize_activations_at: Position = 0
    bits: Stages | None = None
    damping: float = 0.0
    steps_per_epoch: int = 1

    def __post_init__(self) -> None:
        """Check the fields."""
        _check_count(self.epochs, "epochs", "an integer number of epochs")
        _check_count(self.steps_per_epoch, "steps_per_epoch", "an integer number of steps")
        for name in _POSITIONS:
            self._check_position(getattr(self, name), name)
        for name in ("quantize_weights_at", "quantize_activations_at"):
            if getattr(self, name) > self.epochs:
                raise QatkitError(
                    f"QATSchedule({name}={getattr(self, name)!r}): is after the last of "
                    f"{self.epochs} epochs, so that nothing would be quantized; give less"
                )
        number = isinstance(self.damping, int | float) and not isinstance(self.damping, bool)
        if not (number and 0 <= self.damping < math.inf):
            raise QatkitError(
                f"QATSchedule(damping={self.damping!r}): give the weight of the loss, 0 or more"
            )
        if self.bits is not None:
            self._check_bits(self.bits)

    @property
    def steps(self) -> int:
        """How many steps the whole training has."""
        return self.epochs * self.steps_per_epoch

    def step_of(self, position: Position) -> int:
        """Return the step that a position in epochs is nearest to.

        >>> Timetable(4, 1, 3, steps_per_epoch=10).step_of(0.5)
        5
        """
        return round(position * self.steps_per_epoch)

    def bits_after(self, steps: int) -> int | None:
        """Return the width after so many steps, ``None`` for the config's own."""
        widths = [width for at, width in self.bits or () if self.step_of(at) <= steps]
        return widths[-1] if widths else None

    def damping_after(self, steps: int) -> float:
        """Return the weight of the damping loss: from 0, where weights get quantized, by a cosine.

        >>> [Timetable(4, 1, 3, damping=0.5).damping_after(n) for n in (0, 2, 4)]
        [0.0, 0.25, 0.5]
        """
        start = self.step_of(self.quantize_weights_at)
        share = (steps - start) / max(1, self.steps - start)
        return self.damping * (1 - cosine(min(1.0, max(0.0, share))))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return plain | {"bits": None if self.bits is None else [list(pair) for pair in self.bits]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Timetable:
        """Rebuild a timetable from `to_dict`."""
        return cls(**{**values, "bits": stages(values["bits"])})

    def _check_position(self, value: object, name: str) -> None:
        whole = isinstance(value, int) and not isinstance(value, bool)
        fraction = isinstance(value, float) and math.isfinite(value) and self.steps_per_epoch > 1
        if not (whole or fraction) or float(value) < 0:  # type: ignore[arg-type]
            hint = "" if self.steps_per_epoch > 1 else "; fractions need steps_per_epoch"
            raise QatkitError(
                f"QATSchedule({name}={value!r}): give an integer number of epochs, 0 or more{hint}"
            )

    def _check_bits(self, bits: Stages) -> None:
        for at, width in bits:
            self._check_position(at, "bits")
            QuantSpec(num_bits=width)
        starts = [at for at, _ in bits]
        if not starts or self.step_of(starts[0]) != 0 or starts[-1] > self.epochs:
            raise QatkitError(
                f"QATSchedule(bits={dict(bits)!r}): give a width from epoch 0 on, "
                f"and none after epoch {self.epochs}"
            )


def stages(bits: object) -> Stages | None:
    """Return ``{epoch: width}``, or a list of such pairs, as pairs in the order of the epochs.

    Raises:
        QatkitError: it is neither.

    >>> stages({3: 4, 0: 8})
    ((0, 8), (3, 4))
    """
    if bits is None:
        return None
    pairs = list(bits.items()) if isinstance(bits, Mapping) else bits
    try:
        return tuple(sorted((at, width) for at, width in pairs))  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise QatkitError(
            f"QATSchedule(bits={bits!r}): give a dict from epoch to width, "
            "for example {0: 8, 3: 6, 6: 4}"
        ) from None


def cosine(share: float) -> float:
    """Return half a cosine wave from 1 at 0 down to 0 at 1.

    >>> cosine(0.0), round(cosine(0.5), 6), cosine(1.0)
    (1.0, 0.5, 0.0)
    """
    return (1 + math.cos(math.pi * share)) / 2


def _check_count(value: object, name: str, kind: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise QatkitError(f"QATSchedule({name}={value!r}): give {kind}, 1 or more")
