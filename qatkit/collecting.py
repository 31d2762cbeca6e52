"""Histograms of the activations while a model runs, and the ranges out of them at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.observers.calibrators import Collector
from qatkit.quantizer import TensorQuantizer
from qatkit.sharding import check_mergeable, merge_over_ranks


@contextmanager
def collecting(
    quantizers: Mapping[str, TensorQuantizer], method: str, percentile: float, coverage: float
) -> Iterator[None]:
    """Count what each quantizer sees; on leaving without an exception set its range.

    In a distributed run the histograms of all ranks are summed, and all ranks have to leave it. A
    quantizer that sees nothing keeps the range it has. One with a fixed range, or one that takes
    the range of each tensor anew (``memory="latest"``), is left alone.

    Args:
        quantizers: by path; each is told not to observe, which the caller has to undo.
        method: a name in `qatkit.observers.CALIBRATORS`.
        percentile: see `qatkit.observers.histogram_threshold`.
        coverage: see there.

    Raises:
        QatkitError: a setting is out of its range, a quantizer has one range per channel, or the
            histograms of several ranks cannot be summed.
    """
    check_mergeable(method)
    collectors = {
        path: _collector(path, quantizer, method, percentile, coverage)
        for path, quantizer in quantizers.items()
        if quantizer.spec.observer != "fixed" and quantizer.spec.memory != "latest"
    }
    with ExitStack() as stack:
        for path, collector in collectors.items():
            quantizers[path].observe = "never"
            handle = quantizers[path].register_forward_pre_hook(_adding_to(collector))
            stack.callback(handle.remove)
        yield
    device = next((quantizer.num_batches.device for quantizer in quantizers.values()), None)
    if device is not None:
        merge_over_ranks(list(collectors.values()), device)
    for path, collector in collectors.items():
        if collector.batches:
            quantizers[path].set_range(*collector.range())
            # As if an observer had seen them: what training adds to the range weighs no more.
            quantizers[path].num_batches.fill_(collector.batches)


def _collector(
    path: str, quantizer: TensorQuantizer, method: str, percentile: float, coverage: float
) -> Collector:
    if quantizer.spec.per_channel:
        raise QatkitError(
            f"{path}: calibrate(method={method!r}) makes one range per tensor, the quantizer has "
            f"one per index of axis {quantizer.spec.axis}; give axis=None or method='minmax'"
        )
    return Collector(method, quantizer.spec, percentile=percentile, coverage=coverage)


def _adding_to(collector: Collector) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        collector.add(args[0])

    return add
