"""How the newer exporter writes the operators that need a translation of our own.

It calls a Python function for each operator, whose parameters must have the names of PyTorch's; one
without a type annotation is a tensor to it, one with a type an attribute.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qatkit.export.marker import DOMAIN, OPERATOR, marking_operator

_TYPES: dict[str, type] = {"Tensor": Tensor, "int": int, "str": str, "bool": int}


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return a translation by operator, as ``custom_translation_table`` wants it."""
    marking_operator()
    aten = torch.ops.aten
    pooling = _pooling_translation()
    return {
        torch.ops.qatkit.fake_quantize.default: _marker_translation(),
        aten.scaled_dot_product_attention.default: _attention_translation(),
        aten._native_batch_norm_legit_no_training.default: _batch_norm_translation(),
        aten._native_batch_norm_legit.no_stats: _batch_statistics_translation(),
        aten.adaptive_avg_pool1d.default: pooling,
        aten.adaptive_avg_pool2d.default: pooling,
        aten.adaptive_avg_pool3d.default: pooling,
    }


def _marker_translation() -> Callable[..., Any]:
    """Return what writes the marking operator as one node.

    Its tensors become inputs, all else attributes of the same name, as in the legacy front end.
    """
    import onnxscript

    arguments = torch.ops.qatkit.fake_quantize.default._schema.arguments
    types = {one.name: _TYPES.get(str(one.type), float) for one in arguments}
    inputs = [name for name, kind in types.items() if kind is Tensor]
    node = onnxscript.values.Op(
        onnxscript.values.Opset(DOMAIN, 1), OPERATOR, _marker_schema(types, inputs)
    )

    def fake_quantize(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        attributes = {name: value for name, value in given.items() if name not in inputs}
        return node(*(given[name] for name in inputs), **attributes)

    signature = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in types]
    )
    fake_quantize.__signature__ = signature  # type: ignore[attr-defined]
    fake_quantize.__annotations__ = {
        name: kind for name, kind in types.items() if name not in inputs
    }
    return fake_quantize


def _marker_schema(types: dict[str, type], inputs: list[str]) -> Any:
    from onnx.defs import OpSchema

    kinds = {int: OpSchema.AttrType.INT, str: OpSchema.AttrType.STRING}
    return OpSchema(
        OPERATOR,
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter(name, f"T_{name}") for name in inputs],
        outputs=[OpSchema.FormalParameter("y", "T_scale")],
        type_constraints=[
            ("T_x", ["tensor(float)", "tensor(int8)"], ""),
            ("T_scale", ["tensor(float)"], ""),
        ],
        attributes=[
            OpSchema.Attribute(name, kinds.get(kind, OpSchema.AttrType.FLOAT), "", required=True)
            for name, kind in types.items()
            if name not in inputs
        ],
    )


def _attention_translation() -> Callable[..., Any]:
    r"""Return what writes ``softmax(scale * Q K^T + mask) V`` as the legacy front end does."""
    from onnxscript import opset18

    op: Any = opset18

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: Any = None,
        enable_gqa: bool = False,
    ) -> Any:
        if enable_gqa:
            key, value = (_repeated(op, tensor, query) for tensor in (key, value))
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        rank = len(query.shape)
        swapped = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
        scores = op.MatMul(op.Mul(query, _number(op, factor)), swapped)
        if is_causal:
            length, positions = (
                op.Shape(one, start=rank - 2, end=rank - 1) for one in (query, key)
            )
            ones = op.ConstantOfShape(op.Concat(length, positions, axis=0), value=_one())
            attn_mask = op.Cast(op.Trilu(ones, upper=0), to=_onnx_type("BOOL"))
        if attn_mask is not None:
            if is_causal or attn_mask.dtype.name == "BOOL":
                low, zero = (_number(op, number) for number in (-math.inf, 0.0))
                attn_mask = op.Where(attn_mask, zero, low)
            scores = op.Add(scores, attn_mask)
        return op.MatMul(op.Softmax(scores, axis=-1), value)

    attention.__annotations__ = {
        "dropout_p": float,
        "is_causal": bool,
        "scale": float,
        "enable_gqa": bool,
    }
    return attention


def _batch_norm_translation() -> Callable[..., Any]:
    """Return what writes batch normalization by stored statistics.

    PyTorch 2.6 fails on its own way of doing it: there the operator always has three results.
    """
    from onnxscript import opset18

    op: Any = opset18

    def batch_norm(
        input: Any,
        weight: Any = None,
        bias: Any = None,
        running_mean: Any = None,
        running_var: Any = None,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Any:
        weight = _filled(op, input.shape[1], 1.0) if weight is None else weight
        bias = _filled(op, input.shape[1], 0.0) if bias is None else bias
        found = op.BatchNormalization(input, weight, bias, running_mean, running_var, epsilon=eps)
        result = found[0] if isinstance(found, Sequence) else found
        return result, op.Identity(running_mean), op.Identity(running_var)

    batch_norm.__annotations__ = {"momentum": float, "eps": float}
    return batch_norm


def _batch_statistics_translation() -> Callable[..., Any]:
    """Return what writes batch normalization by the statistics of the batch itself."""
    from onnxscript import opset18

    op: Any = opset18

    def batch_norm(
        input: Any,
        weight: Any = None,
        bias: Any = None,
        training: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Any:
        rank = len(input.shape)
        axes = op.Constant(value_ints=[0, *range(2, rank)])
        form = op.Constant(value_ints=[-1, *[1] * (rank - 2)])
        mean = op.ReduceMean(input, axes)
        centered = op.Sub(input, mean)
        variance = op.ReduceMean(op.Mul(centered, centered), axes)
        deviation = op.Sqrt(op.Add(variance, _number(op, eps)))
        result = op.Div(centered, deviation)
        if weight is not None:
            result = op.Mul(result, op.Reshape(weight, form))
        if bias is not None:
            result = op.Add(result, op.Reshape(bias, form))
        return result, mean, op.Reciprocal(deviation)

    batch_norm.__annotations__ = {"training": bool, "momentum": float, "eps": float}
    return batch_norm


def _pooling_translation() -> Callable[..., Any]:
    """Return what writes adaptive average pooling as pooling, where its windows are equal.

    PyTorch's own way is a mean, which engines do not run in INT8, and an index into the memory of
    a tensor whose channels lie last.
    """
    from onnxscript import opset18

    op: Any = opset18

    def pooling(self: Any, output_size: Any) -> Any:
        spatial, wanted = list(self.shape)[-len(output_size) :], list(output_size)
        batched = len(self.shape) > len(wanted) + 1
        x = self if batched else op.Unsqueeze(self, op.Constant(value_ints=[0]))
        if all(size == 1 for size in wanted):
            x = op.GlobalAveragePool(x)
        elif all(length % size == 0 for length, size in zip(spatial, wanted, strict=True)):
            window = [length // size for length, size in zip(spatial, wanted, strict=True)]
            x = op.AveragePool(x, kernel_shape=window, strides=window)
        else:
            for axis, (length, size) in enumerate(zip(spatial, wanted, strict=True), start=2):
                if length != size:
                    x = _averaged(op, x, _swapped(axis, len(wanted) + 2), length, size)
        return x if batched else op.Squeeze(x, op.Constant(value_ints=[0]))

    pooling.__annotations__ = {"output_size": Sequence[int]}
    return pooling


def _swapped(axis: int, rank: int) -> list[int]:
    """Return the order of axes that swaps one with the last."""
    order = [*range(rank)]
    order[axis], order[-1] = order[-1], order[axis]
    return order


def _averaged(op: Any, x: Any, order: list[int], length: int, size: int) -> Any:
    """Average along one axis over windows of unequal lengths: a product with their weights."""
    from onnx import numpy_helper

    weights = np.zeros((length, size), np.float32)
    for index in range(size):
        window = slice(index * length // size, -(-(index + 1) * length // size))
        weights[window, index] = 1 / (window.stop - window.start)
    factor = op.Constant(value=numpy_helper.from_array(weights))
    return op.Transpose(op.MatMul(op.Transpose(x, perm=order), factor), perm=order)


def _repeated(op: Any, tensor: Any, query: Any) -> Any:
    """Give each group of query heads its own copy of the head of a key or value they share."""
    times = query.shape[-3] // tensor.shape[-3]
    if times == 1:
        return tensor
    rank = len(tensor.shape)
    first, last = op.Shape(tensor, start=0, end=rank - 2), op.Shape(tensor, start=rank - 2)
    copies, one = (op.Constant(value_ints=[number]) for number in (times, -1))
    spread = op.Expand(
        op.Unsqueeze(tensor, op.Constant(value_ints=[rank - 2])),
        op.Concat(first, copies, last, axis=0),
    )
    leading = [op.Shape(tensor, start=0, end=rank - 3)] if rank > 3 else []
    return op.Reshape(spread, op.Concat(*leading, one, last, axis=0))


def _filled(op: Any, count: int, value: float) -> Any:
    return op.Constant(value_floats=[value] * count)


def _number(op: Any, value: float) -> Any:
    return op.Constant(value_float=float(value))


def _one() -> Any:
    from onnx import helper

    return helper.make_tensor("one", _onnx_type("FLOAT"), [1], [1.0])


def _onnx_type(name: str) -> int:
    from onnx import TensorProto

    return int(TensorProto.DataType.Value(name))
