"""`sensitivity`: which layers of a prepared model lose most by quantization."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

from torch import nn

from qatkit.analysis.output_error import Reference
from qatkit.analysis.parts import Part, parts_of
from qatkit.analysis.probing import Probe, probing
from qatkit.analysis.sensitivity_report import (
    Mode,
    PartSensitivity,
    Quality,
    Sensitivity,
    difference,
    loss_of,
)
from qatkit.errors import QatkitError
from qatkit.progress import progress_bar
from qatkit.spec import suggest

Metric = Literal["sqnr", "kl"] | Callable[[nn.Module, list[Any]], float]

_VERB = "sensitivity"


def sensitivity(
    model: nn.Module,
    data: Iterable[Any],
    *,
    mode: Mode = "leave-one-out",
    metric: Metric = "sqnr",
    batches: int | None = None,
    class_axis: int = 1,
    progress: bool = True,
) -> Sensitivity:
    """Measure how much each layer of a calibrated model loses by quantization.

    A row is a layer with its weights and inputs, a pool, or the operands of one function such as a
    residual addition. ``"leave-one-out"`` quantizes everything but one of them,
    ``"one-at-a-time"`` only one of them. An input that several layers share is one quantizer, and
    is switched with each of them. What is switched off stays off and is no row.

    The model runs in eval mode without gradients, once for each row and three times in all besides,
    each time with the same random numbers. Switches, training flags, ranges and random numbers are
    afterwards as before, also after an error.

    Args:
        model: a prepared and calibrated model.
        data: yields batches, as for `qatkit.calibrate`; they are kept in memory.
        mode: ``"leave-one-out"`` or ``"one-at-a-time"``.
        metric: what decides. ``"sqnr"``: signal to quantization noise of the outputs, ``"kl"``:
            divergence of their softmax; both are in the table. Or a function of the model and the
            list of batches that returns a score, the higher the better; outputs are then not
            compared, so that they may have any form.
        batches: use only so many; ``None`` for all.
        class_axis: the axis of the outputs that runs over classes, for the divergence.
        progress: show a progress bar if tqdm is installed and the output is a terminal.

    Returns:
        a frozen `Sensitivity`: print it, or take ``rules(n)`` for the config of a float model.

    Raises:
        QatkitError: the model is not prepared or not calibrated, the data is empty, the model does
            not run on it, its outputs cannot be compared, or there is no such mode or metric.

    >>> import torch
    >>> from qatkit.nn import QuantLinear
    >>> net = nn.Sequential(QuantLinear(4, 4), QuantLinear(4, 4))
    >>> data = [torch.randn(8, 4)]
    >>> _ = net(data[0])  # ranges; or qatkit.calibrate
    >>> table = sensitivity(net, data, mode="one-at-a-time")
    >>> sorted(row.name for row in table.top(2))
    ['0', '1']
    """
    _check(mode, metric)
    parts = parts_of(model, _VERB)
    with probing(model, data, batches, _VERB) as probe:
        with probe.only(()):
            reference = None if callable(metric) else Reference(probe.outputs(), class_axis, _VERB)
            unquantized = _quality(probe, reference, metric)
        quantized = _quality(probe, reference, metric)
        name = metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")
        key = metric if isinstance(metric, str) else "score"
        if metric == "kl" and unquantized.kl is None:
            raise QatkitError(
                f"{_VERB}(metric='kl'): no output has several classes along class_axis="
                f"{class_axis}; give that axis, or metric='sqnr'"
            )
        rows = []
        for part in progress_bar(parts, _VERB, "layer", progress):
            with probe.only(_switched_on(part, mode, probe)):
                quality = _quality(probe, reference, metric)
            base = quantized if mode == "leave-one-out" else unquantized
            rows.append(PartSensitivity(part, quality, _loss(base, quality, key, mode)))
    count = len(probe.batches)
    return Sensitivity(mode, name, unquantized, quantized, tuple(rows), count)


def _switched_on(part: Part, mode: Mode, probe: Probe) -> Iterable[str]:
    if mode == "one-at-a-time":
        return part.quantizers
    return [path for path in probe.on if path not in part.quantizers]


def _quality(probe: Probe, reference: Reference | None, metric: Metric) -> Quality:
    """Return the quality of the model as it is switched."""
    if callable(metric):
        return Quality(score=probe.score(metric))
    assert reference is not None
    error = reference.error(probe.outputs())
    return Quality(error.sqnr, error.kl)


def _loss(base: Quality, quality: Quality, metric: str, mode: Mode) -> float:
    """Return what the quantization of one part costs."""
    if mode == "leave-one-out":
        return difference(loss_of(base, metric), loss_of(quality, metric))
    if metric == "sqnr":
        return loss_of(quality, metric)  # of the float model it is infinite
    return difference(loss_of(quality, metric), loss_of(base, metric))


def _check(mode: object, metric: object) -> None:
    if mode not in get_args(Mode):
        raise QatkitError(
            f"{_VERB}(mode={mode!r}): unknown mode, {suggest(str(mode), get_args(Mode))}"
        )
    if not callable(metric) and metric not in ("sqnr", "kl"):
        raise QatkitError(
            f"{_VERB}(metric={metric!r}): give 'sqnr', 'kl' or a function of (model, batches) "
            "that returns a number"
        )
