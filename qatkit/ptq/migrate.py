"""`migrate_scales`: move the outliers of an activation into the weights that read it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.graph.capture import Call, Value, capture
from qatkit.graph.kinds import module_name
from qatkit.modes import disable_quantization
from qatkit.nn.weights import Weight, weights_of
from qatkit.ptq.neighbours import silent_twin
from qatkit.ptq.report import Change, PtqReport
from qatkit.ptq.restoring import restoring
from qatkit.ptq.runs import Runs
from qatkit.quantizer import TensorQuantizer

_PARTS = frozenset({"Identity", "Split", "Slice"})


def migrate_scales(
    model: nn.Module, data: Iterable[Any], *, strength: float = 0.5, batches: int | None = None
) -> PtqReport:
    """Divide the output channels of layer norms by s and multiply the weights that read them.

    ``s = max|x|^strength / max|w|^(1 - strength)`` for each channel, so that the channels of x
    become more alike, at the cost of the weights. The float function stays. Layer norms with scale
    and bias take part whose every reader is the weight of a linear layer or of an attention. The
    ranges of the tensors between are forgotten: run `qatkit.calibrate` afterwards.

    Args:
        model: a prepared model.
        data: batches as for `qatkit.calibrate`.
        strength: how much of the difference goes to the weights, 0 <= strength <= 1.
        batches: use only so many; ``None`` for all.

    Returns:
        for each layer norm the largest channel over the median one, before and after.

    Raises:
        QatkitError: no quantizers, no data, a strength out of range, or the range of a weight is
            frozen already.

    Source: Xiao et al. 2023 (arXiv:2211.10438), SmoothQuant, equation 4.
    """
    number = isinstance(strength, int | float) and not isinstance(strength, bool)
    if not number or not 0 <= strength <= 1:
        raise QatkitError(f"migrate_scales(strength={strength!r}): give 0 <= strength <= 1")
    runs = Runs.read(model, data, batches, "migrate_scales")
    changes = []
    with restoring(model), torch.no_grad():
        for norm in _find(runs):
            layer: Any = model.get_submodule(norm.path)
            for weight in norm.weights:
                quantizer = weight.quantizer
                if quantizer.observe == "never" and quantizer.calibrated:
                    raise QatkitError(
                        f"migrate_scales: the range of {weight.path} is frozen; migrate first, "
                        "right after qatkit.prepare"
                    )
            peak = _peak(runs, layer)
            reading = torch.stack([_columns(w).abs().amax(0) for w in norm.weights]).amax(0)
            scale = peak.pow(strength) / reading.pow(1 - strength)
            usable = (peak > 0) & (reading > 0) & torch.isfinite(scale) & (scale > 0)
            scale = torch.where(usable, scale, 1.0).clamp(2.0**-24, 2.0**24)
            layer.weight.div_(scale)
            layer.bias.div_(scale)
            for weight in norm.weights:
                _columns(weight).mul_(scale)
                weight.quantizer.reset_range()
            for path in norm.quantizers:
                model.get_submodule(path).reset_range()  # type: ignore[operator]
            note = ", ".join(weight.path.rpartition("_quantizer")[0] for weight in norm.weights)
            changes.append(Change(norm.path, _spread(peak), _spread(peak / scale), note))
    return PtqReport("migrate_scales", "largest channel over the median one", tuple(changes))


@dataclass(frozen=True, eq=False)
class _Norm:
    """A layer norm, the weights that read it and the quantizers between."""

    path: str
    weights: tuple[Weight, ...]
    quantizers: tuple[str, ...]


def _find(runs: Runs) -> list[_Norm]:
    """Return the layer norms whose every reader is a known weight."""
    found = capture(silent_twin(runs.model), runs.data()[0])
    names = {id(p): name for name, p in runs.model.named_parameters()}
    weights = {
        names[id(getattr(w.owner, w.name))]: w
        for w in weights_of(runs.model)
        if id(getattr(w.owner, w.name)) in names
    }
    returned = set(found.root.results)
    norms = []
    for call in found.operators:
        layer: Any = call.module
        if call.kind != "LayerNormalization" or layer is None or module_name(layer) != "layer_norm":
            continue
        once = sum(other.name == call.name for other in found.operators) == 1
        if layer.weight is None or layer.bias is None or layer.weight.dim() != 1 or not once:
            continue
        readers: list[str] = []
        between: list[str] = []
        if _all_read(call.results[0], returned, readers, between) and readers:
            known = [weights.get(name) for name in dict.fromkeys(readers)]
            if all(weight is not None for weight in known) and _own(found.operators, readers, call):
                kept = tuple(weight for weight in known if weight is not None)
                norms.append(_Norm(call.name, kept, tuple(dict.fromkeys(between))))
    return norms


def _all_read(value: Value, returned: set[Value], readers: list[str], between: list[str]) -> bool:
    """Collect the parameters that multiply a value; tell whether nothing else reads it."""
    if value in returned or not value.consumers:
        return False
    for call in value.consumers:
        name = call.name if call.module is None else module_name(call.module)
        if call.kind == "Gemm" and name == "linear" and value is call.inputs[0]:
            parameter = _parameter_of(call.inputs[1]) if len(call.inputs) > 1 else None
            if parameter is None and call.module is not None:
                parameter = f"{call.name}.weight"
            if parameter is None:
                return False
            readers.append(parameter)
            continue
        passes = call.kind == "Identity" or (
            call.kind == "Transpose" and _keeps_last_axis(value, call)
        )
        if not passes or len(call.results) != 1:
            return False
        if isinstance(call.module, TensorQuantizer):
            between.append(call.name)
        if not _all_read(call.results[0], returned, readers, between):
            return False
    return True


def _keeps_last_axis(value: Value, call: Call) -> bool:
    """Tell whether the last axis of a value stays the last: its length is no other axis's."""
    size = value.shape[-1]
    return value.shape.count(size) == 1 and call.results[0].shape[-1] == size


def _parameter_of(value: Value) -> str | None:
    """Return the name of the parameter that a value is, or rows of which it is."""
    while value.producer is not None and value.producer.kind in _PARTS:
        if value.shape[-1] != value.producer.inputs[0].shape[-1]:
            return None
        value = value.producer.inputs[0]
    return value.name or None


def _own(operators: Iterable[Call], readers: list[str], norm: Call) -> bool:
    """Tell whether the weights read nothing else: each is used as often as the norm is read."""
    uses = [
        _parameter_of(call.inputs[1])
        for call in operators
        if call.kind == "Gemm" and len(call.inputs) > 1
    ]
    return sum(use in set(readers) for use in uses) == len(readers)


def _columns(weight: Weight) -> Tensor:
    """Return the parameter: its last axis runs over what it reads."""
    parameter: Tensor = getattr(weight.owner, weight.name)
    return parameter.detach()


def _peak(runs: Runs, layer: nn.Module) -> Tensor:
    """Return the largest magnitude of each channel of the output of a layer norm, in float."""
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, y: Tensor) -> None:
        found.append(y.detach().float().abs().flatten(0, -2).amax(0))

    handle = layer.register_forward_hook(keep)
    try:
        with disable_quantization(runs.model):
            runs.run_all()
    finally:
        handle.remove()
    return torch.stack(found).amax(0)


def _spread(peak: Tensor) -> float:
    return float(peak.max() / peak.median().clamp(min=1e-30))
