"""Which numbers float16 holds: the scales of quantizers, and constants."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any
"""A NumPy array."""

MOST = 65504.0
"""The largest float16."""
LEAST = 2.0**-24
"""The smallest one above 0."""
_INFINITE = 1e30
"""From here on a number stands for infinity, as in an attention mask."""


def half_scale(scale: Array) -> Array:
    """Return scales in float16; one that would become 0 becomes the smallest number.

    >>> half_scale(np.float32(0.1)).item()
    0.0999755859375
    """
    return np.maximum(np.asarray(scale, np.float32), LEAST).astype(np.float16)


def fits_half(scale: Array) -> bool:
    """Tell whether float16 holds the scales of a tensor.

    No code may move a value by more than half of the largest step of the tensor: ``127 * |error| <=
    max(scale) / 2``. A weight with one normal scale has room for its tiny ones: they are far below
    what the other channels are rounded to.

    >>> fits_half(np.float32([0.01, 1e-9])), fits_half(np.float32(1e-9))
    (True, False)
    """
    wide = np.asarray(scale, np.float64)
    error = np.abs(wide - half_scale(scale).astype(np.float64))
    return bool(254 * error.max(initial=0) <= wide.max(initial=0))


def largest_value(scale: Array, codes: Any) -> float:
    """Return the largest value on a grid of ``codes``, int8 or uint8."""
    limits = np.iinfo(codes)
    return float(max(-limits.min, limits.max) * np.max(scale, initial=0))


def half_constant(values: Array) -> Array | None:
    """Return numbers in float16, ``None`` if one of them is too large.

    What stands for infinity becomes the largest number, and what is not 0 does not become 0: an
    epsilon in a denominator. A single number that is too large is taken for infinity too.
    """
    wide = np.asarray(values, np.float32)
    finite = np.where(np.isinf(wide), 0, wide)
    large = np.abs(finite)
    if wide.size > 1 and np.any((large > MOST) & (large < _INFINITE)):
        return None
    clipped = np.where(np.isinf(wide), wide, np.clip(wide, -MOST, MOST))
    half = clipped.astype(np.float16)
    lost = (half == 0) & (wide != 0)
    return np.where(lost, np.copysign(LEAST, wide), half).astype(np.float16)
