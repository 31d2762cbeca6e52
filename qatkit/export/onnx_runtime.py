"""Read a file and run it in ONNX Runtime, with errors of one line."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from qatkit.errors import MissingExtraError, QatkitError, shorten

if TYPE_CHECKING:
    from onnx import ModelProto

Array = Any
"""A NumPy array."""


def read_onnx(path: str | os.PathLike[str]) -> ModelProto:
    """Return the model in a file."""
    try:
        import onnx
    except ImportError:
        raise MissingExtraError("onnx", "onnx") from None
    try:
        return onnx.load(os.fspath(path))
    except FileNotFoundError:
        raise QatkitError(f"{path}: no such file; export the model first") from None
    except Exception as error:
        raise QatkitError(
            f"{path}: is no ONNX file ({shorten(str(error))}); export the model again"
        ) from None


def feeds_of(proto: ModelProto, given: list[Tensor], path: Any) -> dict[str, Array]:
    """Return the tensors of a call by the names of the graph inputs."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    names = [value.name for value in proto.graph.input if value.name not in constants]
    if len(names) != len(given):
        raise QatkitError(
            f"{path}: takes {len(names)} tensors and inputs hold {len(given)}; "
            "give the inputs it was exported with"
        )
    return {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)}


def run_onnx(proto: ModelProto, feeds: dict[str, Array], path: Any) -> list[Array]:
    """Run a model in ONNX Runtime with graph optimizations off.

    A QuantizeLinear of float16 runs as one of float32: that of ONNX Runtime 1.23 does not round.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("onnxruntime", "onnx") from None
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            _with_wide_quantizers(proto).SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
        )
        return list(session.run(None, feeds))
    except Exception as error:
        raise QatkitError(
            f"{path}: does not run in ONNX Runtime ({shorten(str(error), 200)}); "
            "run export_onnx(verify=False) and inspect the file"
        ) from None


def _with_wide_quantizers(proto: ModelProto) -> ModelProto:
    """Return a copy whose QuantizeLinear nodes all read float32, or the model if they do."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    scales = {t.name: t for t in proto.graph.initializer if t.data_type == TensorProto.FLOAT16}
    if not scales:
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.node[:]
    for given in proto.graph.node:
        node = copy.graph.node.add()
        node.CopyFrom(given)
        if node.op_type == "QuantizeLinear" and node.input[1] in scales:
            data, wide = node.input[0], f"{node.output[0]}/wide"
            scale = numpy_helper.to_array(scales[node.input[1]]).astype(np.float32)
            copy.graph.initializer.append(numpy_helper.from_array(scale, f"{wide}/scale"))
            node.input[0], node.input[1] = wide, f"{wide}/scale"
            reader = onnx.NodeProto()
            reader.CopyFrom(node)
            node.CopyFrom(helper.make_node("Cast", [data], [wide], wide, to=TensorProto.FLOAT))
            copy.graph.node.append(reader)
    return copy
