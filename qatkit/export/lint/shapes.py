"""Shape inference for the lint: quick, best effort, without the weights."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, TypeProto

logger = logging.getLogger(__name__)

Shape = tuple[int | None, ...]

# A larger initializer never is a shape, so shape inference can do without its values.
SHAPE_TENSOR_SIZE = 4096


def infer_shapes(model: ModelProto) -> GraphProto:
    """Return the main graph with inferred shapes, or as it is where inference fails.

    It runs on a copy without the weights, which is quick and has no 2 GB limit.
    """
    import onnx

    light = onnx.ModelProto(ir_version=max(model.ir_version, 4))
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    graph = light.graph
    graph.name = model.graph.name or "graph"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    graph.value_info.extend(model.graph.value_info)
    known = {value.name for value in graph.input}
    for tensor in model.graph.initializer:
        small = int(np.prod(tensor.dims, dtype=np.int64)) <= SHAPE_TENSOR_SIZE
        if small and tensor.data_location != onnx.TensorProto.EXTERNAL:
            graph.initializer.append(tensor)
        elif tensor.name not in known:
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            graph.input.append(info)
    try:
        return onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    except Exception as error:  # protobuf, C++ and onnx errors share no base class
        logger.debug("shape inference failed: %s", error)
        return graph


def shape_of(type_proto: TypeProto) -> Shape | None:
    """Return the shape of a tensor type, ``None`` for an unknown rank or another type."""
    tensor = type_proto.tensor_type
    if not type_proto.HasField("tensor_type") or not tensor.HasField("shape"):
        return None
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)
