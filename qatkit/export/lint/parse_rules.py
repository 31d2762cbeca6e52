"""Rules on single Q/DQ nodes, P1..P10: what the parser refuses or misreads (level ERROR)."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from qatkit.backend import Backend
from qatkit.export.lint.finding import Finding
from qatkit.export.lint.graph_view import GraphView, Node, type_name
from qatkit.export.lint.rule import Rule
from qatkit.export.lint.walks import FLOATS, quantized_shape, scale_of

PARSER = "[C] onnx-tensorrt parser, QuantDequantLinearHelper"
INTEGER_OP = re.compile(r"^QLinear|Integer$|^DynamicQuantizeLinear$")
FOREIGN_QUANT_OP = re.compile(
    r"quant(?!ile|um|it)|^Q(Linear|Gemm|Attention|Embed|Ordered|MoE)|IntegerToFloat|Integer$"
    r"|NBits|Bnb4",
    re.IGNORECASE,
)
# Least opset by type of the codes or of the scale.
OPSET_OF_TYPE = {"float16": 19, "bfloat16": 19, "float8e4m3fn": 19, "int4": 21, "float4e2m1": 23}
SCALE_TYPES = frozenset({"float", "float16", "bfloat16"})


def qdq_nodes(view: GraphView) -> Iterator[Node]:
    """Yield every QuantizeLinear and DequantizeLinear."""
    return (node for node in view.nodes if node.is_q or node.is_dq)


def check_operators(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """P1: only standard QuantizeLinear and DequantizeLinear."""
    from onnx import defs

    for node in () if backend.integer_operators else view.nodes:
        # PyTorch's exporter hides operators it does not know in one called ATen.
        called = f"{node.op} {node.attribute('operator', '')}".rstrip()
        if node.domain == "" and INTEGER_OP.search(node.op):
            what = f"{node.op} is an integer operator"
        elif FOREIGN_QUANT_OP.search(called) and (node.domain or not defs.has(node.op)):
            domain = f" of domain {node.domain!r}" if node.domain else ""
            what = f"{called}{domain} is not a standard operator"
        else:
            continue
        remedy = "export QuantizeLinear/DequantizeLinear pairs of the standard domain (QDQ format)"
        yield Finding("P1", "ERROR", node.name, what, remedy=remedy)


def code_types(view: GraphView, node: Node) -> set[str]:
    """Return the known types of the codes, more than one where the inputs of a DQ disagree."""
    found = {view.dtype(node.input(2)), view.dtype(node.input(0)) if node.is_dq else None}
    if node.is_q and not node.input(2):
        found.add(type_name(node.attribute("output_dtype", 0)))
    return {dtype for dtype in found if dtype is not None}


def check_zero_points(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """P2: zero points are constants and all zero."""
    for node in qdq_nodes(view):
        if not node.input(2):
            continue
        if not view.is_constant(node.input(2)):
            message, remedy = "zero point is not a constant", "store it as an initializer"
        else:
            value = view.array(node.input(2))
            if backend.zero_point or value is None or not np.any(value.astype(np.float32)):
                continue
            worst = value.astype(np.float32).ravel()[np.flatnonzero(value)[0]]
            message, remedy = f"zero point {worst:g} is not 0", "use symmetric quantization"
        yield Finding("P2", "ERROR", node.name, message, remedy=remedy)


def check_code_types(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """P3: codes are int8, also after ReLU; Q always writes its zero point."""
    allowed = backend.code_types | ({"uint8"} if backend.unsigned_int8 else set())
    remedy = "use int8 codes and an int8 zero point of 0, also after ReLU"
    for node in qdq_nodes(view):
        written = node.input(2) or node.attribute("output_dtype", 0)
        if node.is_q and not written and not backend.unsigned_int8:
            text = "no zero point, which means uint8 in ONNX"
            yield Finding("P3", "ERROR", node.name, text, remedy="write an int8 zero point of 0")
            continue
        for dtype in sorted(code_types(view, node) - allowed):
            yield Finding("P3", "ERROR", node.name, f"{dtype} codes are refused", remedy=remedy)


def check_scales(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """P4: scales are constant, finite and > 0."""
    for node in qdq_nodes(view):
        if not node.input(1) or not view.is_constant(node.input(1)):
            message, remedy = "scale is not a constant", "store the calibrated scale"
        else:
            scale = scale_of(view, node)
            if scale is None:
                continue
            bad = np.flatnonzero(~(np.isfinite(scale) & (scale > 0)))
            if scale.size and not bad.size:
                continue
            message = f"scale[{bad[0]}] is {scale[bad[0]]:g}" if scale.size else "scale is empty"
            remedy = "write a finite scale > 0, 1 for a dead channel"
        yield Finding("P4", "ERROR", node.name, message, remedy=remedy)


def check_axes(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """P6: per-channel scales fit the data along a written axis."""
    for node in qdq_nodes(view):
        scale_shape, zero_shape = view.shape(node.input(1)), view.shape(node.input(2))
        if scale_shape is None or None in scale_shape:
            continue
        count = int(np.prod([dim or 0 for dim in scale_shape]))
        if zero_shape is not None and None not in zero_shape:
            zeros = int(np.prod([dim or 0 for dim in zero_shape]))
            if zeros != count:
                text = f"{zeros} zero points for {count} scales"
                yield Finding(
                    "P6", "ERROR", node.name, text, remedy="write one zero point per scale"
                )
        if count > 1:
            for text in _axis_errors(view, node, scale_shape):
                remedy = "write axis and one scale for each index along it"
                yield Finding("P6", "ERROR", node.name, text, remedy=remedy)


def _axis_errors(view: GraphView, node: Node, scale_shape: tuple[int | None, ...]) -> Iterator[str]:
    shape = quantized_shape(view, node)
    if len(scale_shape) > 1:
        block = node.attribute("block_size", 0)
        if not block:
            yield f"scale of shape {list(scale_shape)} is neither a scalar nor a vector"
        elif shape is not None and len(shape) != len(scale_shape):
            yield f"block scale of rank {len(scale_shape)} on data of rank {len(shape)}"
        elif shape is not None:
            axis = node.attribute("axis", 1) % len(shape)
            wanted = [
                -(-size // block) if index == axis and size is not None else size
                for index, size in enumerate(shape)
            ]
            if any(a != b for a, b in zip(wanted, scale_shape, strict=True) if a is not None):
                yield (
                    f"block scale of shape {list(scale_shape)}, not {wanted}, for blocks of "
                    f"{block} along axis {axis}"
                )
        return
    if not node.has_attribute("axis"):
        yield "per-channel without an axis attribute, whose default differs between parsers"
    if shape is None:
        return
    axis = node.attribute("axis", 1)
    if not -len(shape) <= axis < len(shape):
        yield f"axis {axis} is out of range for data of rank {len(shape)}"
    elif shape[axis] is not None and shape[axis] != scale_shape[0]:
        yield f"{scale_shape[0]} scales for {shape[axis]} channels along axis {axis}"


def check_per_channel_data(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """P7: per-channel scales on weights only."""
    for node in qdq_nodes(view):
        shape = view.shape(node.input(1))
        many = shape is not None and any(dim is not None and dim > 1 for dim in shape)
        if many and not node.attribute("block_size", 0) and not view.is_constant(node.input(0)):
            text = f"per-channel scales {list(shape or ())} on an activation"
            remedy = "quantize activations per-tensor"
            yield Finding("P7", "ERROR", node.name, text, remedy=remedy)


def check_ranks(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """P8: the data of Q and DQ is not 0-d."""
    for node in qdq_nodes(view):
        if quantized_shape(view, node) == ():
            remedy = "leave scalars float"
            yield Finding("P8", "ERROR", node.name, "data is a 0-d scalar", remedy=remedy)


def check_versions(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """P9: opset and IR version suit the Q/DQ features in use."""
    for node in qdq_nodes(view):
        needs = [(10, node.op)]
        if node.has_attribute("axis"):
            needs.append((13, "the axis attribute"))
        if node.attribute("block_size", 0):
            needs.append((21, "block_size"))
        needs += [
            (OPSET_OF_TYPE[dtype], dtype)
            for dtype in (view.dtype(name) for name in node.inputs[:3] if name)
            if dtype in OPSET_OF_TYPE
        ]
        opset, what = max(needs)
        if view.opset < opset:
            text = f"{what} needs opset {opset}, the file has {view.opset}"
            yield Finding("P9", "ERROR", node.name, text, remedy=f"export at opset {opset}")
    ir_version = view.model.ir_version
    least = _least_ir_version(view.opset)
    if view.parent is None and view.has_qdq and ir_version < least:
        text = f"IR version {ir_version} with opset {view.opset}, which came with {least}"
        yield Finding("P9", "ERROR", view.name, text, remedy=f"write ir_version = {least}")


def _least_ir_version(opset: int) -> int:
    """Return the IR version that came with an opset, 0 for one that onnx does not know yet."""
    from onnx import helper

    try:
        return helper.find_min_ir_version_for([helper.make_opsetid("", opset)])
    except ValueError:
        return 0


def check_strong_types(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """P10: the scale of a Q has the type of its input, and one that engines take."""
    for node in view.nodes:
        if node.is_dq and (kind := view.dtype(node.input(1))) in FLOATS - SCALE_TYPES:
            yield Finding("P10", "ERROR", node.name, f"{kind} scale", remedy="write it as float")
        data, scale = view.dtype(node.input(0)), view.dtype(node.input(1))
        if not node.is_q or data is None or scale is None:
            continue
        if data == scale and scale in SCALE_TYPES:
            continue
        text = f"{scale} scale on {data} data"
        if data not in SCALE_TYPES:
            remedy = "quantize float, float16 or bfloat16 data only"
        else:
            remedy = f"write the scale as {data}" + (
                ", which needs opset 19" if data in OPSET_OF_TYPE and view.opset < 19 else ""
            )
        yield Finding("P10", "ERROR", node.name, text, remedy=remedy)


PARSE_RULES = (
    Rule("P1", "standard Q/DQ operators only", "[C] onnx-tensorrt parser", check_operators),
    Rule("P2", "zero points constant and 0", PARSER, check_zero_points),
    Rule("P3", "int8 codes, zero point written", PARSER, check_code_types),
    Rule("P4", "scales constant, finite, > 0", PARSER, check_scales),
    Rule("P6", "per-channel lengths and axis", PARSER, check_axes),
    Rule("P7", "per-channel on weights only", PARSER, check_per_channel_data),
    Rule("P8", "no 0-d data", PARSER, check_ranks),
    Rule("P9", "opset and IR version", "[C] ONNX operator and IR versions", check_versions),
    Rule("P10", "scale type = input type", "[C] TensorRT strong typing", check_strong_types),
)
