"""Quantize the weights once for several forwards, as gradient accumulation wants it."""

from __future__ import annotations

from torch import nn

from qatkit.modes import Mode, Undo, select_quantizers
from qatkit.once import Once


def quantize_weights_once(model: nn.Module) -> Mode:
    """Quantize a weight again only when it has changed since the last forward.

    For the forwards between two steps of the optimizer. It saves the pass over each large weight,
    eager on the CPU; other weights are quantized in each forward as before. Values and gradients
    are the same. A change of a weight is noticed as autograd notices it: not one that is written
    to ``weight.data`` in place, so leave the context for that.

    Args:
        model: a prepared model.

    Returns:
        a context manager, or with ``apply()`` for good; the quantized weights are kept in memory
        until they change or the context is left.

    Raises:
        QatkitError: the model has no quantizers.

    >>> import torch
    >>> from qatkit.nn import QuantLinear
    >>> layer, x = QuantLinear(8, 4), torch.randn(3, 8)
    >>> with quantize_weights_once(layer):
    ...     for part in x.split(1):
    ...         layer(part).sum().backward()
    """
    selected = select_quantizers(model, "*", "quantize_weights_once")

    def restore(states: list[Once | None]) -> None:
        for quantizer, state in zip(selected, states, strict=True):
            quantizer.once = state

    def change() -> Undo:
        states: list[Once | None] = [quantizer.once for quantizer in selected]
        restore([Once() for _ in selected])
        return lambda: restore(states)

    return Mode(change)
