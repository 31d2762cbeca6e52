"""Rules on the operands of weighted operators and on where Q/DQ may end: P5, B1, B2, F1, F5."""

from __future__ import annotations

from collections.abc import Iterator

from qatkit.backend import Backend
from qatkit.export.lint.finding import Finding
from qatkit.export.lint.graph_view import GraphView, Node
from qatkit.export.lint.rule import Rule
from qatkit.export.lint.walks import (
    IDENTITIES,
    constant_operand,
    dq_behind,
    is_copy,
    is_quantized,
    quantizer_of,
    real_producer,
    weight_input,
    weighted_behind,
    weighted_nodes,
)

RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
CODES = frozenset({"int8", "uint8", "int4", "uint4"})
WEIGHT_ONLY_TYPES = frozenset({"int4", "uint4", "float4e2m1"})


def check_bias(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """P5: the bias is a float initializer, never behind a DequantizeLinear."""
    for node in view.nodes if backend.float_bias else ():
        if node.domain:
            continue
        bias = ""
        if node.op in backend.weighted and node.op != "MatMul":
            bias = node.input(2)
        elif node.op == "Add" and (index := constant_operand(view, node)) is not None:
            bias = node.input(index) if _is_bias_add(view, node, index, backend) else ""
        dequantize = dq_behind(view, bias, backend) if bias else None
        if dequantize is not None:
            text = f"bias {bias!r} comes from DequantizeLinear {dequantize.name!r}"
            remedy = "keep the bias a float initializer"
            yield Finding("P5", "ERROR", node.name, text, remedy=remedy)


def _is_bias_add(view: GraphView, node: Node, index: int, backend: Backend) -> bool:
    """Return whether an Add puts one constant per channel on the result of a weighted operator."""
    shape = view.shape(node.input(index))
    if shape is None or sum(size != 1 for size in shape) > 1:
        return False
    source = view.producer(node.input(1 - index))
    while source is not None and (source.op in IDENTITIES or source.op in RESHAPES):
        source = view.producer(source.input(0))
    return source is not None and source.op in backend.weighted and not source.domain


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
    if view.parent is not None or not backend.float_outputs:
        return
    for name in view.outputs:
        node = real_producer(view, name)
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


def check_bare_codes(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """B2: no weighted operator reads codes without a DequantizeLinear."""
    for node in view.nodes:
        if node.op not in backend.weighted or node.domain:
            continue
        for tensor in node.inputs[:2]:
            kind, source = view.dtype(tensor), view.producer(tensor)
            reported = source is not None and source.is_q and view.is_constant(tensor)
            if kind in CODES and not reported:
                text = f"{node.op} reads {kind} codes {tensor!r} without a DequantizeLinear"
                remedy = "put a DequantizeLinear in front of it"
                yield Finding("B2", "ERROR", node.name, text, remedy=remedy)


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
        source = real_producer(view, tensor)
        if source is not None and source.is_dq:
            quantize = quantizer_of(view, source)
            tensor = quantize.input(0) if quantize is not None else tensor
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
    Rule("B2", "no bare codes", "[C] ONNX: Conv, Gemm and MatMul take no int8", check_bare_codes),
    Rule("F1", "quantize all inputs", "[D] TensorRT, Explicit quantization", check_float_operators),
    Rule("F5", "batch norm folded", "[D] TensorRT, Q/DQ placement", check_leftover_batch_norms),
)
