"""A copy of a prepared model that the ONNX exporter can read.

Its weights are folded, and a marker stands for each quantizer.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qatkit.backend import Backend
from qatkit.errors import QatkitError, shorten
from qatkit.export.light_copy import light_copy
from qatkit.export.marker import Codes, Marker
from qatkit.export.weights import FoldedLayer, fold_weight
from qatkit.modes import quantizers
from qatkit.nn.slots import quantizer_of
from qatkit.nn.weights import Weight, weights_of
from qatkit.prepare import plan_of
from qatkit.quantizer import TensorQuantizer


class Uncalibrated(nn.Module):
    """Stands for a quantizer without a range: harmless until the exported model reaches it."""

    def __init__(self, name: str) -> None:
        """Keep the name for the message."""
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Refuse."""
        raise QatkitError(
            f"{self.name}: has no range; "
            "run qatkit.calibrate(model, data), or train, before exporting"
        )


def lower(
    model: nn.Module, backend: Backend, args: tuple[Any, ...] = (), kwargs: Any = None
) -> nn.Module:
    """Return the copy, in eval mode, float32, on the CPU.

    Of a quantized weight it holds the codes as int8; the floats are those of ``model`` itself.

    Args:
        model: a prepared model.
        backend: the engine, for the types of the codes.
        args: positional arguments that it runs on.
        kwargs: keyword arguments that it runs on.

    Raises:
        QatkitError: a quantizer has a grid that the file cannot hold, or the model cannot be
            copied.
    """
    try:
        lowered = light_copy(model)
    except Exception as error:
        raise QatkitError(
            f"{type(model).__name__}: cannot be copied for export ({shorten(str(error))}); "
            "make copy.deepcopy(model) work"
        ) from None
    _name_quantizers(lowered)
    _observe_computed_weights(lowered, args, kwargs or {})
    for weight, norm in quantized_weights(lowered):
        _replace_weight(lowered, weight, fold_weight(weight, norm))
    _replace_quantizers(lowered, backend)
    return lowered


def _observe_computed_weights(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Let quantizers of weights that a forward computes remember the range of those at hand."""
    known = {id(weight.quantizer) for weight in weights_of(model)}
    computed = [
        each
        for _, each in quantizers(model)
        if each.spec.memory == "latest" and each.observe != "never" and id(each) not in known
    ]
    stale = any(weight.name not in weight.owner._parameters for weight in weights_of(model))
    if not computed and not stale:
        return
    for quantizer in computed:
        quantizer.observe = "always"
    with torch.no_grad():
        model(*args, **kwargs)
    for quantizer in computed:
        quantizer.observe = "never"


def quantized_weights(model: nn.Module) -> list[tuple[Weight, nn.Module | None]]:
    """Return each quantized weight with the batch norm behind it, ``None`` for none."""
    plan = plan_of(model)
    norms = {} if plan is None else {layer.path: layer.batch_norm for layer in plan.layers}
    found: list[tuple[Weight, nn.Module | None]] = []
    for weight in weights_of(model):
        _check_weight(weight.quantizer)
        planned = norms.get(weight.path.rpartition(".")[0])
        norm = None if weight.layer is None else weight.layer.batch_norm
        if weight.layer is not None and planned is not None:
            norm = model.get_submodule(planned)
        inside = any(norm is other for other in model.modules())
        found.append((weight, norm if inside else None))
    return found


def _replace_weight(model: nn.Module, weight: Weight, folded: FoldedLayer) -> None:
    owner, quantizer = weight.owner, weight.quantizer
    if folded.batch_norm is not None:
        _remove(model, folded.batch_norm)
    if weight.layer is not None:
        weight.layer._batch_norm = ()
        if folded.weight is not None:
            weight.layer.weight = nn.Parameter(folded.weight, requires_grad=False)
        bias = None if folded.bias is None else nn.Parameter(folded.bias, requires_grad=False)
        weight.layer.bias = bias
    stand_in: nn.Module = nn.Identity()
    if folded.codes is not None and folded.scale is not None:
        spec = quantizer.spec
        codes = Codes(spec.quant_min, spec.quant_max)
        stored = folded.codes.to(torch.int8)
        stand_in = Marker(quantizer.name, folded.scale, codes, folded.axis, stored)
    owner._modules[quantizer_of(weight.name)] = stand_in


def _remove(model: nn.Module, norm: nn.Module) -> None:
    """Put an identity in the place of a folded batch norm, under all its names.

    A subclass does more than normalize: it stays, and normalizes by 0 and 1.
    """
    if isinstance(norm, _BatchNorm) and not _only_normalizes(norm):
        _neutralize(norm)
        return
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is norm:
                module._modules[name] = nn.Identity()


def _only_normalizes(norm: _BatchNorm) -> bool:
    kind = getattr(type(norm), "float_class", type(norm))
    return kind.forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def _neutralize(norm: Any) -> None:
    size = norm.running_var.shape
    norm.running_mean, norm.running_var, norm.eps = torch.zeros(size), torch.ones(size), 0.0
    if norm.weight is not None:
        norm.weight = nn.Parameter(torch.ones(size), requires_grad=False)
        norm.bias = nn.Parameter(torch.zeros(size), requires_grad=False)


def _replace_quantizers(model: nn.Module, backend: Backend) -> None:
    """Put one marker in the place of each activation quantizer, under all its paths."""
    made: dict[int, nn.Module] = {}
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, TensorQuantizer):
                if id(child) not in made:
                    made[id(child)] = _stand_in(child, backend)
                module._modules[name] = made[id(child)]


def _stand_in(quantizer: TensorQuantizer, backend: Backend) -> nn.Module:
    if not quantizer.quantize:
        return nn.Identity()
    if not quantizer.has_range:
        return Uncalibrated(quantizer.name)
    codes = _codes(quantizer, backend)
    return Marker(quantizer.name, quantizer.scale, codes, quantizer.spec.axis)


def _codes(quantizer: TensorQuantizer, backend: Backend) -> Codes:
    """Return how a file for ``backend`` stores the codes of an activation."""
    spec = quantizer.spec
    if not spec.symmetric and (spec.per_channel or not backend.zero_point):
        what = "a zero point for each channel" if spec.per_channel else "a zero point"
        raise QatkitError(
            f"{quantizer.name}: has {what}, which {backend.name} refuses (P2); "
            "use QuantSpec(symmetric=True)"
        )
    highest = 255 if backend.unsigned_int8 and not spec.signed else 127
    if spec.quant_max > highest:
        _refuse(quantizer, highest)
    shift = 128 if spec.signed and backend.signed_codes == "uint8" else 0
    zero_point = 0 if spec.symmetric else int(quantizer.zero_point)
    unsigned = backend.signed_codes == "uint8" or (backend.unsigned_int8 and not spec.signed)
    return Codes(spec.quant_min + shift, spec.quant_max + shift, zero_point + shift, unsigned)


def _check_weight(quantizer: TensorQuantizer) -> None:
    if not quantizer.spec.symmetric:
        raise QatkitError(
            f"{quantizer.name}: has a zero point, and weights have none in the file (P2); "
            "use QuantSpec(symmetric=True)"
        )
    if quantizer.spec.quant_max > 127:
        _refuse(quantizer, 127)


def _refuse(quantizer: TensorQuantizer, highest: int) -> NoReturn:
    kind = "uint8" if highest > 127 else "int8"
    raise QatkitError(
        f"{quantizer.name}: codes up to {quantizer.spec.quant_max} do not fit {kind}, "
        "and ONNX has no wider Q/DQ there; use num_bits=8 and signed=True"
    )


def _name_quantizers(model: nn.Module) -> None:
    """Name the quantizers of layers that were built by hand."""
    for path, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and not module.name:
            module.name = path or "quantizer"
