"""Compare the codes of a file with those of a model, and what the file makes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qatkit.errors import QatkitError
from qatkit.export.onnx_runtime import Array
from qatkit.export.qdq import SUFFIX_DQ
from qatkit.export.verify_report import QuantizerCheck

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


class Constants:
    """The constants of a file by name.

    Args:
        proto: the file.
    """

    def __init__(self, proto: ModelProto) -> None:
        """Index the file."""
        self._tensors = {tensor.name: tensor for tensor in proto.graph.initializer}

    def __contains__(self, name: str) -> bool:
        """Tell whether there is such a constant."""
        return name in self._tensors

    def __getitem__(self, name: str) -> Array:
        """Return its values."""
        from onnx import numpy_helper

        if name not in self._tensors:
            raise QatkitError(
                f"{name}: is not a constant, so export_onnx did not write the file; "
                "verify a file of export_onnx"
            )
        return numpy_helper.to_array(self._tensors[name])


def compare_codes(
    dq: NodeProto, found: Array, expected: Array, step: Array, constants: Constants
) -> QuantizerCheck:
    """Compare the codes that go into a DequantizeLinear, and its result, with the model's codes.

    Args:
        dq: the node.
        found: the codes it gets.
        expected: the codes of the model.
        step: the scale of the model, in a shape that broadcasts against ``expected``.
        constants: those of the file.

    Raises:
        QatkitError: the shapes differ.
    """
    name = dq.name.removesuffix(SUFFIX_DQ).replace(".T", "")
    if expected.shape != found.shape:
        raise QatkitError(
            f"{name}: is {found.shape} in the file and {expected.shape} in the model; "
            "verify with the model it was exported from"
        )
    result = np.nan_to_num(_dequantized(dq, found, constants) / step.astype(np.float64), nan=1e9)
    wide = expected.astype(np.int64)
    gap = np.maximum(np.abs(found - wide), np.abs(np.rint(np.clip(result, -1e9, 1e9)) - wide))
    largest = int(gap.max(initial=0))
    return QuantizerCheck(name, int(gap.size), int(np.count_nonzero(gap)), largest)


def quantized(q: NodeProto, constants: Constants) -> Array:
    """Do what a QuantizeLinear does to a constant."""
    data, scale, zero = (constants[name] for name in q.input)
    codes = np.rint(data / _spread(scale, q, data)) + _spread(zero, q, data)
    return np.clip(codes, -128, 127).astype(np.int8)


def _dequantized(dq: NodeProto, codes: Array, constants: Constants) -> Array:
    scale, zero = (_spread(constants[name], dq, codes) for name in dq.input[1:])
    return (codes.astype(np.float64) - zero) * scale


def _spread(values: Array, node: Any, data: Array) -> Array:
    """Return a scale or a zero point in a shape that broadcasts against the data of a node."""
    if not values.ndim:
        return values
    axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
    return values.reshape([-1 if d == axis % data.ndim else 1 for d in range(data.ndim)])
