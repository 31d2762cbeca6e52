"""`correct_bias`: take the mean of the quantization error out of each layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.nn.quantized import QuantizedWeight
from qatkit.progress import progress_bar
from qatkit.ptq.absorb import mean_behind_relu
from qatkit.ptq.neighbours import find_pairs, on_inputs
from qatkit.ptq.norms import norms_of
from qatkit.ptq.reference import reference_of
from qatkit.ptq.report import Change, PtqReport
from qatkit.ptq.restoring import restoring
from qatkit.ptq.runs import Runs
from qatkit.ptq.shifting import axes_but_channels, shift_output
from qatkit.ptq.units import Unit, find_units
from qatkit.spec import suggest

METHODS = ("empirical", "analytic")


def correct_bias(
    model: nn.Module,
    data: Iterable[Any],
    *,
    method: Literal["empirical", "analytic"] = "empirical",
    reference: nn.Module | None = None,
    batches: int | None = None,
    progress: bool = True,
) -> PtqReport:
    """Shift each output channel so that its mean is that of the float model.

    ``empirical`` measures both means on the data, layer after layer, the layers before corrected
    already. ``analytic`` needs no more than the structure: behind batch norm and ReLU the mean of
    the input is known, and with it what the rounding of the weight adds; layers with other inputs
    stay. The shift goes to the bias of the batch norm behind the layer, or to that of the layer; a
    layer with neither stays as it is.

    Args:
        model: a prepared and calibrated model.
        data: batches as for `qatkit.calibrate`.
        method: ``empirical`` or ``analytic``.
        reference: a float model with the same paths whose means are wanted; ``None`` for the model
            itself without quantization, as it is now.
        batches: use only so many; ``None`` for all.
        progress: show a progress bar if tqdm is installed and the output is a terminal.

    Returns:
        for each layer the root mean square of the difference of the channel means; of the analytic
        method, of the expected ones.

    Raises:
        QatkitError: no quantizers, no data or no such method.

    Source: Nagel et al. 2019 (arXiv:1906.04721), section 4.2 and appendix D.
    """
    if method not in METHODS:
        raise QatkitError(f"correct_bias(method={method!r}): {suggest(str(method), METHODS)}")
    runs = Runs.read(model, data, batches, "correct_bias")
    twin = reference_of(model, reference, "correct_bias")
    measure = "root mean square of the error of the channel means"
    with restoring(model):
        if method == "analytic":
            return PtqReport("correct_bias", measure, tuple(_analytic(runs, twin)))
        units = [unit for unit in find_units(runs, "layers") if _layer(unit) is not None]
        wanted = _means(runs.of(twin), [unit.of(twin) for unit in units], units)
        changes = [
            _correct(runs, unit, mean)
            for unit, mean in zip(
                progress_bar(units, "correcting", "layer", progress), wanted, strict=True
            )
        ]
    return PtqReport("correct_bias", measure, tuple(changes))


def _layer(unit: Unit) -> QuantizedWeight | None:
    layer = unit.entry
    return layer if isinstance(layer, QuantizedWeight) else None


def _correct(runs: Runs, unit: Unit, wanted: Tensor) -> Change:
    layer = _layer(unit)
    assert layer is not None
    error = wanted - _means(runs, [unit], [unit])[0]
    before = _rms(error)
    norm = unit.chain[1] if len(unit.chain) > 1 else None
    if not shift_output(layer, norm, error, behind_norm=norm is not None):
        return Change(unit.path, before, before, "left: no bias")
    return Change(unit.path, before, _rms(wanted - _means(runs, [unit], [unit])[0]))


def _means(runs: Runs, units: list[Unit], like: list[Unit]) -> list[Tensor]:
    """Return the mean of each output channel of each unit over the data, (C,) float32."""
    sums: list[Any] = [0.0] * len(units)
    counts = [0] * len(units)
    handles = []
    for index, (unit, shape) in enumerate(zip(units, like, strict=True)):
        layer = _layer(shape)
        assert layer is not None

        def add(
            _: nn.Module, __: Any, y: Tensor, index: int = index, layer: QuantizedWeight = layer
        ) -> None:
            axes = axes_but_channels(y, layer)
            total = y.detach().double()
            sums[index] = sums[index] + (total.sum(axes) if axes else total)
            counts[index] += y.numel() // len(sums[index])

        handles.append(unit.exit.register_forward_hook(add))
    try:
        if len(units) == 1:
            runs.until(units[0].exit, like[0].calls)
        else:
            for index in range(len(runs.batches)):
                runs.run(index)
    finally:
        for handle in handles:
            handle.remove()
    return [(total / max(1, n)).float() for total, n in zip(sums, counts, strict=True)]


def _analytic(runs: Runs, twin: nn.Module) -> Iterable[Change]:
    norms = norms_of(runs.model)
    for pair in find_pairs(runs):
        first, layer = (runs.model.get_submodule(p) for p in (pair.first, pair.second))
        exact: Any = twin.get_submodule(pair.second)
        assert isinstance(first, QuantizedWeight)
        assert isinstance(layer, QuantizedWeight)
        norm: Any = norms.get(first)
        if norm is None or norm.bias is None or set(pair.activations) != {"relu"}:
            continue
        mean = mean_behind_relu(norm.bias.detach().float(), norm.weight.detach().float())
        with torch.no_grad():
            error = layer.quantized_weight().float() - exact.weight.detach().float()
        shift = -on_inputs(layer, error, mean)
        before = _rms(shift)
        if shift_output(layer, norms.get(layer), shift):
            yield Change(pair.second, before, 0.0, f"behind {pair.first}")
        else:
            yield Change(pair.second, before, before, "left: no bias")


def _rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())
