"""Rules on the operands of weighted operators and on where Q/DQ may end: P5, B1, B2, F1, F5."""

from __future__ import annotations

from collections.abc import Iterator

from qatkit.backend import Backend
from qatkit.export.lint.finding import Finding
from qatkit.export.lint.graph_view import GraphView, Node
from qatkit.export.lint.rule import Rule
from qatkit.export.lint.walks import (
    constant_operand,
    dq_behind,
    is_copy,
    is_quantized,
    weight_input,
    weighted_behind,
    weighted_nodes,
)

WEIGHT_ONLY_TYPES = frozenset({"int4", "uint4", "float4e2m1"})


def check_bias(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """P5: the bias is a float initializer, never behind a DequantizeLinear."""
    for node in view.nodes:
        if node.domain:
            continue
        bias = ""
        if node.op in backend.weighted and node.op != "MatMul":
            bias = node.input(2)
        elif node.op == "Add" and (index := constant_operand(view, node)) is not None:
            source = view.producer(node.input(1 - index))
            bias = node.input(index) if source is not None and source.op == "MatMul" else ""
        dequantize = dq_behind(view, bias, backend) if bias else None
        if dequantize is not None:
            text = f"bias {bias!r} comes from DequantizeLinear {dequantize.name!r}"
            remedy = "keep the bias a float initializer"
            yield Finding("P5", "ERROR", node.name, text, remedy=remedy)


def check_operands(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """B1: both inputs of a weighted operator are quantized, or neither."""
    for node in weighted_nodes(view, backend):
        first, second = (is_quantized(view, node.input(index), backend) for index in (0, 1))
        if first == second:
            continue
        weight = weight_input(view, node)
        quantized, other = (0, 1) if first else (1, 0)
        if quantized == weight and _is_weight_only(view, node.input(quantized), backend):
            continue
        names = ["data", "weight"] if weight == 1 else ["first input", "second input"]
        text = f"{names[quantized]} is quantized, {names[other]} {node.input(other)!r} is float"
        remedy = "quantize both inputs or neither"
        yield Finding("B1", "ERROR", node.name, text, remedy=remedy)


def _is_weight_only(view: GraphView, tensor: str, backend: Backend) -> bool:
    """Return whether a weight has 4-bit codes, which TensorRT takes beside float data."""
    dequantize = dq_behind(view, tensor, backend)
    return dequantize is not None and view.dtype(dequantize.input(0)) in WEIGHT_ONLY_TYPES


def check_graph_outputs(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """B1: no graph output is the output of a Q or DQ."""
    if view.parent is not None:
        return
    for name in view.outputs:
        node = view.producer(name)
        while node is not None and node.op == "Identity":
            node = view.producer(node.input(0))
        if node is not None and (node.is_q or node.is_dq):
            text = f"graph output {name!r} is the output of {node.op}"
            remedy = "do not quantize the last tensor"
            yield Finding("B1", "ERROR", node.name, text, remedy=remedy)


def check_constants(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """B2: a quantized constant is followed by DequantizeLinear."""
    for node in view.nodes:
        if not node.is_q or not view.is_constant(node.input(0)):
            continue
        readers = list(_readers(view, node.output, backend))
        strange = [reader for reader in readers if not reader.is_dq]
        if readers and not strange:
            continue
        follower = f"{strange[0].op} {strange[0].name!r}" if strange else "nothing"
        text = f"quantized constant {node.input(0)!r} is followed by {follower}"
        yield Finding("B2", "ERROR", node.name, text, remedy="put a DequantizeLinear behind it")


def _readers(view: GraphView, tensor: str, backend: Backend) -> Iterator[Node]:
    """Yield who reads integer codes, through copies and Clip (see F3), also in subgraphs."""
    for node in view.consumers(tensor):
        captured = tensor not in node.inputs
        if not captured and (node.op == "Clip" or is_copy(view, node, backend)):
            for name in node.outputs:
                yield from _readers(view, name, backend)
        elif not captured:
            yield node
    for inner in view.subviews:
        yield from _readers(inner, tensor, backend)


def check_float_operators(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F1: weighted operators are quantized; one finding for a file without any Q or DQ."""
    if not view.has_qdq:
        if view.parent is None:
            remedy = "export the model after prepare() and calibrate()"
            text = "the file holds no QuantizeLinear and no DequantizeLinear"
            yield Finding("F1", "WARN", view.name, text, remedy=remedy)
        return
    for node in weighted_nodes(view, backend):
        if any(is_quantized(view, node.input(index), backend) for index in (0, 1)):
            continue
        kind = "" if weight_input(view, node) is not None else " of two activations"
        text = f"{node.op}{kind} runs in float"
        remedy = "quantize both inputs, or ignore this if the layer is float on purpose (F16)"
        yield Finding("F1", "WARN", node.name, text, remedy=remedy)


def check_leftover_batch_norms(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F5: no BatchNormalization behind a quantized weighted operator."""
    for node in view.nodes:
        if node.op != "BatchNormalization" or node.domain:
            continue
        tensor = node.input(0)
        source = view.producer(tensor)
        if source is not None and source.is_dq:
            quantize = view.producer(source.input(0))
            tensor = quantize.input(0) if quantize is not None and quantize.is_q else tensor
        weighted = weighted_behind(view, tensor, backend)
        if weighted is None or not any(
            is_quantized(view, weighted.input(index), backend) for index in (0, 1)
        ):
            continue
        text = f"BatchNormalization behind quantized {weighted.op} {weighted.name!r}"
        remedy = "fold it into the weight before the weight quantizer"
        yield Finding("F5", "WARN", node.name, text, remedy=remedy)


OPERAND_RULES = (
    Rule("P5", "float bias", "[C] onnx-tensorrt parser: INT32 dequantization refused", check_bias),
    Rule("B1", "both inputs or neither", "[I] TensorRT: Could not fuse 2nd input", check_operands),
    Rule("B1", "no Q/DQ at graph outputs", "[I] TensorRT maintainers", check_graph_outputs),
    Rule("B2", "quantized constant -> DQ", "[I] TensorRT maintainers", check_constants),
    Rule("F1", "quantize all inputs", "[D] TensorRT, Explicit quantization", check_float_operators),
    Rule("F5", "batch norm folded", "[D] TensorRT, Q/DQ placement", check_leftover_batch_norms),
)
