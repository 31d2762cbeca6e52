"""A quantized weight that serves more than one forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qatkit.kernels.cpu import Kept, kept_from, needs_gradient, straight
from qatkit.kernels.cpu.state import read_address
from qatkit.spec import QuantSpec


class Once:
    """Keeps what became of a weight, for as long as the weight and its quantizer stay as they were.

    Only of large weights, eager on the CPU: others are as fast to quantize as to keep.
    """

    def __init__(self) -> None:
        """Keep nothing yet."""
        self._key: tuple[Any, ...] | None = None
        self._kept: Kept | None = None

    def find(self, x: Tensor, spec: QuantSpec, observe: str) -> Tensor | None:
        """Return what became of ``x``, with a gradient of its own, ``None`` if it is not there.

        Args:
            x: the weight.
            spec: how it is quantized.
            observe: when its range is estimated.
        """
        if self._kept is None or not needs_gradient(x) or self._key != _key(x, spec, observe):
            return None
        return straight(x, *self._kept)

    def keep(self, x: Tensor, spec: QuantSpec, observe: str, quantized: Tensor) -> None:
        """Keep ``quantized``, which became of ``x``; without gradient nothing is kept."""
        self._key, self._kept = _key(x, spec, observe), kept_from(quantized)

    def __reduce__(self) -> tuple[type[Once], tuple[()]]:
        """Copy as one that keeps nothing: a copied quantizer has a weight of its own."""
        return Once, ()


def _key(x: Tensor, spec: QuantSpec, observe: str) -> tuple[Any, ...]:
    return id(x), read_address(x), x._version, spec, observe
