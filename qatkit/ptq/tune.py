"""`tune`: choose the range of each activation by what it does to the operator that reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.functional import fake_quantize, qparams
from qatkit.graph.structure import tensors
from qatkit.modes import disable_quantization, quantizers
from qatkit.nn.quantized import QuantizedComposite, QuantizedInput
from qatkit.prepare import weight_quantizers
from qatkit.progress import progress_bar
from qatkit.ptq.report import Change, PtqReport
from qatkit.ptq.restoring import restoring
from qatkit.ptq.runs import Runs
from qatkit.quantizer import TensorQuantizer
from qatkit.spec import suggest

METRICS = ("euclidean", "cosine", "sqnr")


def tune(
    model: nn.Module,
    data: Iterable[Any],
    metric: Literal["euclidean", "cosine", "sqnr"] = "euclidean",
    *,
    candidates: int = 20,
    batches: int | None = None,
    progress: bool = True,
) -> PtqReport:
    """Search the threshold of each activation whose reader changes its output least.

    For each tensor some thresholds evenly between that of the calibrator ``kld`` and the largest
    magnitude are tried (with fewer than 8 bits from that of ``mse`` if it is lower), and the one at
    hand: the layer that reads the tensor runs on it quantized, its weight quantized too, and on the
    exact one in float. The threshold with the least distance wins; of several readers the one that
    needs the largest does. Of a tensor that is no layer's input (the operand of an addition or of a
    product) its own distance decides.

    Args:
        model: a prepared model, calibrated or not.
        data: batches as for `qatkit.calibrate`.
        metric: ``euclidean``: mean length of the error of a batch; ``cosine``: one minus the
            cosine of the angle; ``sqnr``: energy of the error over that of the output.
        candidates: how many thresholds to try, 2 or more.
        batches: use only so many; ``None`` for all.
        progress: show a progress bar if tqdm is installed and the output is a terminal.

    Returns:
        the distance of each tensor's readers, before with the range that it had; NaN without.

    Raises:
        QatkitError: no quantizers, no data, no such metric, or too few candidates.

    Source: tpu-mlir, auto-tune of its calibration.

    >>> import qatkit
    >>> x = torch.randn(64, 8)
    >>> net = qatkit.prepare(nn.Sequential(nn.Linear(8, 4)), x)
    >>> change = tune(net, [x], progress=False).changes[0]
    >>> change.path, net[0].input_quantizer.calibrated
    ('0.input_quantizer', True)
    """
    if metric not in METRICS:
        raise QatkitError(f"tune(metric={metric!r}): {suggest(str(metric), METRICS)}")
    if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 2:
        raise QatkitError(f"tune(candidates={candidates!r}): give 2 or more")
    runs = Runs.read(model, data, batches, "tune")
    weights = {id(each) for each in weight_quantizers(model).values()}
    chosen = {
        path: each
        for path, each in quantizers(model)
        if id(each) not in weights and each.quantize and not each.spec.per_channel
    }
    changes = []
    with restoring(model), torch.no_grad():
        order = [path for path in _in_order(runs, chosen) if chosen[path].spec.observer != "fixed"]
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for path in progress_bar(order, "tuning", "tensor", progress):
            best, change = _search(runs, path, chosen[path], metric, candidates)
            changes.append(change)
            if best is not None:
                found[path] = best
        for path, ends in found.items():  # at the end: searches read the ranges that were there
            chosen[path].set_range(*ends)
    measure = {
        "euclidean": "mean length of the error of the reader's output",
        "cosine": "1 - cosine of the reader's output",
        "sqnr": "energy of the error of the reader's output over its energy",
    }[metric]
    return PtqReport("tune", measure, tuple(changes))


Operator = Callable[[Tensor], Tensor]


def _search(
    runs: Runs, path: str, quantizer: TensorQuantizer, metric: str, candidates: int
) -> tuple[tuple[Tensor, Tensor] | None, Change]:
    from qatkit.observers.calibrators import Collector

    spec = quantizer.spec
    seen = _tensors_of(runs, quantizer)
    low = min((float(x.amin()) for x in seen if x.numel()), default=0.0)
    high = max((float(x.amax()) for x in seen if x.numel()), default=0.0)
    top = max(-low, high) if spec.signed or not spec.symmetric else high
    if not (top > 0 and math.isfinite(top)):
        return None, Change(path, math.nan, math.nan, "left: saw nothing but zeros")
    starts = []
    for method in ("kld", "mse") if spec.num_bits < 8 else ("kld",):
        collector = Collector(method, spec)
        for x in seen:
            collector.add(x)
        starts.append(max(map(abs, collector.range())))
    first = min(min(starts), top)
    steps = [first + (top - first) * i / (candidates - 1) for i in range(candidates)]
    ends = [_ends(t, low, high) for t in dict.fromkeys(steps)]
    if quantizer.calibrated:
        ends.insert(0, quantizer.range)
    readers = _readers(runs.model, quantizer)
    distances = [
        _distances(runs.model, quantizer, seen, reader, ends, metric) for reader in readers
    ]
    best = [min(range(len(ends)), key=each.__getitem__) for each in distances]
    widest = max(best, key=lambda i: float(ends[i][1] - ends[i][0]))
    mean = [sum(each[i] for each in distances) / len(distances) for i in range(len(ends))]
    before = mean[0] if quantizer.calibrated else math.nan
    note = "tensor" if readers == [None] else f"{len(readers)} readers" if readers[1:] else ""
    return ends[widest], Change(path, before, mean[widest], note)


def _ends(threshold: float, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return the range that is cut at a threshold on both sides of zero."""
    return torch.tensor(min(0.0, max(low, -threshold))), torch.tensor(
        max(0.0, min(high, threshold))
    )


def _distances(
    model: nn.Module,
    quantizer: TensorQuantizer,
    seen: list[Tensor],
    reader: QuantizedInput | None,
    ends: list[tuple[Tensor, Tensor]],
    metric: str,
) -> list[float]:
    """Return the distance of the output of a reader for each range."""
    spec = quantizer.spec
    sums = [0.0] * len(ends)
    for x in seen:
        with disable_quantization(model):
            wanted = x if reader is None else reader(x)
        for index, (low, high) in enumerate(ends):
            scale, zero_point = qparams(low.to(x.device), high.to(x.device), spec)
            y = fake_quantize(x, scale, zero_point, spec.quant_min, spec.quant_max)
            if reader is not None:
                with _passing(quantizer):
                    y = reader(y)
            sums[index] += _distance(y, wanted, metric)
    return [total / len(seen) for total in sums]


def _distance(found: Tensor, wanted: Tensor, metric: str) -> float:
    a, b = found.double().flatten(), wanted.double().flatten()
    if metric == "euclidean":
        return float((a - b).norm())
    if metric == "sqnr":
        return float((a - b).square().sum() / b.square().sum().clamp(min=1e-300))
    return 1.0 - float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))


@contextmanager
def _passing(quantizer: TensorQuantizer) -> Iterator[None]:
    """Let a quantizer pass its input, which has been quantized."""
    before = quantizer.quantize
    quantizer.quantize = False
    try:
        yield
    finally:
        quantizer.quantize = before


def _readers(model: nn.Module, quantizer: TensorQuantizer) -> list[QuantizedInput | None]:
    """Return the layers whose input a quantizer is, ``[None]`` if it is no layer's alone."""
    found = [
        module
        for module in model.modules()
        if isinstance(module, QuantizedInput)
        and not isinstance(module, QuantizedComposite)
        and module._modules.get("input_quantizer") is quantizer
    ]
    return list(found) or [None]


def _in_order(runs: Runs, chosen: dict[str, TensorQuantizer]) -> list[str]:
    """Return the paths of the quantizers that run, in order."""
    order: dict[str, None] = {}
    handles = []
    for path, quantizer in chosen.items():

        def note(_: nn.Module, __: Any, path: str = path) -> None:
            order.setdefault(path)

        handles.append(quantizer.register_forward_pre_hook(note))
    try:
        with disable_quantization(runs.model):
            runs.run(0)
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


def _tensors_of(runs: Runs, quantizer: TensorQuantizer) -> list[Tensor]:
    """Return what a quantizer gets in the float model, one tensor for each of its calls."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.extend(x.detach().clone() for x in tensors(args)[:1])

    handle = quantizer.register_forward_pre_hook(keep)
    try:
        with disable_quantization(runs.model):
            runs.run_all()
    finally:
        handle.remove()
    return [x for x in seen if x.numel()]
