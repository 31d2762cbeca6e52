"""How one tensor is quantized (`QuantSpec`), as a frozen value that is checked when it is made."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qatkit.errors import QatkitError

WATCHING = ("shrink", "minmax", "ema", "average", "sigma", "channel-mean", "fixed")
LEARNED = ("lsq", "lsq+", "pact", "tqt")
OBSERVER_NAMES = (*WATCHING, *LEARNED)

GradientName = Literal["ste", "ewgs", "dsq"]
GRADIENTS = ("ste", "ewgs", "dsq")

Memory = Literal["running", "batch", "latest"]
MEMORIES = ("running", "batch", "latest")


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is turned into integers and back.

    The grid is ``code = clamp(round(x / scale) + zero_point, quant_min, quant_max)``; a symmetric
    spec has ``zero_point = 0`` and ``scale = amax / quant_max``.

    Attributes:
        num_bits: width of a code, 2..16.
        signed: two's complement codes, else codes from 0.
        symmetric: zero point 0 and a range of -amax..amax (0..amax when unsigned).
        narrow_range: leave out the lowest signed code, so that 8 bits are -127..127.
        axis: the axis with one scale for each index, ``None`` for one scale for the tensor.
        observer: how a tensor becomes a range: one of `OBSERVER_NAMES`. Those in `LEARNED` make the
            range a trained parameter that starts from calibration, else from the weight (least
            squared error) or the first training batch: ``lsq`` learns the step, ``lsq+`` also an
            offset where ``symmetric=False``, ``pact`` the clipping threshold by clipped elements
            alone, ``tqt`` the log2 of the threshold. ``percentile`` says nothing to them.
        percentile: for ``shrink``: percent of the samples that may be cut on each side,
            0 <= percentile < 50.
        power_of_two: round the range up to a power of two, so that the scale is one too; needs
            ``symmetric``.
        sigma: for ``sigma``, and the start of ``tqt``: half width of the range in standard
            deviations.
        momentum: the weight of a new range in the memory; ``None`` for the observer's own.
        fixed_range: for ``fixed``: the range ``(min, max)``.
        memory: ``running`` quantizes with the remembered range, ``batch`` with the current one
            while training and the remembered one in eval, ``latest`` always with the range of the
            tensor at hand (weights) until frozen; a learned range is started from it.
        gradient: how the gradient of the tensor goes through the rounding: ``ste`` as if it were
            not there, ``ewgs`` scaled by the rounding error, ``dsq`` as through a smooth staircase.
        ewgs_delta: for ``ewgs``: the factor is 1 + delta * sign(gradient) * rounding error in
            steps, 0 <= delta < 2, so that no gradient changes its sign.
        dsq_alpha: for ``dsq``: 0 < alpha < 1, near 0 for steep stairs.

    Raises:
        QatkitError: a field is out of its range or two fields contradict each other.

    >>> spec = QuantSpec(num_bits=4)
    >>> spec.quant_min, spec.quant_max
    (-8, 7)
    >>> QuantSpec(num_bits=1)
    Traceback (most recent call last):
    qatkit.errors.QatkitError: QuantSpec(num_bits=1): give an integer from 2 to 16
    """

    num_bits: int = 8
    signed: bool = True
    symmetric: bool = True
    narrow_range: bool = False
    axis: int | None = None
    observer: str = "shrink"
    percentile: float = 0.01
    power_of_two: bool = False
    sigma: float = 3.0
    momentum: float | None = None
    fixed_range: tuple[float, float] | None = None
    memory: Memory = "running"
    gradient: GradientName = "ste"
    ewgs_delta: float = 0.1
    dsq_alpha: float = 0.2

    def __post_init__(self) -> None:
        """Check every field."""
        _check_types(self)
        _check_grid(self)
        _check_range(self)
        _check_learned(self)
        _check_gradient(self)

    @property
    def quant_min(self) -> int:
        """The lowest code."""
        if not self.signed:
            return 0
        return -(1 << (self.num_bits - 1)) + int(self.narrow_range)

    @property
    def quant_max(self) -> int:
        """The highest code."""
        return (1 << (self.num_bits - int(self.signed))) - 1

    @property
    def grid(self) -> tuple[int, int, bool, bool, int | None]:
        """What two quantizers must have in common to share a scale."""
        return self.quant_min, self.quant_max, self.symmetric, self.power_of_two, self.axis

    @property
    def per_channel(self) -> bool:
        """Whether each index along an axis has its own scale."""
        return self.axis is not None

    @property
    def learned(self) -> bool:
        """Whether the range is a trained parameter."""
        return self.observer in LEARNED

    def replace(self, **changes: Any) -> QuantSpec:
        """Return a copy with ``changes``, checked like any other spec."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> QuantSpec:
        """Rebuild a spec from `to_dict`."""
        known = dict(fields)
        if known.get("fixed_range") is not None:
            known["fixed_range"] = tuple(known["fixed_range"])
        return cls(**known)


def suggest(word: str, choices: tuple[str, ...]) -> str:
    """Return the remedy for an unknown name: the closest choice if there is one, then all of them.

    >>> suggest("minmx", ("minmax", "ema"))
    "did you mean 'minmax'? choose one of minmax, ema"
    """
    close = difflib.get_close_matches(str(word), choices, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}choose one of {', '.join(choices)}"


def check_percentile(percentile: float, where: str) -> None:
    """Raise a `QatkitError` that starts with ``where`` unless 0 <= percentile < 50."""
    number = isinstance(percentile, (int, float)) and not isinstance(percentile, bool)
    if not number or not 0 <= percentile < 50:
        raise QatkitError(
            f"{where}(percentile={percentile!r}): percent of samples cut per tail, "
            "give 0 <= percentile < 50"
        )


def _check_types(spec: QuantSpec) -> None:
    for name in ("signed", "symmetric", "narrow_range", "power_of_two"):
        if not isinstance(getattr(spec, name), bool):
            raise QatkitError(f"QuantSpec({name}={getattr(spec, name)!r}): give True or False")
    if spec.axis is not None and (isinstance(spec.axis, bool) or not isinstance(spec.axis, int)):
        raise QatkitError(f"QuantSpec(axis={spec.axis!r}): give an integer, or None for per-tensor")


def _check_grid(spec: QuantSpec) -> None:
    if (
        isinstance(spec.num_bits, bool)
        or not isinstance(spec.num_bits, int)
        or not 2 <= spec.num_bits <= 16
    ):
        raise QatkitError(f"QuantSpec(num_bits={spec.num_bits!r}): give an integer from 2 to 16")
    if spec.narrow_range and not spec.signed:
        raise QatkitError(
            "QuantSpec(narrow_range=True, signed=False): "
            "only signed codes have a lowest code to drop"
        )
    if spec.power_of_two and not spec.symmetric:
        raise QatkitError(
            "QuantSpec(power_of_two=True, symmetric=False): "
            "a power-of-two scale needs symmetric=True"
        )


def _check_range(spec: QuantSpec) -> None:
    if spec.observer not in OBSERVER_NAMES:
        remedy = suggest(spec.observer, OBSERVER_NAMES)
        raise QatkitError(f"QuantSpec(observer={spec.observer!r}): unknown observer, {remedy}")
    check_percentile(spec.percentile, "QuantSpec")
    if not (isinstance(spec.sigma, int | float) and 0 < spec.sigma < math.inf):
        raise QatkitError(
            f"QuantSpec(sigma={spec.sigma!r}): give a positive number of standard deviations"
        )
    if spec.momentum is not None and not (
        isinstance(spec.momentum, int | float) and 0 < spec.momentum <= 1
    ):
        raise QatkitError(f"QuantSpec(momentum={spec.momentum!r}): give 0 < momentum <= 1")
    if spec.memory not in MEMORIES:
        raise QatkitError(f"QuantSpec(memory={spec.memory!r}): {suggest(spec.memory, MEMORIES)}")
    if (spec.observer == "fixed") != (spec.fixed_range is not None):
        raise QatkitError(
            "QuantSpec: observer='fixed' and fixed_range=(min, max) go together, "
            "give both or neither"
        )
    if spec.fixed_range is not None:
        _check_fixed(spec)


def _check_fixed(spec: QuantSpec) -> None:
    bounds = spec.fixed_range
    if not isinstance(bounds, tuple) or len(bounds) != 2:
        raise QatkitError(f"QuantSpec(fixed_range={bounds!r}): give a pair (min, max)")
    low, high = bounds
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise QatkitError(f"QuantSpec(fixed_range={bounds!r}): give finite numbers with min <= max")


def _check_learned(spec: QuantSpec) -> None:
    if not spec.learned:
        return
    where = f"QuantSpec(observer={spec.observer!r}"
    if not spec.symmetric and spec.observer != "lsq+":
        raise QatkitError(
            f"{where}, symmetric=False): learns no offset, use observer='lsq+' or symmetric=True"
        )
    if spec.memory == "batch":
        raise QatkitError(
            f"{where}, memory='batch'): a learned range is not that of a batch, use 'running'"
        )
    if spec.momentum is not None:
        raise QatkitError(
            f"{where}, momentum={spec.momentum!r}): a learned range is trained by gradient, "
            "leave momentum at None"
        )


def _check_gradient(spec: QuantSpec) -> None:
    if spec.gradient not in GRADIENTS:
        raise QatkitError(
            f"QuantSpec(gradient={spec.gradient!r}): {suggest(spec.gradient, GRADIENTS)}"
        )
    delta, alpha = spec.ewgs_delta, spec.dsq_alpha
    if isinstance(delta, bool) or not (isinstance(delta, int | float) and 0 <= delta < 2):
        raise QatkitError(f"QuantSpec(ewgs_delta={delta!r}): give 0 <= ewgs_delta < 2")
    if isinstance(alpha, bool) or not (isinstance(alpha, int | float) and 0 < alpha < 1):
        raise QatkitError(f"QuantSpec(dsq_alpha={alpha!r}): give 0 < dsq_alpha < 1")
