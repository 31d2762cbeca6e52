"""Rules on Q/DQ that stop a fusion or leave INT8 half way: F4, F7, F11, F18."""

from __future__ import annotations

from collections.abc import Iterator

from qatkit.backend import Backend
from qatkit.export.lint.finding import Finding
from qatkit.export.lint.graph_view import GraphView, Node
from qatkit.export.lint.result_rules import follows_result
from qatkit.export.lint.rule import Rule
from qatkit.export.lint.walks import (
    CONVS,
    constant_operand,
    dq_behind,
    is_quantized,
    norm_axes,
    quantizer_of,
    quantizers_after,
    real_producer,
    real_readers,
    same_scale,
    show_scale,
    weighted_behind,
)

# What an activation such as x * clip(x + 3, 0, 6) / 6 is made of, besides smooth activations.
POINTWISE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Neg", "Clip", "Relu", "Exp", "Log", "Cast"}
    | {"Identity", "Dropout"}
)
MAX_ACTIVATION_SIZE = 32


def pairs_behind_weighted(view: GraphView, backend: Backend) -> Iterator[tuple[Node, Node, Node]]:
    """Yield ``(weighted operator, Q on its result, DQ)``."""
    for quantize in view.nodes:
        if not quantize.is_q or view.is_constant(quantize.input(0)):
            continue
        weighted = weighted_behind(view, quantize.input(0), backend)
        if weighted is None:
            continue
        for dequantize in real_readers(view, quantize.output):
            if dequantize.is_dq:
                yield weighted, quantize, dequantize


def check_epilogues(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F4: no Q/DQ between a weighted operator and its batch norm, bias Add or activation."""
    for weighted, quantize, dequantize in pairs_behind_weighted(view, backend):
        if gates_itself(view, dequantize.output, backend):
            continue  # F11
        for reader in real_readers(view, dequantize.output):
            if is_epilogue(view, reader, backend):
                text = f"Q/DQ between {_pair(weighted, reader)}"
                remedy = f"move it behind {reader.op}"
                yield Finding("F4", "WARN", quantize.name, text, remedy=remedy)


def _pair(first: Node, second: Node) -> str:
    return f"{first.op} {first.name!r} and {second.op} {second.name!r}"


def is_epilogue(view: GraphView, node: Node, backend: Backend) -> bool:
    """Return whether ``node`` is a batch norm, an activation or a bias."""
    if node.domain:
        return False
    if node.op in backend.activations or node.op == "BatchNormalization":
        return True
    bias_or_bound = node.op in ("Add", "Sub", "Max", "Min")
    return bias_or_bound and constant_operand(view, node) is not None


def check_smooth_activations(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F11: SiLU, HardSwish, Sigmoid and GELU stay float up to the next Q."""
    remedy = "keep the activation float up to the next quantizer"
    for weighted, quantize, dequantize in pairs_behind_weighted(view, backend):
        readers = list(real_readers(view, dequantize.output))
        found = [one for one in readers if one.op in backend.smooth_activations and not one.domain]
        if not found and gates_itself(view, dequantize.output, backend):
            found = readers
        if found:
            text = f"Q/DQ between {_pair(weighted, found[0])}"
            yield Finding("F11", "WARN", quantize.name, text, remedy=remedy)
    for node in view.nodes:
        if node.op == "Mul" and not node.domain and constant_operand(view, node) is None:
            yield from _split_gate(view, node, backend, remedy)


def gates_itself(view: GraphView, tensor: str, backend: Backend) -> bool:
    """Return whether ``tensor`` meets a smooth or clipped function of itself in a Mul.

    So it is in SiLU, Mish, HardSwish and both forms of GELU where they are written as a product.
    """
    curved = backend.smooth_activations | {"Clip"}
    reached = {tensor: False}  # to whether a curved operator lies in between
    todo = [tensor]
    while todo and len(reached) < MAX_ACTIVATION_SIZE:
        for node in view.consumers(todo.pop()):
            if node.domain or node.op not in POINTWISE | backend.smooth_activations:
                continue
            data = {name for name in node.inputs if name and not view.is_constant(name)}
            if not data <= reached.keys():
                continue
            bent = any(reached[name] for name in data)
            if node.op == "Mul" and len(data) == 2 and bent:
                return True
            bent = bent or node.op in curved
            if node.output not in reached or (bent and not reached[node.output]):
                reached[node.output] = bent
                todo.append(node.output)
    return False


def _split_gate(view: GraphView, node: Node, backend: Backend, remedy: str) -> Iterator[Finding]:
    """Find a Q inside ``x * sigmoid(x)``: a quantized gate that is a function of the other side."""
    for gate, other in ((0, 1), (1, 0)):
        dequantize = dq_behind(view, node.input(gate), backend)
        quantize = quantizer_of(view, dequantize) if dequantize is not None else None
        if quantize is None:
            continue
        source = _float_source(view, node.input(other))
        curve = _curve_between(view, quantize.input(0), source, backend)
        if curve is not None:
            text = f"Q/DQ inside the activation, between {_pair(curve, node)}"
            yield Finding("F11", "WARN", quantize.name, text, remedy=remedy)


def _curve_between(view: GraphView, tensor: str, source: str, backend: Backend) -> Node | None:
    """Return the smooth operator or Clip on the pointwise way from ``source`` to ``tensor``."""
    curve, node = None, view.producer(tensor)
    while node is not None and node.op in POINTWISE | backend.smooth_activations:
        if node.op == "Clip" or node.op in backend.smooth_activations:
            curve = node
        data = {name for name in node.inputs if name and not view.is_constant(name)}
        if len(data) != 1:
            return None
        tensor = data.pop()
        if curve is not None and _float_source(view, tensor) == source:
            return curve
        node = view.producer(tensor)
    return None


def _float_source(view: GraphView, tensor: str) -> str:
    """Return the tensor that a DQ stands for, or the tensor itself."""
    dequantize = real_producer(view, tensor)
    if dequantize is None or not dequantize.is_dq:
        return tensor
    quantize = quantizer_of(view, dequantize)
    return quantize.input(0) if quantize is not None else tensor


def check_gates(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F11: the Mul of a squeeze-excite block has both inputs quantized."""
    for node in view.nodes if view.has_qdq else ():
        if node.op != "Mul" or node.domain or len(node.inputs) != 2:
            continue
        if any(view.is_constant(name) for name in node.inputs):
            continue
        shapes = [view.shape(name) for name in node.inputs]
        gates = [shape is not None and len(shape) == 4 and shape[2:] == (1, 1) for shape in shapes]
        sizes = [shape is not None and len(shape) == 4 for shape in shapes]
        if gates.count(True) != 1 or not all(sizes):
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
        sources = [dq_behind(view, name, backend) for name in data]
        if any(one is not None and follows_result(view, one, backend) for one in sources):
            continue  # F20 asks for that quantizer
        if not quantizers_after(view, node.output, backend, through=through):
            remedy = "quantize its output for a quantized reader, else leave its input float"
            text = f"{node.op} has INT8 in and float out"
            yield Finding("F7", "WARN", node.name, text, remedy=remedy)


def _is_spatial(view: GraphView, node: Node) -> bool:
    """Return whether a ReduceMean is a pooling over all of (H, W) or (D, H, W)."""
    shape = view.shape(node.input(0))
    if shape is None:
        return norm_axes(view, node, None) == (-2, -1)
    return len(shape) >= 4 and norm_axes(view, node, len(shape)) == tuple(range(2, len(shape)))


def check_pads(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F18: no Q between Pad and Conv."""
    for node in view.nodes:
        if node.op not in CONVS or node.domain:
            continue
        dequantize = real_producer(view, node.input(0))
        if dequantize is None or not dequantize.is_dq:
            continue
        quantize = quantizer_of(view, dequantize)
        pad = real_producer(view, quantize.input(0)) if quantize is not None else None
        if quantize is not None and pad is not None and pad.op == "Pad":
            text = f"Q/DQ between {_pair(pad, node)}"
            remedy = "quantize in front of the Pad, or use the pads of the convolution"
            yield Finding("F18", "WARN", quantize.name, text, remedy=remedy)


def check_requantization(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F18: no DQ -> Q with another scale."""
    for node in view.nodes:
        source = real_producer(view, node.input(0)) if node.is_q else None
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
