"""`equalize`: give the channels between two layers ranges that suit both (Nagel et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.functional import fold_scale
from qatkit.modes import disable_quantization
from qatkit.nn.quantized import QuantizedWeight
from qatkit.ptq.neighbours import (
    Pair,
    find_pairs,
    largest_of_inputs,
    largest_of_outputs,
    times_inputs,
)
from qatkit.ptq.norms import norms_of
from qatkit.ptq.report import Change, PtqReport
from qatkit.ptq.restoring import restoring
from qatkit.ptq.runs import Runs
from qatkit.ptq.weight_ranges import relative_error

_ENOUGH = 1e-3


def equalize(
    model: nn.Module, data: Iterable[Any], *, iterations: int = 20, batches: int | None = None
) -> PtqReport:
    """Scale channels between layers that follow each other, so that the weights of both use them.

    With ``s = sqrt(r1 / r2)``, the largest weights that make and that read a channel, the first
    layer is divided by s and the second multiplied: the float function stays. The batch norm behind
    the first layer takes the division, folded or not. What stands between may be ReLU, LeakyReLU,
    PReLU, pooling and dropout. Through ReLU6 a channel goes that never reaches 6 on the data, as
    far as it stays below 6.

    It pays most where weights have one scale per tensor. The ranges of the tensors between are
    forgotten: run `qatkit.calibrate` afterwards.

    Args:
        model: a prepared model.
        data: batches as for `qatkit.calibrate`, to find the pairs and what reaches 6.
        iterations: how often to go over all pairs at most.
        batches: use only so many; ``None`` for all.

    Returns:
        for each pair the squared error of the two quantized weights over their energy.

    Raises:
        QatkitError: no quantizers, no data, or the range of a weight is frozen already.

    Source: Nagel et al. 2019 (arXiv:1906.04721), section 4.1, equation 11.

    >>> import qatkit
    >>> x = torch.randn(4, 3, 8, 8)
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    >>> print(equalize(qatkit.prepare(net, x), [x]).changes[0].path)
    0 -> 2
    """
    whole = isinstance(iterations, int) and not isinstance(iterations, bool) and iterations >= 1
    if not whole:
        raise QatkitError(f"equalize(iterations={iterations!r}): give a positive integer")
    runs = Runs.read(model, data, batches, "equalize")
    with restoring(model):
        pairs = find_pairs(runs)
        layers = {path: _layer(model, path) for pair in pairs for path in (pair.first, pair.second)}
        for path, layer in layers.items():
            _refuse_frozen(path, layer)
        norms = norms_of(model)
        peaks = _peaks(runs, pairs, norms)
        before = {path: _error(layer) for path, layer in layers.items()}
        total = {pair: torch.ones(()) for pair in pairs}
        for _ in range(iterations):
            most = 0.0
            for pair in pairs:
                factor = _factor(layers[pair.first], layers[pair.second], norms)
                if pair.relu6:
                    factor, total[pair] = _below_six(factor, total[pair], peaks[pair])
                _apply(
                    layers[pair.first], norms.get(layers[pair.first]), factor, layers[pair.second]
                )
                most = max(most, float(factor.log().abs().max()))
            if most < _ENOUGH:
                break
        for pair in pairs:
            for path in pair.quantizers:
                model.get_submodule(path).reset_range()  # type: ignore[operator]
        for layer in layers.values():
            layer.weight_quantizer.reset_range()
        after = {path: _error(layer) for path, layer in layers.items()}
    return PtqReport(
        "equalize",
        "squared error of both weights over their energy",
        tuple(
            Change(
                str(pair),
                (before[pair.first] + before[pair.second]) / 2,
                (after[pair.first] + after[pair.second]) / 2,
                ", ".join(pair.activations),
            )
            for pair in pairs
        ),
    )


def _layer(model: nn.Module, path: str) -> QuantizedWeight:
    layer = model.get_submodule(path)
    assert isinstance(layer, QuantizedWeight)
    return layer


def _refuse_frozen(path: str, layer: QuantizedWeight) -> None:
    quantizer = layer.weight_quantizer
    if quantizer.observe == "never" and quantizer.calibrated:
        raise QatkitError(
            f"equalize: the range of {path}.weight_quantizer is frozen; equalize first, "
            "right after qatkit.prepare"
        )


def _peaks(runs: Runs, pairs: list[Pair], norms: dict[nn.Module, Any]) -> dict[Pair, Tensor]:
    """Return the largest result of each channel in front of a ReLU6, in the float model."""
    peaks: dict[Pair, Tensor] = {}
    with disable_quantization(runs.model):
        for pair in pairs:
            if not pair.relu6:
                continue
            layer = _layer(runs.model, pair.first)
            exit = norms.get(layer, layer)
            found: list[Tensor] = []
            channels = 1 - layer.weight.dim()  # the last axis behind a linear layer

            def keep(
                _: nn.Module, __: Any, y: Tensor, found: list[Tensor] = found, axis: int = channels
            ) -> None:
                found.append(y.detach().movedim(axis, 0).flatten(1).amax(1).float())

            handle = exit.register_forward_hook(keep)
            try:
                for index in range(len(runs.batches)):
                    runs.run(index)
            finally:
                handle.remove()
            peaks[pair] = torch.stack(found).amax(0)
    return peaks


def _below_six(factor: Tensor, total: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """Limit a division so that what stays below 6 still does, and leave alone what does not."""
    lowest = peak / 6.0 * (1 + 1e-3)
    wanted = torch.maximum(total * factor, lowest)
    wanted = torch.where(peak < 6.0 / (1 + 1e-3), wanted, 1.0)
    return wanted / total, wanted


def _factor(first: QuantizedWeight, second: QuantizedWeight, norms: dict[nn.Module, Any]) -> Tensor:
    """Return s, what the first layer is divided by."""
    made = largest_of_outputs(first, _folded(first, norms.get(first)))
    read = largest_of_inputs(second, _folded(second, norms.get(second)))
    usable = (made > 0) & (read > 0)
    factor = torch.where(usable, (made / read).sqrt(), 1.0)
    factor = torch.where(torch.isfinite(factor) & (factor > 0), factor, 1.0)
    return factor.clamp(2.0**-24, 2.0**24)


def _folded(layer: QuantizedWeight, norm: Any) -> Tensor:
    """Return the weight with the batch norm folded in."""
    weight = layer.weight.detach().float()
    if norm is None:
        return weight
    return weight * layer.along_output(fold_scale(norm.weight, norm.running_var, norm.eps))


def _error(layer: QuantizedWeight) -> float:
    with torch.no_grad():
        quantized = layer.quantized_weight()
    scale = layer.weight_fold_scale()
    weight = layer.weight.detach().float()
    if scale is not None:
        return relative_error(quantized * scale, weight * scale)
    return relative_error(quantized, weight)


def _apply(first: QuantizedWeight, norm: Any, factor: Tensor, second: QuantizedWeight) -> None:
    with torch.no_grad():
        if norm is not None:
            norm.weight.div_(factor)
            norm.bias.div_(factor)
        else:
            first.weight.div_(first.along_output(factor))
            if first.bias is not None:
                first.bias.div_(factor)
        second.weight.copy_(times_inputs(second, second.weight, factor))
