"""How an operator is written before, or from, an opset on, where that is not the same.

Each function gets the editor and a node that is valid at one opset and emits nodes that compute the
same at the neighbouring one. All that they emit is valid from opset 13 on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from qatkit.export.graph_editor import GraphEditor, attributes_of

if TYPE_CHECKING:
    from onnx import NodeProto

Rewrite = Callable[[GraphEditor, "NodeProto"], None]


class CannotRewriteError(Exception):
    """The node has no counterpart; the message says what stands in the way."""


def _input(node: NodeProto, index: int) -> str:
    return node.input[index] if index < len(node.input) else ""


def _number(graph: GraphEditor, node: NodeProto, value: float) -> str:
    """Return a constant scalar of the type of the first input."""
    return graph.add_constant(node, np.asarray(value, graph.numpy_dtype(node.input[0])))


def _rank(graph: GraphEditor, name: str) -> int:
    shape = graph.shape(name)
    if shape is None:
        raise CannotRewriteError("the rank of its input is unknown")
    return len(shape)


def _constant(graph: GraphEditor, name: str, what: str) -> Any:
    value = graph.constant(name)
    if value is None:
        raise CannotRewriteError(f"its {what} are computed")
    return value


def _reduce(graph: GraphEditor, node: NodeProto) -> None:
    """18: the axes become an input; without any, it may leave the shape alone."""
    attributes = attributes_of(node)
    by_element = bool(attributes.pop("noop_with_empty_axes", 0))
    axes = _constant(graph, node.input[1], "axes").tolist() if _input(node, 1) else []
    if not axes and by_element:
        op = _BY_ELEMENT.get(node.op_type, "Identity")
        graph.emit_as(node.output[0], op, [node.input[0]] * (2 if op == "Mul" else 1))
        return
    if axes:
        attributes["axes"] = axes
    graph.emit_as(node.output[0], node.op_type, [node.input[0]], **attributes)


_BY_ELEMENT = MappingProxyType(
    {"ReduceL1": "Abs", "ReduceL2": "Abs", "ReduceLogSum": "Log", "ReduceSumSquare": "Mul"}
)
"""What a reduction over no axis does to each number, where it does anything."""


def _split(graph: GraphEditor, node: NodeProto) -> None:
    """18: the number of parts may stand in the place of their lengths."""
    from onnx import helper

    attributes = attributes_of(node)
    parts = attributes.pop("num_outputs", None)
    inputs = list(node.input)
    if parts is not None and not _input(node, 1):
        shape = graph.shape(node.input[0])
        length = None if shape is None else shape[attributes.get("axis", 0)]
        if length is None:
            raise CannotRewriteError("the length of what it splits is open")
        part = -(-length // parts)
        lengths = [part] * (parts - 1) + [length - part * (parts - 1)]
        inputs = [node.input[0], graph.add_constant(node, np.asarray(lengths, np.int64))]
    graph.keep(helper.make_node("Split", inputs, node.output, node.name, **attributes))


def _pad(graph: GraphEditor, node: NodeProto) -> None:
    """18: it may pad some of the axes only."""
    from onnx import helper

    inputs = list(node.input[:3])
    if _input(node, 3):
        pads = _constant(graph, node.input[1], "pads").tolist()
        axes = _constant(graph, node.input[3], "axes").tolist()
        rank = _rank(graph, node.input[0])
        wide = np.zeros((2, rank), np.int64)
        for position, axis in enumerate(axes):
            wide[:, axis] = pads[position], pads[position + len(axes)]
        inputs[1] = graph.add_constant(node, wide.ravel())
    graph.keep(helper.make_node("Pad", inputs, node.output, node.name, **attributes_of(node)))


def _pad_mode(graph: GraphEditor, node: NodeProto) -> None:
    """19: it knows the mode ``wrap``."""
    _refuse_value(node, "mode", "wrap")
    graph.keep(node)


def _resize(graph: GraphEditor, node: NodeProto) -> None:
    """18: it may resize some of the axes only, smooth, and keep the aspect ratio."""
    from onnx import helper

    attributes = attributes_of(node)
    axes = attributes.pop("axes", None)
    inputs = [*node.input, "", "", ""][:4]
    if axes is not None:
        if inputs[1]:
            raise CannotRewriteError("it has both axes and a region of interest")
        rank = _rank(graph, node.input[0])
        order = [axis % rank for axis in axes]
        kept = graph.emit(node, "Shape", [node.input[0]]) if inputs[3] else ""
        if inputs[2]:
            inputs[2] = _in_all_axes(graph, node, inputs[2], order, rank, "")
        if inputs[3]:
            inputs[3] = _in_all_axes(graph, node, inputs[3], order, rank, kept)
    while not inputs[-1]:
        inputs.pop()
    graph.keep(helper.make_node("Resize", inputs, node.output, node.name, **attributes))


def _in_all_axes(
    graph: GraphEditor, node: NodeProto, given: str, axes: list[int], rank: int, kept: str
) -> str:
    """Return a vector over all axes: ``given`` for some, for the others ``kept``, or 1."""
    pieces = []
    for axis in range(rank):
        if axis in axes:
            pieces.append(_piece(graph, node, given, axes.index(axis)))
        elif kept:
            pieces.append(_piece(graph, node, kept, axis))
        else:
            pieces.append(graph.add_constant(node, np.ones(1, np.float32)))
    values = [value for value in map(graph.constant, pieces) if value is not None]
    if len(values) == rank:
        return graph.add_constant(node, np.concatenate(values))
    return graph.emit(node, "Concat", pieces, axis=0)


def _piece(graph: GraphEditor, node: NodeProto, vector: str, index: int) -> str:
    value = graph.constant(vector)
    if value is not None:
        return graph.add_constant(node, value[index : index + 1])
    return _sliced(graph, node, vector, index, index + 1)


def _sliced(
    graph: GraphEditor, node: NodeProto, vector: str, start: int, end: int, output: str = ""
) -> str:
    """Emit a slice of a vector."""
    bounds = [graph.add_constant(node, np.asarray([bound], np.int64)) for bound in (start, end)]
    axis = graph.add_constant(node, np.asarray([0], np.int64))
    output = output or graph.new_name(f"{node.output[0]}/slice")
    return graph.emit_as(output, "Slice", [vector, *bounds, axis])


def _resize_mode(graph: GraphEditor, node: NodeProto) -> None:
    """19: it knows one more way to place the pixels."""
    _refuse_value(node, "coordinate_transformation_mode", "half_pixel_symmetric")
    graph.keep(node)


def _shape(graph: GraphEditor, node: NodeProto) -> None:
    """15: it may return a part of the shape."""
    attributes = attributes_of(node)
    start, end = attributes.get("start", 0), attributes.get("end", np.iinfo(np.int64).max)
    whole = graph.emit(node, "Shape", [node.input[0]])
    _sliced(graph, node, whole, start, end, node.output[0])


def _layer_normalization(graph: GraphEditor, node: NodeProto) -> None:
    """17: ``(x - mean) / sqrt(var + eps) * scale + bias`` is one operator."""
    attributes = attributes_of(node)
    axis = attributes.get("axis", -1)
    axes = list(range(axis, 0 if axis < 0 else _rank(graph, node.input[0])))
    x, outputs = node.input[0], [*node.output, "", ""]
    mean = _emit_named(graph, node, outputs[1], "ReduceMean", [x], axes=axes)
    centered = graph.emit(node, "Sub", [x, mean])
    square = graph.emit(node, "Pow", [centered, _number(graph, node, 2)])
    variance = graph.emit(node, "ReduceMean", [square], axes=axes)
    eps = _number(graph, node, attributes.get("epsilon", 1e-5))
    deviation = graph.emit(node, "Sqrt", [graph.emit(node, "Add", [variance, eps])])
    if outputs[2]:
        graph.emit_as(outputs[2], "Reciprocal", [deviation])
    steps: list[tuple[str, list[str]]] = [("Div", [centered, deviation])]
    for op, parameter, neutral in (("Mul", _input(node, 1), 1), ("Add", _input(node, 2), 0)):
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


def _group_normalization(graph: GraphEditor, node: NodeProto) -> None:
    """18: normalize groups of channels, with a scale and a bias for each group."""
    _, scale, bias = node.input
    grouped = _grouped(graph, node, scale, bias)
    graph.emit_as(node.output[0], "Reshape", [grouped, graph.emit(node, "Shape", [node.input[0]])])


def _group_normalization_by_channel(graph: GraphEditor, node: NodeProto) -> None:
    """21: the scale and the bias are those of the channels."""
    x, scale, bias = node.input
    groups = attributes_of(node)["num_groups"]
    ones, zeros = (
        graph.add_constant(node, np.full(groups, value, graph.numpy_dtype(x))) for value in (1, 0)
    )
    shape = graph.emit(node, "Shape", [x])
    normal = graph.emit(node, "Reshape", [_grouped(graph, node, ones, zeros), shape])
    last = _rank(graph, x) - 1
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


def _group_parameters(graph: GraphEditor, node: NodeProto) -> None:
    """21, upwards: repeat the scale and the bias of each group for its channels."""
    from onnx import helper

    shape = graph.shape(node.input[0])
    channels = None if shape is None else shape[1]
    if channels is None:
        raise CannotRewriteError("the number of its channels is open")
    times = channels // int(attributes_of(node)["num_groups"])
    wide = [
        graph.add_constant(node, np.repeat(_constant(graph, name, "scale and bias"), times))
        for name in node.input[1:]
    ]
    graph.keep(
        helper.make_node(
            node.op_type, [node.input[0], *wide], node.output, node.name, **attributes_of(node)
        )
    )


def _gelu(graph: GraphEditor, node: NodeProto) -> None:
    """20: ``x / 2 * (1 + erf(x / sqrt(2)))``, or its approximation by tanh, is one operator."""
    x = node.input[0]

    def number(value: float) -> str:
        return _number(graph, node, value)

    if attributes_of(node).get("approximate", "none") == "tanh":
        cube = graph.emit(node, "Mul", [x, graph.emit(node, "Mul", [x, x])])
        inner = graph.emit(node, "Add", [x, graph.emit(node, "Mul", [number(0.044715), cube])])
        scaled = graph.emit(node, "Mul", [number(math.sqrt(2 / math.pi)), inner])
        bent = graph.emit(node, "Tanh", [scaled])
    else:
        bent = graph.emit(node, "Erf", [graph.emit(node, "Div", [x, number(math.sqrt(2))])])
    product = graph.emit(node, "Mul", [x, graph.emit(node, "Add", [bent, number(1)])])
    graph.emit_as(node.output[0], "Mul", [product, number(0.5)])


def _hard_swish(graph: GraphEditor, node: NodeProto) -> None:
    """14: ``x * hard_sigmoid(x)`` is one operator."""
    gate = graph.emit(node, "HardSigmoid", [node.input[0]], alpha=1 / 6, beta=0.5)
    graph.emit_as(node.output[0], "Mul", [node.input[0], gate])


def _mish(graph: GraphEditor, node: NodeProto) -> None:
    """18: ``x * tanh(softplus(x))`` is one operator."""
    bent = graph.emit(node, "Tanh", [graph.emit(node, "Softplus", [node.input[0]])])
    graph.emit_as(node.output[0], "Mul", [node.input[0], bent])


def _cast_like(graph: GraphEditor, node: NodeProto) -> None:
    """15: cast to the type of another tensor."""
    target = graph.dtype(node.input[1])
    if not target:
        raise CannotRewriteError("the type of its second input is unknown")
    graph.emit_as(node.output[0], "Cast", [node.input[0]], to=target)


def _trilu(graph: GraphEditor, node: NodeProto) -> None:
    """14: keep the upper or the lower triangle of each matrix."""
    x = node.input[0]
    rank = _rank(graph, x)
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
    diagonal = _input(node, 1) or zero
    kept = "GreaterOrEqual" if attributes_of(node).get("upper", 1) else "LessOrEqual"
    mask = graph.emit(node, kept, [offset, diagonal])
    graph.emit_as(node.output[0], "Where", [mask, x, _number(graph, node, 0)])


def _reshape(graph: GraphEditor, node: NodeProto) -> None:
    """14: a 0 in the shape may mean an empty dimension; before, it always copies one.

    A shape that is computed holds no 0 unless a tensor is empty.
    """
    if attributes_of(node).get("allowzero", 0):
        shape = graph.constant(node.input[1])
        if shape is not None and not np.all(shape):
            raise CannotRewriteError("its result is empty")
    graph.emit_as(node.output[0], "Reshape", list(node.input))


def _relu(graph: GraphEditor, node: NodeProto) -> None:
    """14: it takes integers."""
    if np.issubdtype(graph.numpy_dtype(node.input[0]), np.integer):
        graph.emit_as(node.output[0], "Max", [node.input[0], _number(graph, node, 0)])
    else:
        graph.keep(node)


def _batch_normalization(graph: GraphEditor, node: NodeProto) -> None:
    """14: it returns the statistics only while it trains, and takes fewer outputs."""
    if attributes_of(node).get("training_mode", 0):
        raise CannotRewriteError("it computes the statistics of the batch")
    graph.keep(node)


def _roi_align(graph: GraphEditor, node: NodeProto) -> None:
    """16: it may shift the boxes by half a pixel, and does so by default."""
    from onnx import helper

    attributes = attributes_of(node)
    if attributes.pop("coordinate_transformation_mode", "half_pixel") != "output_half_pixel":
        raise CannotRewriteError("it shifts the boxes by half a pixel (aligned=True)")
    graph.keep(helper.make_node("RoiAlign", node.input, node.output, node.name, **attributes))


def _grid_sample(names: dict[str, str], most: int) -> Rewrite:
    """20: the modes have other names, and there is a volumetric one."""

    def rewrite(graph: GraphEditor, node: NodeProto) -> None:
        from onnx import helper

        attributes = attributes_of(node)
        if _rank(graph, node.input[0]) > most:
            raise CannotRewriteError("it samples volumes")
        mode = attributes.get("mode", next(iter(names)))
        attributes["mode"] = names.get(mode, mode)
        graph.keep(helper.make_node("GridSample", node.input, node.output, node.name, **attributes))

    return rewrite


def _refuse_value(node: NodeProto, attribute: str, value: str) -> None:
    if attributes_of(node).get(attribute) == value:
        raise CannotRewriteError(f"its {attribute} is {value}")


_REDUCTIONS: Sequence[str] = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod")

DOWN: MappingProxyType[tuple[str, int], Rewrite] = MappingProxyType(
    {
        ("GroupNormalization", 21): _group_normalization_by_channel,
        ("Gelu", 20): _gelu,
        ("GridSample", 20): _grid_sample({"linear": "bilinear", "cubic": "bicubic"}, 4),
        ("Pad", 19): _pad_mode,
        ("Resize", 19): _resize_mode,
        **{(f"Reduce{kind}", 18): _reduce for kind in (*_REDUCTIONS, "SumSquare")},
        ("GroupNormalization", 18): _group_normalization,
        ("Mish", 18): _mish,
        ("Pad", 18): _pad,
        ("Resize", 18): _resize,
        ("Split", 18): _split,
        ("LayerNormalization", 17): _layer_normalization,
        ("RoiAlign", 16): _roi_align,
        ("CastLike", 15): _cast_like,
        ("Shape", 15): _shape,
        ("BatchNormalization", 14): _batch_normalization,
        ("HardSwish", 14): _hard_swish,
        ("Relu", 14): _relu,
        ("Reshape", 14): _reshape,
        ("Trilu", 14): _trilu,
    }
)
"""By operator and opset: what makes a node of that opset one of the opset before."""

UP: MappingProxyType[tuple[str, int], Rewrite] = MappingProxyType(
    {
        ("GridSample", 20): _grid_sample({"bilinear": "linear", "bicubic": "cubic"}, 5),
        ("GroupNormalization", 21): _group_parameters,
    }
)
"""By operator and opset: what makes a node of the opset before one of that opset."""
