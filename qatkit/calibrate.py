"""`calibrate`: set the ranges of a prepared model by running it over data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qatkit import observers
from qatkit.calibration_report import CalibratedRange, CalibrationReport
from qatkit.errors import QatkitError
from qatkit.freeze import saved_range
from qatkit.functional import count_nonfinite
from qatkit.modes import (
    disable_quantization,
    quantizers,
    select_quantizers,
    training_flags,
)
from qatkit.prepare import weight_quantizers
from qatkit.quantizer import TensorQuantizer
from qatkit.ranks import rank
from qatkit.running import check_data, require_batches, run_over, uncompiled
from qatkit.spec import WATCHING, suggest

if TYPE_CHECKING:
    from qatkit.sharding import Seen

logger = logging.getLogger(__name__)


def methods() -> tuple[str, ...]:
    """Return the names that ``method`` can be: observers, then calibrators."""
    estimators = (name for name in WATCHING if name != "fixed")
    return tuple(dict.fromkeys([*estimators, *observers.CALIBRATORS]))


def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    batches: int | None = None,
    method: str | None = None,
    percentile: float = 99.99,
    coverage: float = 0.99,
    progress: bool = True,
) -> CalibrationReport:
    """Estimate all ranges anew from data, with the model in eval mode and unquantized.

    The model, its modes and flags are afterwards as before, but for the ranges. If anything goes
    wrong the ranges are as before too. A quantizer that no data reaches keeps its range.

    In a ``torch.distributed`` run all ranks call it, each with its own part of the data, of any
    number of batches. Ranges and report are then the same on all ranks, and those that one process
    gets from batch 0 of all ranks, batch 1 of all ranks, and so on. Where the order does not matter
    (minmax and the calibrators) any sharding of the samples gives the ranges of the whole data.
    If one rank fails, all do.

    Args:
        model: a prepared model.
        data: yields batches: tensors, (input, target) tuples or lists of which the first as many
            items are taken as the forward requires, or dicts of which the keys are taken that are
            names of the forward's arguments. Tensors are moved to the device of the model.
        batches: use only so many; ``None`` for all.
        method: how to estimate the ranges of the activations in this run, ``None`` for the observer
            of each quantizer. An observer (shrink, minmax, ema, average, channel-mean) makes the
            range of all batches out of the range of each one. A calibrator
            (`qatkit.observers.CALIBRATORS`) makes it out of a histogram of all samples, and cuts at
            the same magnitude on both sides of zero; ``sigma`` is here the calibrator, ``max`` is
            minmax. Fixed ranges stay fixed, weights keep their observer.
        percentile: for the method percentile: percent of the samples to keep, 0 < p <= 100.
        coverage: for two-pointer and its exact variant: share of the samples to keep, 0 < c <= 1.
        progress: show a progress bar if tqdm is installed and the output is a terminal.

    Returns:
        a frozen `CalibrationReport`; print it.

    Raises:
        QatkitError: the model has no quantizers, the data is empty or has no input in it, the model
            does not run on it, ``batches`` is below 1, there is no such method, a setting of it is
            out of its range, or a calibrator meets an activation with one range per channel. In a
            distributed run also: another rank failed, or the histograms of an ``-exact`` method,
            which cannot be summed.

    >>> from qatkit.nn import QuantLinear
    >>> net = nn.Sequential(QuantLinear(2, 2))
    >>> report = calibrate(net, [torch.ones(4, 2), -torch.ones(4, 2)], method="minmax")
    >>> report.samples, report.ranges[0][:3]
    (8, ('0.input_quantizer', -1.0, 1.0))
    """
    select_quantizers(model, "*", "calibrate")
    check_data(data, batches, "calibrate")
    _check_method(method)
    from qatkit.collecting import collecting
    from qatkit.observers.calibrators import Settings, check_settings
    from qatkit.sharding import ShardedRanges, failure

    check_settings(Settings(percentile=percentile, coverage=coverage), "calibrate")
    observer, calibrator = _split_method(method)
    watch = _Watch(dict(quantizers(model)))
    with ExitStack() as stack:
        stack.enter_context(watch)
        stack.enter_context(training_flags(model.modules(), False))
        stack.enter_context(disable_quantization(model))
        stack.enter_context(_observing(model, watch.quantizers, observer))
        if calibrator is not None:
            activations = _activations(model, watch.quantizers)
            stack.enter_context(collecting(activations, calibrator, percentile, coverage))
        shard = stack.enter_context(ShardedRanges(watch.quantizers))
        stack.enter_context(uncompiled())
        shown = progress and rank() == 0
        try:
            count, samples = run_over(
                model, data, batches, "calibrate", progress=shown, after_batch=shard.end_batch
            )
        except Exception as error:
            shard.exchange(failure(error))
            raise
        seen = shard.exchange(watch.seen(count, samples))
        require_batches(seen.batches, "calibrate")
        watch.nonfinite = dict(seen.nonfinite)
    return watch.report(seen.batches, seen.samples)


@contextmanager
def _observing(
    model: nn.Module, quantizers: dict[str, TensorQuantizer], method: str | None
) -> Iterator[None]:
    """Let each quantizer estimate its range on each forward, from none at first."""
    activations = set(_activations(model, quantizers).values())
    saved = [(quantizer, quantizer.observe, quantizer.spec) for quantizer in quantizers.values()]
    try:
        for quantizer, _, spec in saved:
            quantizer.reset_range()
            quantizer.observe = "always"
            if method is not None and quantizer in activations and spec.observer != "fixed":
                quantizer.spec = spec.replace(observer=method)
        yield
    finally:
        for quantizer, observe, spec in saved:
            quantizer.observe, quantizer.spec = observe, spec


def _activations(
    model: nn.Module, quantizers: dict[str, TensorQuantizer]
) -> dict[str, TensorQuantizer]:
    """Return those of the quantizers that are not of weights."""
    weights = {id(each) for each in weight_quantizers(model).values()}
    return {path: each for path, each in quantizers.items() if id(each) not in weights}


def _split_method(method: str | None) -> tuple[str | None, str | None]:
    """Return ``(observer, calibrator)``, of which one at most is a name."""
    if method == "max":
        return "minmax", None
    return (None, method) if method in observers.CALIBRATORS else (method, None)


class _Watch:
    """Sees which quantizers are reached and how many NaN and Inf they get.

    On leaving, the quantizers that saw nothing get the range back that they had before, and all of
    them do if there was an exception.
    """

    def __init__(self, quantizers: dict[str, TensorQuantizer]) -> None:
        self.quantizers = quantizers
        self._before = {path: saved_range(quantizer) for path, quantizer in quantizers.items()}
        self.nonfinite: dict[str, int] = {}
        self.unreached: tuple[str, ...] = ()
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for path, quantizer in self.quantizers.items():
            self._handles.append(quantizer.register_forward_pre_hook(self._counter(path)))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.unreached = tuple(path for path in self.quantizers if not self._has_seen(path))
        for path in self.unreached if kind is None else self.quantizers:
            self.quantizers[path].load_state_dict(self._before[path])

    def _has_seen(self, path: str) -> bool:
        """Tell whether a quantizer got a number: not only empty tensors or NaN."""
        return path in self.nonfinite and self.quantizers[path].calibrated

    def seen(self, batches: int, samples: int) -> Seen:
        """Return what this rank has seen."""
        from qatkit.sharding import Seen

        return Seen(batches, samples, self.nonfinite)

    def _counter(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            # One fast pass over tensors that are fine: their sum is finite too.
            fine = torch.isfinite(x.sum(dtype=torch.float32))
            new = 0 if fine else int(count_nonfinite(x))
            self.nonfinite[path] = self.nonfinite.get(path, 0) + new

        return count

    def report(self, batches: int, samples: int) -> CalibrationReport:
        """Return what was seen, and say in the log what is odd about it."""
        odd = tuple((path, n) for path in self.quantizers if (n := self.nonfinite.get(path)))
        reached = ((p, q) for p, q in self.quantizers.items() if p not in self.unreached)
        if odd:
            found = ", ".join(f"{path} ({count})" for path, count in odd)
            logger.warning("calibrate: ignored NaN or Inf in the input of %s", found)
        if self.unreached:
            paths = ", ".join(self.unreached)
            logger.warning("calibrate: no data reached %s; their ranges are as before", paths)
        ranges = tuple(_entry(path, quantizer) for path, quantizer in reached)
        return CalibrationReport(batches, samples, ranges, self.unreached, odd)


def _entry(path: str, quantizer: TensorQuantizer) -> CalibratedRange:
    low, high = quantizer.range
    return CalibratedRange(path, low.min().item(), high.max().item(), quantizer.scale.max().item())


def _check_method(method: str | None) -> None:
    if method is not None and not (isinstance(method, str) and method in methods()):
        raise QatkitError(
            f"calibrate(method={method!r}): unknown method, {suggest(method, methods())}"
        )
