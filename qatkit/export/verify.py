"""`verify_onnx`: does ONNX Runtime compute, from the file, the integers that the model computes?"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from qatkit.errors import QatkitError, shorten
from qatkit.export.inputs import to_cpu_float32
from qatkit.export.lowering import folded_layers
from qatkit.export.onnx_runtime import Array, feeds_of, read_onnx, run_onnx
from qatkit.export.qdq import SUFFIX_DQ
from qatkit.export.teacher_forcing import run_forced, selects, watch
from qatkit.export.verify_report import QuantizerCheck, VerifyReport
from qatkit.graph.capture import split_inputs
from qatkit.graph.structure import tensors
from qatkit.modes import require_module

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


def verify_onnx(path: str | os.PathLike[str], model: nn.Module, inputs: Any) -> VerifyReport:
    """Compare a file written by `export_onnx` with the model, in ONNX Runtime.

    Graph optimizations are off. Each quantizer is compared by itself: ONNX Runtime gets the model's
    own quantized tensors as the inputs of every layer (teacher forcing), so that one rounding does
    not spread. Then both run end to end.

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
    proto = read_onnx(path)
    clone = copy.deepcopy(model).eval().float().cpu()
    args, kwargs = split_inputs(inputs)
    args, kwargs = to_cpu_float32(args), to_cpu_float32(kwargs)
    with torch.no_grad(), watch(clone) as seen, _one_line_errors(model):
        outputs = [tensor.numpy() for tensor in tensors(clone(*args, **kwargs))]
    feeds = feeds_of(proto, tensors((args, kwargs)), path)
    forced = run_forced(proto, seen, feeds, path)
    end_to_end = run_onnx(proto, feeds, path)
    if len(end_to_end) != len(outputs):
        raise QatkitError(
            f"{path}: has {len(end_to_end)} outputs and the model {len(outputs)}; "
            "verify with the model it was exported from"
        )
    difference = _Difference(outputs, end_to_end)
    return VerifyReport(
        quantizers=(*(_compare(*codes) for codes in forced.codes), *_weights(proto, clone)),
        outputs=difference.count,
        max_difference=difference.largest,
        relative_difference=difference.relative,
        last_layers=None if selects(proto) else _Difference(outputs, forced.outputs).relative,
        top1_agreement=_top1_agreement(outputs, end_to_end),
    )


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


def _weights(proto: ModelProto, model: nn.Module) -> list[QuantizerCheck]:
    """Compare the codes that an engine gets from each weight with the model's."""
    from onnx import numpy_helper

    arrays = {tensor.name: tensor for tensor in proto.graph.initializer}
    expected = {f"{path}.weight_quantizer": layer for path, layer in folded_layers(model).items()}
    made_by = {node.output[0]: node for node in proto.graph.node}
    checks = []
    for node in proto.graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        name = node.name.removesuffix(SUFFIX_DQ).partition("#")[0]
        if name not in expected or expected[name].codes is None:
            continue
        codes_of = expected[name].codes
        assert codes_of is not None
        source = made_by.get(node.input[0])
        codes = (
            numpy_helper.to_array(arrays[node.input[0]])
            if source is None
            else _quantize(source, arrays)
        )
        wanted = codes_of.numpy()
        if any(_reads_transposed(reader, node.output[0]) for reader in proto.graph.node):
            wanted = wanted.T
        checks.append(_compare(name, wanted, codes))
    return checks


def _reads_transposed(reader: NodeProto, weight: str) -> bool:
    """Tell whether a node reads ``weight`` as (C_in, C_out), the other way than a linear layer."""
    if weight not in reader.input:
        return False
    swapped = any(attribute.name == "transB" and attribute.i for attribute in reader.attribute)
    return reader.op_type == "MatMul" or (reader.op_type == "Gemm" and not swapped)


def _quantize(node: NodeProto, arrays: dict[str, Any]) -> Array:
    """Do what QuantizeLinear does to a constant."""
    from onnx import numpy_helper

    data, scale = (numpy_helper.to_array(arrays[name]) for name in node.input[:2])
    axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
    if scale.ndim:
        scale = scale.reshape([-1 if d == axis % data.ndim else 1 for d in range(data.ndim)])
    return np.clip(np.rint(data / scale), -128, 127).astype(np.int8)


def _compare(name: str, expected: Array, found: Array) -> QuantizerCheck:
    if expected.shape != found.shape:
        raise QatkitError(
            f"{name}: is {found.shape} in the file and {expected.shape} in the model; "
            "verify with the model it was exported from"
        )
    step = np.abs(expected.astype(np.int64) - found.astype(np.int64))
    largest = int(step.max()) if step.size else 0
    return QuantizerCheck(name, int(step.size), int(np.count_nonzero(step)), largest)


class _Difference:
    """How far two lists of outputs differ; outputs of another shape count as wholly different."""

    def __init__(self, expected: list[Array], found: list[Array]) -> None:
        self.count, self.largest = 0, 0.0
        error = size = 0.0
        for a, b in zip(expected, found, strict=True):
            wide = a.astype(np.float64)
            gap = np.abs(wide - b) if a.shape == b.shape else np.abs(wide)
            self.count += a.size
            self.largest = max(self.largest, float(gap.max(initial=0.0)))
            error, size = error + float((gap**2).sum()), size + float((wide**2).sum())
        self.relative = (error / size) ** 0.5 if size else float(error > 0)


def _top1_agreement(expected: list[Array], found: list[Array]) -> float:
    """Return the share of equal arg-max over axis 1 of the first output, 1.0 where it has none."""
    one, other = expected[0], found[0]
    if one.ndim < 2 or one.shape != other.shape or not one.size:
        return 1.0
    return float(np.mean(one.argmax(1) == other.argmax(1)))
