"""Values of constant tensors: read from the file, or computed by a node on constants."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from qatkit.errors import QatkitError, shorten
from qatkit.export.onnx_file import OnnxFile

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

# A node that reads larger constants is not evaluated, scales and zero points are small.
MAX_EVALUATED_SIZE = 1 << 22
# The rules look at what goes into these, and weights take long.
NOT_EVALUATED = frozenset({"QuantizeLinear", "DequantizeLinear"})


def read_tensor(tensor: TensorProto, file: OnnxFile) -> Array:
    """Return the value of an initializer.

    Raises:
        QatkitError: the value is damaged, or lies in an external data file that cannot be read.
    """
    from onnx import TensorProto

    try:
        found: Array = file.array(tensor)
        return found
    except Exception as error:  # NumPy, protobuf and onnx errors share no base class
        if tensor.data_location == TensorProto.EXTERNAL:
            what = "external data not found or not readable"
            remedy = "give the path of the file, with its external data beside it"
        else:
            what, remedy = f"damaged ({shorten(str(error), 120)})", "write the file again"
        raise QatkitError(f"tensor {tensor.name!r}: {what}: {remedy}") from None


def constant_node_value(raw: NodeProto, file: OnnxFile) -> Array | None:
    """Return the value of a Constant node, ``None`` for text and sparse values."""
    for attribute in raw.attribute:
        if attribute.name == "value":
            return read_tensor(attribute.t, file)
        if attribute.name == "value_float":
            return np.asarray(attribute.f, dtype=np.float32)
        if attribute.name == "value_floats":
            return np.asarray(attribute.floats, dtype=np.float32)
        if attribute.name == "value_int":
            return np.asarray(attribute.i, dtype=np.int64)
        if attribute.name == "value_ints":
            return np.asarray(attribute.ints, dtype=np.int64)
    return None


def evaluate(raw: NodeProto, inputs: dict[str, Array], output: str, opset: int) -> Array | None:
    """Return what a node of the standard operator set computes, ``None`` where that is unknown."""
    if any(x.size > MAX_EVALUATED_SIZE for x in inputs.values()):
        return None
    if raw.op_type == "Identity":
        return next(iter(inputs.values()), None)
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    try:
        types = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for name, x in inputs.items()
        ]
        graph = helper.make_graph(
            [raw], "constant", types, [helper.make_empty_tensor_value_info(output)]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        values = ReferenceEvaluator(model).run([output], inputs)
    except Exception as error:  # whatever the evaluator of an operator raises
        logger.debug("%s %r: not evaluated: %s", raw.op_type, output, error)
        return None
    return np.asarray(next(iter(values)))
