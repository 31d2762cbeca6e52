"""Compare the codes of a file with those of a model, and what the file makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from qatkit.errors import QatkitError
from qatkit.export.half_precision import half_scale
from qatkit.export.onnx_file import Array, OnnxFile
from qatkit.export.qdq import SUFFIX_DQ
from qatkit.export.verify_report import QuantizerCheck

if TYPE_CHECKING:
    from onnx import NodeProto

FOUR_BITS = {"int4": (-8, 7), "uint4": (0, 15)}
"""The ends of the types that NumPy does not have, by the names that ml_dtypes gives them."""

_PART = 1 << 20
"""Numbers compared at a time."""


class Constants:
    """The constants of a file by name.

    Args:
        file: the file.
    """

    def __init__(self, file: OnnxFile) -> None:
        """Index the file."""
        self._file = file
        self._tensors = {tensor.name: tensor for tensor in file.model.graph.initializer}

    def __contains__(self, name: str) -> bool:
        """Tell whether there is such a constant."""
        return name in self._tensors

    def __getitem__(self, name: str) -> Array:
        """Return its values."""
        if name not in self._tensors:
            raise QatkitError(
                f"{name}: is not a constant, so export_onnx did not write the file; "
                "verify a file of export_onnx"
            )
        return self._file.array(self._tensors[name])


def compare_codes(
    dq: NodeProto, found: Array, expected: Array, step: Array, constants: Constants
) -> QuantizerCheck:
    """Compare the codes that go into a DequantizeLinear, and its result, with the model's codes.

    A float16 scale must be the one of the model, rounded.

    Args:
        dq: the node.
        found: the codes it gets.
        expected: the codes of the model, less the zero point.
        step: the scale of the model, in a shape that broadcasts against ``expected``.
        constants: those of the file.

    Raises:
        QatkitError: the shapes differ.
    """
    name = dq.name.removesuffix(SUFFIX_DQ)
    if expected.shape != found.shape:
        raise QatkitError(
            f"{name}: is {found.shape} in the file and {expected.shape} in the model; "
            "verify with the model it was exported from"
        )
    if constants[dq.input[1]].dtype == np.float16:
        step = half_scale(step)
    grid = (
        _spread(values, dq, found)
        for values in (constants[dq.input[1]], constants[dq.input[2]].astype(np.int64))
    )
    step, scale, zero = (np.broadcast_to(each, found.shape) for each in (step, *grid))
    differing = largest = 0
    for part in _parts(found):
        gap = _gap(*(array[part] for array in (found, expected, step, scale, zero)))
        differing += int(np.count_nonzero(gap))
        largest = max(largest, int(gap.max(initial=0)))
    return QuantizerCheck(name, int(found.size), differing, largest)


def quantized(q: NodeProto, constants: Constants) -> Array:
    """Do what a QuantizeLinear does to a constant."""
    data, scale, zero = (constants[name] for name in q.input)
    wide = zero.astype(np.int32)
    codes = np.rint(data / _spread(scale, q, data)) + _spread(wide, q, data)
    return np.clip(codes, *_ends(zero.dtype)).astype(zero.dtype)


def _ends(kind: np.dtype[Any]) -> tuple[int, int]:
    """Return the lowest and the highest number of an integer type, of 4 bits too."""
    if kind.name in FOUR_BITS:
        return FOUR_BITS[kind.name]
    return int(np.iinfo(kind).min), int(np.iinfo(kind).max)


def _gap(found: Array, expected: Array, step: Array, scale: Array, zero: Array) -> Array:
    """Return by how many steps codes, or what a DequantizeLinear makes of them, are off."""
    wide = expected.astype(np.int64)
    gap = np.abs(found.astype(np.int64) - zero - wide)
    if np.all((scale == step) & (scale > 0) & (scale < np.inf)):
        return gap
    result = (found.astype(np.float64) - zero) * scale / step.astype(np.float64)
    steps = np.rint(np.clip(np.nan_to_num(result, nan=1e9), -1e9, 1e9))
    return np.maximum(gap, np.abs(steps - wide))


def _parts(array: Array) -> Iterator[Any]:
    """Yield indices that split an array along its first axis: the float64 of a part is small."""
    if not array.ndim:
        yield ...
        return
    rows = max(1, _PART * len(array) // max(1, array.size))
    for start in range(0, len(array), rows):
        yield slice(start, start + rows)


def _spread(values: Array, node: Any, data: Array) -> Array:
    """Return a scale or a zero point in a shape that broadcasts against the data of a node."""
    if not values.ndim:
        return values
    axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
    return values.reshape([-1 if d == axis % data.ndim else 1 for d in range(data.ndim)])
