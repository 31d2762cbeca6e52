"""Run a file, or a piece of it, in ONNX Runtime, with errors of one line."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qatkit.errors import MissingExtraError, QatkitError, shorten
from qatkit.export.onnx_file import OnnxFile, read_model
from qatkit.export.pieces import Piece, read_by

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

Array = Any
"""A NumPy array."""

Pair = tuple[Mapping[str, Array], Mapping[str, Array]]
"""Tensors by name, in one run and in another."""


def read_onnx(path: str | os.PathLike[str]) -> OnnxFile:
    """Return the model in a file; its large initializers stay there."""
    try:
        import onnx  # noqa: F401
    except ImportError:
        raise MissingExtraError("onnx", "onnx") from None
    try:
        return read_model(Path(path))
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


class PieceRunner:
    """One piece of a file, ready to run with graph optimizations off.

    Large constants are given to it as inputs: ONNX Runtime would copy them more than once.

    Args:
        file: the file.
        piece: the piece.
        examples: the tensors that the piece reads in the two runs, for their types.
    """

    def __init__(self, file: OnnxFile, piece: Piece, examples: Pair) -> None:
        """Build the session."""
        try:
            import onnxruntime
        except ImportError:
            raise MissingExtraError("onnxruntime", "onnx") from None
        self._path, self._piece = file.path, piece
        proto, self._codes, self._constants = _model_of(file, piece, examples)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                _with_wide_quantizers(proto).SerializeToString(),
                options,
                providers=["CPUExecutionProvider"],
            )
        except Exception as error:
            raise _fails(self._path, error) from None

    def run(self, tensors: Mapping[str, Array]) -> tuple[dict[str, Array], list[Array]]:
        """Return what the piece makes by name, and the codes of each of its quantizers."""
        feeds = {name: tensors[name] for name in self._piece.reads} | self._constants
        makes = self._piece.makes
        try:
            results = self._session.run([*makes, *self._codes], feeds)
        except Exception as error:
            raise _fails(self._path, error) from None
        return dict(zip(makes, results, strict=False)), results[len(makes) :]


def _fails(path: Path, error: Exception) -> QatkitError:
    return QatkitError(
        f"{path}: does not run in ONNX Runtime ({shorten(str(error), 200)}); "
        "run export_onnx(verify=False) and inspect the file"
    )


def _model_of(
    file: OnnxFile, piece: Piece, examples: Pair
) -> tuple[ModelProto, list[str], dict[str, Array]]:
    """Return a piece as a model, the outputs that are codes, and the inputs that are constants."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    whole = file.model
    known = {value.name: value for value in (*whole.graph.input, *whole.graph.output)}
    read = {name for node in piece.nodes for name in read_by(node)}
    model = onnx.ModelProto(ir_version=whole.ir_version, opset_import=whole.opset_import)
    model.functions.extend(whole.functions)
    graph = model.graph
    graph.name = "piece"
    graph.node.extend(piece.nodes)
    graph.input.extend(
        known.get(name) or _value(name, *(tensors[name] for tensors in examples))
        for name in piece.reads
    )
    grids = {  # ONNX Runtime wants to know them beforehand
        name
        for node in piece.nodes
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
        for name in node.input[1:]
    }
    constants: dict[str, Array] = {}
    kinds: dict[str, int] = {}
    for tensor in whole.graph.initializer:
        if tensor.name not in read:
            continue
        kinds[tensor.name] = tensor.data_type
        if tensor.data_location != TensorProto.EXTERNAL:
            graph.initializer.append(tensor)
        elif tensor.name in grids:
            graph.initializer.append(numpy_helper.from_array(file.array(tensor), tensor.name))
        else:
            constants[tensor.name] = file.array(tensor)
            kind = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            graph.input.append(kind)
    codes = [_expose_codes(graph, q, kinds[q.input[2]]) for q, _ in piece.pairs]
    graph.output.extend(known.get(name) or onnx.ValueInfoProto(name=name) for name in piece.makes)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in codes if name not in piece.makes)
    return model, codes, constants


def _expose_codes(graph: GraphProto, q: NodeProto, kind: int) -> str:
    """Return the name of the codes that a Q makes; those of 4 bits become float32."""
    from onnx import TensorProto, helper

    if kind not in (TensorProto.INT4, TensorProto.UINT4):
        return str(q.output[0])
    name, one = f"{q.output[0]}.codes", f"{q.output[0]}.one"
    scale = next(tensor for tensor in graph.initializer if tensor.name == q.input[1])
    dims = list(scale.dims)
    ones = helper.make_tensor(one, TensorProto.FLOAT, dims, [1.0] * math.prod(dims))
    graph.initializer.append(ones)
    graph.node.append(
        helper.make_node("DequantizeLinear", [q.output[0], one, q.input[2]], [name], name)
    )
    return name


def _value(name: str, value: Any, other: Any) -> ValueInfoProto:
    """Return the type of two tensors, or lists of them, and their shape if it is the same."""
    from onnx import helper

    if isinstance(value, list):
        kind = helper.np_dtype_to_tensor_dtype(np.asarray(value[0]).dtype) if value else 1
        return helper.make_tensor_sequence_value_info(name, kind, None)
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    shape = value.shape if value.shape == other.shape else [None] * value.ndim
    return helper.make_tensor_value_info(name, kind, shape)


def _with_wide_quantizers(proto: ModelProto) -> ModelProto:
    """Return a copy whose QuantizeLinear nodes all read float32, or the model if they do.

    The QuantizeLinear of float16 in ONNX Runtime 1.23 does not round.
    """
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
