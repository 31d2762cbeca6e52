"""Operators that became one: what each of them is made of.

Each function gets the editor and a node and emits nodes that are valid from opset 13 on.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from qatkit.export.graph_editor import (
    CannotRewriteError,
    GraphEditor,
    attributes_of,
    optional_input,
)

if TYPE_CHECKING:
    from onnx import NodeProto


def layer_normalization(graph: GraphEditor, node: NodeProto) -> None:
    """17: ``(x - mean) / sqrt(var + eps) * scale + bias`` is one operator."""
    attributes = attributes_of(node)
    axis = attributes.get("axis", -1)
    axes = list(range(axis, 0 if axis < 0 else graph.rank(node.input[0])))
    x, outputs = node.input[0], [*node.output, "", ""]
    mean = _emit_named(graph, node, outputs[1], "ReduceMean", [x], axes=axes)
    centered = graph.emit(node, "Sub", [x, mean])
    square = graph.emit(node, "Pow", [centered, graph.number(node, 2)])
    variance = graph.emit(node, "ReduceMean", [square], axes=axes)
    eps = graph.number(node, attributes.get("epsilon", 1e-5))
    deviation = graph.emit(node, "Sqrt", [graph.emit(node, "Add", [variance, eps])])
    if outputs[2]:
        graph.emit_as(outputs[2], "Reciprocal", [deviation])
    steps: list[tuple[str, list[str]]] = [("Div", [centered, deviation])]
    for op, parameter, neutral in (
        ("Mul", optional_input(node, 1), 1),
        ("Add", optional_input(node, 2), 0),
    ):
        value = graph.constant(parameter)
        if parameter and (value is None or np.any(value != neutral)):
            steps.append((op, [parameter]))
    result = ""
    for position, (op, operands) in enumerate(steps):
        last = node.output[0] if position == len(steps) - 1 else ""
        given = [result, *operands] if result else operands
        result = _emit_named(graph, node, last, op, given)


def _emit_named(
    graph: GraphEditor, node: NodeProto, output: str, op: str, inputs: list[str], **more: Any
) -> str:
    """Emit a node whose output has the name ``output``, or a new one if that is empty."""
    if output:
        return graph.emit_as(output, op, inputs, **more)
    return graph.emit(node, op, inputs, **more)


def group_normalization(graph: GraphEditor, node: NodeProto) -> None:
    """18: normalize groups of channels, with a scale and a bias for each group."""
    _, scale, bias = node.input
    grouped = _grouped(graph, node, scale, bias)
    graph.emit_as(node.output[0], "Reshape", [grouped, graph.emit(node, "Shape", [node.input[0]])])


def group_normalization_by_channel(graph: GraphEditor, node: NodeProto) -> None:
    """21: the scale and the bias are those of the channels."""
    x, scale, bias = node.input
    groups = attributes_of(node)["num_groups"]
    ones, zeros = (
        graph.add_constant(node, np.full(groups, value, graph.numpy_dtype(x))) for value in (1, 0)
    )
    shape = graph.emit(node, "Shape", [x])
    normal = graph.emit(node, "Reshape", [_grouped(graph, node, ones, zeros), shape])
    last = graph.rank(x) - 1
    axes = graph.add_constant(node, np.arange(1, last, dtype=np.int64))
    wide = [
        graph.emit(node, "Unsqueeze", [one, axes]) if last > 1 else one for one in (scale, bias)
    ]
    scaled = graph.emit(node, "Mul", [normal, wide[0]])
    graph.emit_as(node.output[0], "Add", [scaled, wide[1]])


def _grouped(graph: GraphEditor, node: NodeProto, scale: str, bias: str) -> str:
    attributes = attributes_of(node)
    form = np.asarray([0, attributes["num_groups"], -1], np.int64)
    groups = graph.emit(node, "Reshape", [node.input[0], graph.add_constant(node, form)])
    return graph.emit(
        node,
        "InstanceNormalization",
        [groups, scale, bias],
        epsilon=attributes.get("epsilon", 1e-5),
    )


def group_parameters(graph: GraphEditor, node: NodeProto) -> None:
    """21, upwards: repeat the scale and the bias of each group for its channels."""
    from onnx import helper

    shape = graph.shape(node.input[0])
    channels = None if shape is None else shape[1]
    if channels is None:
        raise CannotRewriteError("the number of its channels is open")
    times = channels // int(attributes_of(node)["num_groups"])
    wide = [
        graph.add_constant(node, np.repeat(graph.known_constant(name, "scale and bias"), times))
        for name in node.input[1:]
    ]
    graph.keep(
        helper.make_node(
            node.op_type, [node.input[0], *wide], node.output, node.name, **attributes_of(node)
        )
    )


def gelu(graph: GraphEditor, node: NodeProto) -> None:
    """20: ``x / 2 * (1 + erf(x / sqrt(2)))``, or its approximation by tanh, is one operator."""
    x = node.input[0]

    def number(value: float) -> str:
        return graph.number(node, value)

    if attributes_of(node).get("approximate", "none") == "tanh":
        cube = graph.emit(node, "Mul", [x, graph.emit(node, "Mul", [x, x])])
        inner = graph.emit(node, "Add", [x, graph.emit(node, "Mul", [number(0.044715), cube])])
        scaled = graph.emit(node, "Mul", [number(math.sqrt(2 / math.pi)), inner])
        bent = graph.emit(node, "Tanh", [scaled])
    else:
        bent = graph.emit(node, "Erf", [graph.emit(node, "Div", [x, number(math.sqrt(2))])])
    product = graph.emit(node, "Mul", [x, graph.emit(node, "Add", [bent, number(1)])])
    graph.emit_as(node.output[0], "Mul", [product, number(0.5)])


def hard_swish(graph: GraphEditor, node: NodeProto) -> None:
    """14: ``x * hard_sigmoid(x)`` is one operator."""
    gate = graph.emit(node, "HardSigmoid", [node.input[0]], alpha=1 / 6, beta=0.5)
    graph.emit_as(node.output[0], "Mul", [node.input[0], gate])


def mish(graph: GraphEditor, node: NodeProto) -> None:
    """18: ``x * tanh(softplus(x))`` is one operator."""
    bent = graph.emit(node, "Tanh", [graph.emit(node, "Softplus", [node.input[0]])])
    graph.emit_as(node.output[0], "Mul", [node.input[0], bent])


def cast_like(graph: GraphEditor, node: NodeProto) -> None:
    """15: cast to the type of another tensor."""
    target = graph.dtype(node.input[1])
    if not target:
        raise CannotRewriteError("the type of its second input is unknown")
    graph.emit_as(node.output[0], "Cast", [node.input[0]], to=target)


def trilu(graph: GraphEditor, node: NodeProto) -> None:
    """14: keep the upper or the lower triangle of each matrix."""
    x = node.input[0]
    rank = graph.rank(x)
    shape = graph.emit(node, "Shape", [x])
    zero, one = (graph.add_constant(node, np.asarray(value, np.int64)) for value in (0, 1))
    counts = []
    for axis in (rank - 2, rank - 1):
        index = graph.add_constant(node, np.asarray(axis, np.int64))
        length = graph.emit(node, "Gather", [shape, index], axis=0)
        counts.append(graph.emit(node, "Range", [zero, length, one]))
    last = graph.add_constant(node, np.asarray([1], np.int64))
    rows = graph.emit(node, "Unsqueeze", [counts[0], last])
    offset = graph.emit(node, "Sub", [counts[1], rows])
    diagonal = optional_input(node, 1) or zero
    kept = "GreaterOrEqual" if attributes_of(node).get("upper", 1) else "LessOrEqual"
    mask = graph.emit(node, kept, [offset, diagonal])
    graph.emit_as(node.output[0], "Where", [mask, x, graph.number(node, 0)])
