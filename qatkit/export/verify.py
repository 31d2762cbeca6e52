"""`verify_onnx`: does ONNX Runtime compute, from the file, the integers that the model computes?"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from qatkit.errors import QatkitError, shorten
from qatkit.export.codes import Constants, compare_codes, quantized
from qatkit.export.inputs import to_cpu_float32
from qatkit.export.light_copy import light_copy
from qatkit.export.lowering import quantized_weights
from qatkit.export.onnx_file import OnnxFile
from qatkit.export.onnx_runtime import Array, feeds_of, read_onnx
from qatkit.export.qdq import SUFFIX_DQ, order_of, split_rows
from qatkit.export.teacher_forcing import (
    Call,
    Forcing,
    Seen,
    not_in_model,
    quantizer_of,
    selects,
    watched,
)
from qatkit.export.verify_report import QuantizerCheck, VerifyReport
from qatkit.export.weights import fold_weight
from qatkit.graph.capture import split_inputs
from qatkit.graph.structure import tensors
from qatkit.kernels.portable import along
from qatkit.modes import require_module
from qatkit.ranks import GATHER, require_whole

if TYPE_CHECKING:
    from onnx import ModelProto


def verify_onnx(path: str | os.PathLike[str], model: nn.Module, inputs: Any) -> VerifyReport:
    """Compare a file written by `export_onnx` with the model, in ONNX Runtime.

    A float16 file is allowed the differences of float16, but for the codes of the weights. Graph
    optimizations are off. Each quantizer is compared by itself: ONNX Runtime gets the model's
    own quantized tensors as the inputs of every layer (teacher forcing), so that one rounding does
    not spread. Beside this both run end to end. The file runs in pieces while the model runs, its
    weights are read when a piece needs them, and activations are forgotten when nothing needs them
    any more: a small part of the model is in memory a second time.

    Args:
        path: the file.
        model: the prepared model that it was written from.
        inputs: what the model runs on, as for `qatkit.prepare`.

    Returns:
        a `VerifyReport`; print it, or ask for its ``ok``.

    Raises:
        MissingExtraError: onnx or onnxruntime is not installed.
        QatkitError: the file cannot be read, does not run, or was not written from this model.
    """
    require_module(model, "verify_onnx")
    require_whole(model, "verify_onnx", GATHER)
    file = read_onnx(path)
    clone = light_copy(model)
    args, kwargs = split_inputs(inputs)
    args, kwargs = to_cpu_float32(args), to_cpu_float32(kwargs)
    feeds = feeds_of(file.model, tensors((args, kwargs)), path)
    forcing = Forcing(file, feeds, set())
    outputs = _run(clone, args, kwargs, forcing)
    if forcing.surplus:
        forcing = Forcing(file, feeds, forcing.surplus)
        outputs = _run(clone, args, kwargs, forcing)
    end_to_end, forced = forcing.finish()
    if len(end_to_end) != len(outputs):
        raise QatkitError(
            f"{path}: has {len(end_to_end)} outputs and the model {len(outputs)}; "
            "verify with the model it was exported from"
        )
    difference = _Difference(outputs, end_to_end)
    checks = (*forcing.checks, *_constants(file, clone, forcing.constants))
    compared = {split_rows(check.name.partition("#")[0])[0] for check in checks}
    return VerifyReport(
        quantizers=checks,
        missing=tuple(name for name in forcing.names if name not in compared),
        outputs=difference.count,
        max_difference=difference.largest,
        relative_difference=difference.relative,
        last_layers=None if selects(file.model) else _Difference(outputs, forced).relative,
        top1_agreement=_top1_agreement(outputs, end_to_end),
        precision=_precision(file.model),
    )


def _run(model: nn.Module, args: Any, kwargs: Any, forcing: Forcing) -> list[Array]:
    """Return the outputs of the model, while ``forcing`` watches its quantizers."""
    with torch.no_grad(), watched(model, forcing), _one_line_errors(model):
        return [tensor.numpy() for tensor in tensors(model(*args, **kwargs))]


@contextmanager
def _one_line_errors(model: nn.Module) -> Iterator[None]:
    """Say in one line that the inputs are wrong."""
    try:
        yield
    except QatkitError:
        raise
    except Exception as error:
        raise QatkitError(
            f"{type(model).__name__}: does not run on the inputs ({shorten(str(error))}); "
            "give what it was prepared with"
        ) from None


def _constants(
    file: OnnxFile, model: nn.Module, calls: dict[Call, Seen]
) -> Iterator[QuantizerCheck]:
    """Compare the codes that an engine gets from each quantized constant with the model's."""
    proto, constants = file.model, Constants(file)
    weights = {pair[0].quantizer.name: pair for pair in quantized_weights(model)}
    quantizes = {q.output[0]: q for q in proto.graph.node if q.op_type == "QuantizeLinear"}
    for node in proto.graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        source = quantizes.get(node.input[0])
        data = node.input[0] if source is None else source.input[0]
        if data not in constants:
            continue
        codes = constants[data] if source is None else quantized(source, constants)
        name, rows = split_rows(node.name.removesuffix(SUFFIX_DQ).partition("#")[0])
        weight = fold_weight(*weights[name]) if name in weights else None
        if weight is None or weight.codes is None or weight.scale is None:
            call = calls.get(quantizer_of(node))
            if call is None:
                raise not_in_model(file, name)
            wanted, step = call.codes, np.broadcast_to(call.scale, call.codes.shape)
        else:
            wanted = weight.codes.numpy()
            spread = along(weight.scale, weight.codes, weight.axis)
            step = torch.as_tensor(spread).expand_as(weight.codes).numpy()
            wanted, step = wanted[rows], step[rows]
        order = order_of(node)
        if order is not None:
            wanted, step = wanted.transpose(order), step.transpose(order)
        check = compare_codes(node, codes, wanted, step, constants)
        yield dataclasses.replace(check, constant=True)


def _precision(proto: ModelProto) -> str:
    """Return the type of the scales, and so of the file; some may be float32 in a float16 file."""
    from onnx import TensorProto

    scales = {node.input[1] for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    kinds = {tensor.data_type for tensor in proto.graph.initializer if tensor.name in scales}
    return "float16" if TensorProto.FLOAT16 in kinds else "float32"


class _Difference:
    """How far two lists of outputs differ; outputs of another shape count as wholly different.

    The relative difference is that of the worst output, whatever the size of the others.
    """

    def __init__(self, expected: list[Array], found: list[Array]) -> None:
        self.count, self.largest, self.relative = 0, 0.0, 0.0
        for a, b in zip(expected, found, strict=True):
            wide = a.astype(np.float64)
            gap = np.abs(wide - b) if a.shape == b.shape else np.abs(wide)
            self.count += a.size
            self.largest = max(self.largest, float(gap.max(initial=0.0)))
            error, size = float((gap**2).sum()), float((wide**2).sum())
            relative = (error / size) ** 0.5 if size else float(error > 0)
            self.relative = max(self.relative, relative)


def _top1_agreement(expected: list[Array], found: list[Array]) -> float:
    """Return the share of equal arg-max over axis 1 of the first output, 1.0 where it has none."""
    one, other = expected[0], found[0]
    if one.ndim < 2 or one.shape != other.shape or not one.size:
        return 1.0
    return float(np.mean(one.argmax(1) == other.argmax(1)))
