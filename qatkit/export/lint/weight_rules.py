"""Rules on quantized weights: granularity and axis (F2, F2b), codes (F3), storage form (F19)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from qatkit.backend import Backend
from qatkit.export.lint.finding import Finding
from qatkit.export.lint.graph_view import GraphView, Node
from qatkit.export.lint.rule import Rule
from qatkit.export.lint.shapes import Shape
from qatkit.export.lint.walks import (
    dq_behind,
    quantized_shape,
    scale_of,
    weight_input,
    weighted_nodes,
)

# Copies that keep the order of the axes, though not every value.
SAME_AXES = frozenset({"Identity", "Cast", "Dropout", "Split", "Slice", "Gather", "Pad", "Concat"})


def weight_quantizer(view: GraphView, node: Node, backend: Backend) -> tuple[int, Node] | None:
    """Return the input index of the constant weight of ``node`` and its DequantizeLinear."""
    index = weight_input(view, node)
    dequantize = dq_behind(view, node.input(index), backend) if index is not None else None
    return None if index is None or dequantize is None else (index, dequantize)


def output_axis(view: GraphView, node: Node, index: int) -> int | None:
    """Return the output-channel axis of the weight as the operator reads it, ``None`` if none.

    Conv ``(O, I/g, kH, kW)``: 0; ConvTranspose ``(I, O/g, kH, kW)``: 1; Gemm: 0 with transB,
    else 1; MatMul ``[.., K, N]``: the last, and the last but one for a weight on the left.
    """
    rank = len(view.shape(node.input(index)) or ())
    if node.op == "Gemm":
        return 0 if node.attribute("transB", 0) else 1
    if node.op == "MatMul":
        return None if rank < 2 else rank - 1 if index == 1 else rank - 2
    return 0 if node.op == "Conv" else 1


def axis_at(view: GraphView, tensor: str, stop: Node, axis: int) -> int | None:
    """Follow ``axis`` of ``tensor`` back to the output of ``stop``; ``None`` where it is lost."""
    node = view.producer(tensor)
    while node is not None and node is not stop:
        before, after = view.shape(node.input(0)), view.shape(node.output)
        if node.op == "Transpose":
            rank = len(after or before or ())
            perm = node.attribute("perm") or list(range(rank))[::-1]
            if not 0 <= axis < len(perm):
                return None
            axis = perm[axis]
        elif before != after and not (
            node.op in SAME_AXES and len(before or ()) == len(after or ())
        ):
            moved = _axis_in_front(before, after, axis)
            if moved is None:
                return None
            axis = moved
        node = view.producer(node.input(0))
    return axis


def _axis_in_front(before: Shape | None, after: Shape | None, axis: int) -> int | None:
    """Return where ``axis`` lies in front of a reshape that keeps it in one piece."""
    if before is None or after is None or None in before or None in after or axis >= len(after):
        return None
    sizes = [size or 0 for size in before]
    wanted = (math.prod(size or 0 for size in after[:axis]), after[axis])
    for index, size in enumerate(sizes):
        if (math.prod(sizes[:index]), size) == wanted:
            return index
    return None


def check_granularity(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F2: weights per-channel along their output channels."""
    for node in weighted_nodes(view, backend):
        found = weight_quantizer(view, node, backend)
        if found is None or backend.axis_of_weight.get(node.op) is None:
            continue
        index, dequantize = found
        shape, scale = view.shape(node.input(index)), scale_of(view, dequantize)
        axis = output_axis(view, node, index)
        if axis is None or scale is None or dequantize.attribute("block_size", 0):
            continue
        channels = shape[axis] if shape is not None and axis < len(shape) else None
        if scale.size == 1:
            if channels != 1:
                text = f"{node.op} weight is quantized per-tensor"
                remedy = "quantize it per output channel"
                yield Finding("F2", "WARN", node.name, text, remedy=remedy)
            continue
        wanted = axis_at(view, node.input(index), dequantize, axis)
        data = quantized_shape(view, dequantize)
        written = dequantize.attribute("axis", 1)
        written += len(data) if written < 0 and data is not None else 0
        wrong_axis = wanted is not None and written != wanted and (data is not None or written >= 0)
        lost = wanted is None and channels is not None and scale.size != channels
        if wrong_axis or lost:
            expected = f"axis {wanted}" if wanted is not None else f"{channels} output channels"
            text = f"{node.op} weight has {scale.size} scales along axis {written}, not {expected}"
            remedy = "quantize it along its output channels"
            yield Finding("F2", "WARN", node.name, text, remedy=remedy)


def check_transposed(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F2b: ConvTranspose weights per-tensor, as the per-channel axis is contested."""
    for node in weighted_nodes(view, backend):
        found = weight_quantizer(view, node, backend)
        if found is None or backend.axis_of_weight.get(node.op) is not None:
            continue
        scale = scale_of(view, found[1])
        if scale is not None and scale.size > 1:
            axis = found[1].attribute("axis", 1)
            text = f"{node.op} weight is per-channel along axis {axis}, a contested axis"
            remedy = "quantize it per-tensor, or check the engine's output"
            yield Finding("F2b", "WARN", node.name, text, remedy=remedy)


def check_clips(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F3: no Clip on the codes in front of a DequantizeLinear."""
    for node in view.nodes:
        clip = view.producer(node.input(0)) if node.is_dq else None
        if clip is not None and clip.op == "Clip":
            text = f"Clip {clip.name!r} between the codes and DequantizeLinear"
            remedy = "keep codes within +-127 by scale = amax / 127, without a Clip"
            yield Finding("F3", "WARN", node.name, text, remedy=remedy)


def check_codes(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F3: weight codes stay within +-127."""
    for node in view.nodes:
        shape = quantized_shape(view, node) if node.is_dq else None
        if shape is None or len(shape) < 2 or not view.is_constant(node.input(0)):
            continue
        count = _lowest_codes(view, node)
        if count:
            text = f"{count} weight codes are -128"
            remedy = "use scale = amax / 127"
            yield Finding("F3", "INFO", node.name, text, remedy=remedy)


def _lowest_codes(view: GraphView, dequantize: Node) -> int:
    """Return how many int8 codes are -128: ``x / scale <= -127.5``, rounded half to even."""
    codes = view.array(dequantize.input(0))
    if codes is not None:
        return int(np.count_nonzero(codes == -128)) if codes.dtype == np.int8 else 0
    quantize = view.producer(dequantize.input(0))
    if quantize is None or not quantize.is_q or view.dtype(quantize.input(2)) != "int8":
        return 0
    weight, scale = view.array(quantize.input(0)), scale_of(view, quantize)
    if weight is None or scale is None or not np.all(scale > 0):
        return 0
    limit: np.ndarray[Any, Any] = (-127.5 * scale).astype(np.float32)
    if scale.size > 1:
        axis = quantize.attribute("axis", 1)
        if not -weight.ndim <= axis < weight.ndim or weight.shape[axis] != scale.size:
            return 0
        limit = limit.reshape([-1 if i == axis % weight.ndim else 1 for i in range(weight.ndim)])
    return int(np.count_nonzero(weight <= limit))


def check_storage(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F19: one storage form of weights in one file."""
    forms: dict[str, int] = {"float weight -> Q -> DQ": 0, "int8 weight -> DQ": 0}
    for node in weighted_nodes(view, backend):
        found = weight_quantizer(view, node, backend)
        if found is not None:
            source = view.producer(found[1].input(0))
            forms[list(forms)[0 if source is not None and source.is_q else 1]] += 1
    if all(forms.values()):
        text = " and ".join(f"{count} x {form}" for form, count in forms.items())
        remedy = "both forms are accepted, one is easier to read"
        yield Finding("F19", "INFO", view.name, text, remedy=remedy)


WEIGHT_RULES = (
    Rule("F2", "weights per output channel", "[D] TensorRT, Q/DQ placement", check_granularity),
    Rule("F2b", "ConvTranspose per-tensor", "[T] modelopt: axis 1 -> 0 -> 1", check_transposed),
    Rule("F3", "no Clip on codes", "[C] NvInfer.h, IQuantizeLayer", check_clips),
    Rule("F3", "weight codes within +-127", "[C] NvInfer.h, IQuantizeLayer", check_codes),
    Rule("F19", "one storage form", "[D] TensorRT, Q/DQ weights", check_storage),
)
