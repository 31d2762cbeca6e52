"""A quantized weight that serves more than one forward."""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor

from qatkit.kernels.cpu import Kept, kept_from, needs_gradient, straight
from qatkit.kernels.cpu.state import read_address


class Once:
    """Keeps what became of a weight, for as long as the weight and its quantizer stay as they were.

    Only of large weights, eager on the CPU: others are as fast to quantize as to keep.
    """

    def __init__(self) -> None:
        """Keep nothing yet."""
        self._key: tuple[Hashable, ...] | None = None
        self._kept: Kept | None = None
        self._version = 0

    def find(self, x: Tensor, low: Tensor, *how: Hashable) -> Tensor | None:
        """Return what became of ``x``, with a gradient of its own, ``None`` if it is not there.

        Args:
            x: the weight.
            low: the buffer of the lower ends of its range.
            *how: what else the result depends on.
        """
        if self._kept is None or not needs_gradient(x) or self._key != _key(x, low, how):
            return None
        if self._kept.result._version != self._version:  # somebody has written to it
            return None
        return straight(x, *self._kept)

    def keep(self, quantized: Tensor, x: Tensor, low: Tensor, *how: Hashable) -> None:
        """Keep ``quantized``, which became of ``x``; without gradient nothing is kept."""
        self._key, self._kept = _key(x, low, how), kept_from(quantized)
        self._version = self._kept.result._version if self._kept else 0

    def __reduce__(self) -> tuple[type[Once], tuple[()]]:
        """Copy as one that keeps nothing: a copied quantizer has a weight of its own."""
        return Once, ()


def _key(x: Tensor, low: Tensor, how: tuple[Hashable, ...]) -> tuple[Hashable, ...]:
    # A range that is set by hand has another version; what the loops write follows the weight.
    return id(x), read_address(x), x._version, read_address(low), low._version, *how
