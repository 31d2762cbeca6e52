"""Rules on Q/DQ that stop a fusion or leave INT8 half way: F4, F7, F11, F18."""

from __future__ import annotations

from collections.abc import Iterator

from qatkit.backend import Backend
from qatkit.export.lint.finding import Finding
from qatkit.export.lint.graph_view import GraphView, Node
from qatkit.export.lint.rule import Rule
from qatkit.export.lint.walks import (
    CONVS,
    constant_operand,
    dq_behind,
    is_quantized,
    norm_axes,
    quantizers_after,
    same_scale,
    show_scale,
    weighted_behind,
)


def pairs_behind_weighted(view: GraphView, backend: Backend) -> Iterator[tuple[Node, Node, Node]]:
    """Yield ``(weighted operator, Q on its result, reader of the DQ)``."""
    for quantize in view.nodes:
        if not quantize.is_q or view.is_constant(quantize.input(0)):
            continue
        weighted = weighted_behind(view, quantize.input(0), backend)
        if weighted is None:
            continue
        for dequantize in view.consumers(quantize.output):
            if dequantize.is_dq:
                for reader in view.consumers(dequantize.output):
                    yield weighted, quantize, reader


def check_epilogues(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F4: no Q/DQ between a weighted operator and its batch norm, bias Add or activation."""
    for weighted, quantize, reader in pairs_behind_weighted(view, backend):
        bias = reader.op == "Add" and constant_operand(view, reader) is not None
        if reader.op in backend.activations or reader.op == "BatchNormalization" or bias:
            text = f"Q/DQ between {weighted.op} {weighted.name!r} and {reader.op} {reader.name!r}"
            remedy = f"move it behind {reader.op}"
            yield Finding("F4", "WARN", quantize.name, text, remedy=remedy)


def check_smooth_activations(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F11: SiLU, HardSwish, Sigmoid and GELU stay float up to the next Q."""
    for weighted, quantize, reader in pairs_behind_weighted(view, backend):
        smooth = reader.op in backend.smooth_activations
        if reader.op in ("Div", "Mul") and constant_operand(view, reader) is not None:
            smooth = any(after.op == "Erf" for after in view.consumers(reader.output))
        if smooth:
            text = f"Q/DQ between {weighted.op} {weighted.name!r} and {reader.op} {reader.name!r}"
            remedy = "keep the activation float up to the next quantizer"
            yield Finding("F11", "WARN", quantize.name, text, remedy=remedy)
    for node in view.nodes:
        if node.op == "Mul" and not node.domain and constant_operand(view, node) is None:
            yield from _split_silu(view, node, backend)


def _split_silu(view: GraphView, node: Node, backend: Backend) -> Iterator[Finding]:
    """Find a Q inside ``x * sigmoid(x)``: a quantized gate whose input is the other operand."""
    for gate, other in ((0, 1), (1, 0)):
        dequantize = dq_behind(view, node.input(gate), backend)
        quantize = view.producer(dequantize.input(0)) if dequantize is not None else None
        sigmoid = view.producer(quantize.input(0)) if quantize is not None else None
        if quantize is None or sigmoid is None or sigmoid.op not in backend.smooth_activations:
            continue
        if _float_source(view, sigmoid.input(0)) == _float_source(view, node.input(other)):
            text = f"Q/DQ inside the activation, between {sigmoid.op} and Mul {node.name!r}"
            remedy = "keep the activation float up to the next quantizer"
            yield Finding("F11", "WARN", quantize.name, text, remedy=remedy)


def _float_source(view: GraphView, tensor: str) -> str:
    """Return the tensor that a DQ stands for, or the tensor itself."""
    dequantize = view.producer(tensor)
    if dequantize is None or not dequantize.is_dq:
        return tensor
    quantize = view.producer(dequantize.input(0))
    return quantize.input(0) if quantize is not None and quantize.is_q else tensor


def check_gates(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F11: the Mul of a squeeze-excite block has both inputs quantized."""
    for node in view.nodes if view.has_qdq else ():
        if node.op != "Mul" or node.domain or len(node.inputs) != 2:
            continue
        shapes = [view.shape(name) for name in node.inputs]
        gates = [shape is not None and len(shape) == 4 and shape[2:] == (1, 1) for shape in shapes]
        sizes = [shape is not None and len(shape) == 4 for shape in shapes]
        if gates.count(True) != 1 or not all(sizes) or constant_operand(view, node) is not None:
            continue
        flags = [is_quantized(view, name, backend) for name in node.inputs]
        if not all(flags):
            float_input = node.inputs[flags.index(False)]
            text = f"squeeze-excite Mul with float input {float_input!r}"
            level = "WARN" if any(flags) else "INFO"
            yield Finding("F11", level, node.name, text, remedy="quantize both inputs")


def check_int8_in_float_out(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F7: pooling, Add and Mul with INT8 inputs have INT8 outputs."""
    through = backend.activations | backend.smooth_activations
    for node in view.nodes:
        if node.domain or view.is_constant(node.output):
            continue
        if node.op in backend.joins:
            data = list(node.inputs[:2])
        elif node.op in backend.needs_quantized_output:
            if node.op == "ReduceMean" and not _is_spatial(view, node):
                continue
            data = [node.input(0)]
        else:
            continue
        if not all(is_quantized(view, name, backend) for name in data):
            continue
        if not quantizers_after(view, node.output, backend, through=through):
            remedy = "quantize its output for a quantized reader, else leave its input float"
            text = f"{node.op} has INT8 in and float out"
            yield Finding("F7", "WARN", node.name, text, remedy=remedy)


def _is_spatial(view: GraphView, node: Node) -> bool:
    """Return whether a ReduceMean is a pooling over H and W of (N, C, H, W)."""
    shape = view.shape(node.input(0))
    axes = norm_axes(view, node, len(shape) if shape is not None else None)
    return axes in ((2, 3), (-2, -1)) and (shape is None or len(shape) == 4)


def check_pads(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F18: no Q between Pad and Conv."""
    for node in view.nodes:
        if node.op not in CONVS or node.domain:
            continue
        dequantize = view.producer(node.input(0))
        if dequantize is None or not dequantize.is_dq:
            continue
        quantize = view.producer(dequantize.input(0))
        pad = view.producer(quantize.input(0)) if quantize is not None and quantize.is_q else None
        if quantize is not None and pad is not None and pad.op == "Pad":
            text = f"Q/DQ between Pad {pad.name!r} and {node.op} {node.name!r}"
            remedy = "quantize in front of the Pad, or use the pads of the convolution"
            yield Finding("F18", "WARN", quantize.name, text, remedy=remedy)


def check_requantization(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F18: no DQ -> Q with another scale."""
    for node in view.nodes:
        source = view.producer(node.input(0)) if node.is_q else None
        while source is not None and source.op == "Identity":
            source = view.producer(source.input(0))
        if source is None or not source.is_dq or same_scale(view, source, node) is not False:
            continue
        text = (
            f"DequantizeLinear {source.name!r} (scale {show_scale(view, source)}) feeds this "
            f"QuantizeLinear (scale {show_scale(view, node)}): a requantization"
        )
        yield Finding("F18", "WARN", node.name, text, remedy="share one quantizer")


FUSION_RULES = (
    Rule("F4", "nothing between conv and activation", "[D] TensorRT, Q/DQ fusion", check_epilogues),
    Rule("F7", "INT8 in, INT8 out", "[D] TensorRT, Q/DQ placement", check_int8_in_float_out),
    Rule("F11", "smooth activations float", "[T] modelopt placement", check_smooth_activations),
    Rule("F11", "squeeze-excite Mul", "[T] modelopt placement", check_gates),
    Rule("F18", "no Q between Pad and Conv", "[I] TensorRT maintainers", check_pads),
    Rule("F18", "no requantization", "[I] TensorRT maintainers", check_requantization),
)
