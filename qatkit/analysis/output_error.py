"""How far the outputs of a quantized model are from those of the float model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from qatkit.errors import QatkitError


class OutputError(NamedTuple):
    """The distance of all outputs for all data.

    Attributes:
        noise: energy of the error over energy of the float output, the mean over the outputs.
        kl: Kullback-Leibler divergence of the softmax of the quantized output from that of the
            float one, in nats, the mean over samples and positions, summed over the outputs;
            ``None`` if no output has classes.
    """

    noise: float
    kl: float | None

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise in dB, ``-10 log10(noise)``; ``inf`` for no error."""
        if not self.noise > 0:
            return math.inf if self.noise == 0 else -math.inf
        return -10 * math.log10(self.noise)


class Reference:
    """The outputs of the float model.

    Args:
        outputs: the tensors of each batch.
        class_axis: the axis of an output that runs over classes.
        where: who asks, for messages.

    Raises:
        QatkitError: an output is not finite.

    >>> reference = Reference([[torch.tensor([[3.0, 4.0]])]], 1, "sensitivity")
    >>> round(reference.error([[torch.tensor([[3.0, 4.5]])]]).sqnr, 6)
    20.0
    """

    def __init__(self, outputs: Iterable[list[Tensor]], class_axis: int, where: str) -> None:
        """Keep copies of the outputs."""
        self._axis, self._where = class_axis, where
        self._batches = [[each.detach().clone() for each in batch] for batch in outputs]
        for index, batch in enumerate(self._batches):
            if not all(bool(torch.isfinite(each).all()) for each in batch):
                raise QatkitError(
                    f"{where}: the float model returns NaN or Inf for batch {index}; "
                    "give data that it works on"
                )

    def error(self, outputs: Iterable[list[Tensor]]) -> OutputError:
        """Return the distance of other outputs for the same data.

        Raises:
            QatkitError: they have other shapes, as detections above a threshold may.
        """
        energies: dict[int, list[float]] = {}
        classes: dict[int, list[float]] = {}
        for number, (wanted, found) in enumerate(zip(self._batches, outputs, strict=True)):
            self._check_shapes(number, wanted, found)
            for index, (float_output, output) in enumerate(zip(wanted, found, strict=True)):
                _add(energies.setdefault(index, [0.0, 0.0]), _noise(output, float_output))
                if _has_classes(output, self._axis):
                    total = classes.setdefault(index, [0.0, 0.0])
                    _add(total, _divergence(output, float_output, self._axis))
        ratios = [_ratio(noise, signal) for noise, signal in energies.values()]
        divergences = [total / count for total, count in classes.values() if count]
        kl = max(0.0, sum(divergences)) if divergences else None
        return OutputError(sum(ratios) / len(ratios), math.inf if kl != kl else kl)

    def _check_shapes(self, number: int, wanted: list[Tensor], found: list[Tensor]) -> None:
        shapes = [[tuple(each.shape) for each in batch] for batch in (wanted, found)]
        if shapes[0] != shapes[1]:
            raise QatkitError(
                f"{self._where}: for batch {number} the float model returns the shapes "
                f"{shapes[0]} and the quantized one {shapes[1]}, so that they cannot be compared; "
                "give metric=a function of (model, batches)"
            )


def _add(totals: list[float], values: tuple[float, float]) -> None:
    for index, value in enumerate(values):
        totals[index] += value


def _noise(output: Tensor, float_output: Tensor) -> tuple[float, float]:
    """Return the energies of the error and of the float output."""
    signal = float_output.double()
    return float((output.double() - signal).square().sum()), float(signal.square().sum())


def _ratio(noise: float, signal: float) -> float:
    if not math.isfinite(noise):
        return math.inf
    if signal:
        return noise / signal
    return math.inf if noise else 0.0


def _has_classes(output: Tensor, axis: int) -> bool:
    return -output.dim() <= axis < output.dim() and output.shape[axis] > 1 and output.numel() > 0


def _divergence(output: Tensor, float_output: Tensor, axis: int) -> tuple[float, float]:
    """Return the sum of the divergences, and of how many positions."""
    log_p = torch.log_softmax(float_output.double(), axis)
    log_q = torch.log_softmax(output.double(), axis)
    total = float((log_p.exp() * (log_p - log_q)).sum())
    return total, float(output.numel() // output.shape[axis])
