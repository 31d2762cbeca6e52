"""Rules on codes of fewer than 8 bits: 4-bit types on weights only, simulations (F20)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from qatkit.backend import Backend
from qatkit.export.lint.finding import Finding
from qatkit.export.lint.graph_view import GraphView, Node
from qatkit.export.lint.rule import Rule
from qatkit.export.lint.walks import dq_behind, quantizer_of, scale_of, weighted_nodes

_EXACT = 1e-3
"""In steps: how far the end of a Clip is from a code for the rounding of float32."""

_MANY = 64
"""So many codes of a weight show what its grid is."""

Array = np.ndarray[Any, Any]


def check_four_bit_activations(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F20: 4-bit integers are codes of weights, not of activations."""
    for node in weighted_nodes(view, backend):
        for tensor in node.inputs[:2]:
            dequantize = dq_behind(view, tensor, backend)
            quantize = None if dequantize is None else quantizer_of(view, dequantize)
            if quantize is None or view.is_constant(quantize.input(0)):
                continue
            kind = view.dtype(quantize.input(2))
            if kind in backend.weight_only_types:
                text = f"reads {kind} codes of activation {quantize.input(0)!r}"
                remedy = "store them as int8 behind a Clip, export_onnx(opset=20) does"
                yield Finding("F20", "WARN", node.name, text, remedy=remedy)


def check_simulated_codes(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F20: a grid of fewer than 8 bits in int8 codes runs as INT8."""
    for node in view.nodes:
        if not node.is_dq or view.dtype(node.input(2)) != "int8":
            continue
        quantize = quantizer_of(view, node)
        if quantize is None or view.is_constant(quantize.input(0)):
            ends = _ends_of_weight(view, node, quantize)
            extra = ""
        else:
            ends = _ends_of_clip(view, quantize)
            extra = ", and the Clip in front of Q as an operator of its own or in the one before"
        if ends is None or not _fit_fewer_bits(*ends):
            continue
        text = f"codes are {ends[0]}..{ends[1]} in int8: runs as INT8{extra}"
        remedy = "none needed: accuracy is that of the narrow grid, speed and memory those of INT8"
        yield Finding("F20", "INFO", node.name, text, remedy=remedy)


def _fit_fewer_bits(low: int, high: int) -> bool:
    """Tell whether 7 bits hold the codes; a constant tensor tells nothing."""
    return -64 <= low < high <= 63


def _ends_of_clip(view: GraphView, quantize: Node) -> tuple[int, int] | None:
    """Return the ends of the grid that a Clip in front of a Q keeps to, ``None`` for no grid."""
    clip = view.producer(quantize.input(0))
    scale = scale_of(view, quantize)
    if clip is None or clip.op != "Clip" or scale is None or scale.size != 1 or scale[0] <= 0:
        return None
    ends = [view.array(clip.input(index)) if clip.input(index) else None for index in (1, 2)]
    if any(end is None or end.size != 1 for end in ends):
        return None
    exact = [float(end.item()) / float(scale[0]) for end in ends if end is not None]
    low, high = (round(max(-128.0, min(127.0, end))) for end in exact)
    whole = all(abs(end - code) < _EXACT for end, code in zip(exact, (low, high), strict=True))
    full = (high + 1).bit_count() == 1 and low in (0, -high, -high - 1)
    return (low, high) if whole and full else None  # others, such as ReLU6, are no grid


def _ends_of_weight(
    view: GraphView, dequantize: Node, quantize: Node | None
) -> tuple[int, int] | None:
    """Return the lowest and highest code of a weight, ``None`` where they may be few by chance."""
    codes = view.array(dequantize.input(0)) if quantize is None else _codes_of(view, quantize)
    if codes is None or codes.ndim < 2 or codes.size < _MANY:
        return None
    return int(codes.min()), int(codes.max())


def _codes_of(view: GraphView, quantize: Node) -> Array | None:
    """Return what a Q makes of a constant."""
    weight, scale = view.array(quantize.input(0)), scale_of(view, quantize)
    if weight is None or scale is None or not np.all(scale > 0):
        return None
    if scale.size > 1:
        axis = quantize.attribute("axis", 1)
        if not -weight.ndim <= axis < weight.ndim or weight.shape[axis] != scale.size:
            return None
        shape = [-1 if i == axis % weight.ndim else 1 for i in range(weight.ndim)]
        scale = scale.reshape(shape)
    codes: Array = np.clip(np.rint(weight / scale), -128, 127)
    return codes


NARROW_RULES = (
    Rule("F20", "4 bits on weights", "[D] TensorRT, Quantized types", check_four_bit_activations),
    Rule("F20", "narrow grid in int8", "[D] TensorRT, Quantized types", check_simulated_codes),
)
