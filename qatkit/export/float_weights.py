"""The ONNX pass that stores weights as floats in front of a QuantizeLinear, NVIDIA's form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from qatkit.export.graph_editor import attributes_of
from qatkit.export.qdq import SUFFIX_DQ, SUFFIX_Q

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto


def store_as_float(model: ModelProto) -> dict[str, Callable[[], Any]]:
    """Turn each int8 -> DQ of a constant into float -> Q -> DQ, in place.

    The floats lie on the grid, in the type of the scale: ``code * scale`` in float16 is at most
    ``128 * 2**-11 = 1/16`` of a step away from it, so that it gives the same code.

    Args:
        model: a Q/DQ file whose weights are codes.

    Returns:
        what makes the value of each float weight, by name: all of them take four times the memory
        of the codes, so they have only a type and dimensions here.
    """
    from onnx import NodeProto, TensorProto, helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    values: dict[str, Callable[[], Any]] = {}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            base = node.name.removesuffix(SUFFIX_DQ)
            stored, scale, zero = (constants[name] for name in node.input)
            axis = attributes_of(node)["axis"]
            name, codes = f"{base}.weight", f"{base}{SUFFIX_Q}_output"
            model.graph.initializer.append(
                TensorProto(name=name, data_type=scale.data_type, dims=stored.dims)
            )
            values[name] = partial(_dequantized, stored, scale, zero, axis)
            given = [name, node.input[1], node.input[2]]
            nodes.append(
                helper.make_node("QuantizeLinear", given, [codes], f"{base}{SUFFIX_Q}", axis=axis)
            )
            node.input[0] = codes
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return values


def _dequantized(
    stored: TensorProto, scale: TensorProto, zero: TensorProto, axis: int
) -> np.ndarray[Any, Any]:
    """Return ``(codes - zero) * scale``, rounded once."""
    from onnx import numpy_helper

    codes, step, center = (numpy_helper.to_array(tensor) for tensor in (stored, scale, zero))
    shape = [-1 if step.ndim and d == axis else 1 for d in range(codes.ndim)]
    exact = np.float64 if step.dtype == np.float16 else np.float32
    centered = codes.astype(exact)
    if center.any():
        centered -= center.reshape(shape).astype(exact)
    centered *= step.reshape(shape).astype(exact)
    result: np.ndarray[Any, Any] = centered.astype(step.dtype, copy=False)
    return result
