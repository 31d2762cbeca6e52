"""How an operator is written before, or from, an opset on, where that is not the same.

Each function gets the editor and a node that is valid at one opset and emits nodes that compute the
same at the neighbouring one. All that they emit is valid from opset 13 on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from qatkit.export.graph_editor import (
    CannotRewriteError,
    GraphEditor,
    attributes_of,
    optional_input,
)
from qatkit.export.opset_compositions import (
    cast_like,
    gelu,
    group_normalization,
    group_normalization_by_channel,
    group_parameters,
    hard_swish,
    layer_normalization,
    mish,
    trilu,
)

if TYPE_CHECKING:
    from onnx import NodeProto

Rewrite = Callable[[GraphEditor, "NodeProto"], None]


def _reduce(graph: GraphEditor, node: NodeProto) -> None:
    """18: the axes become an input; without any, it may leave the shape alone."""
    attributes = attributes_of(node)
    by_element = bool(attributes.pop("noop_with_empty_axes", 0))
    axes = graph.known_constant(node.input[1], "axes").tolist() if optional_input(node, 1) else []
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
    if parts is not None and not optional_input(node, 1):
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
    if optional_input(node, 3):
        pads = graph.known_constant(node.input[1], "pads").tolist()
        axes = graph.known_constant(node.input[3], "axes").tolist()
        rank = graph.rank(node.input[0])
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
        rank = graph.rank(node.input[0])
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
        graph.emit_as(node.output[0], "Max", [node.input[0], graph.number(node, 0)])
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
        if graph.rank(node.input[0]) > most:
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
        ("GroupNormalization", 21): group_normalization_by_channel,
        ("Gelu", 20): gelu,
        ("GridSample", 20): _grid_sample({"linear": "bilinear", "cubic": "bicubic"}, 4),
        ("Pad", 19): _pad_mode,
        ("Resize", 19): _resize_mode,
        **{(f"Reduce{kind}", 18): _reduce for kind in (*_REDUCTIONS, "SumSquare")},
        ("GroupNormalization", 18): group_normalization,
        ("Mish", 18): mish,
        ("Pad", 18): _pad,
        ("Resize", 18): _resize,
        ("Split", 18): _split,
        ("LayerNormalization", 17): layer_normalization,
        ("RoiAlign", 16): _roi_align,
        ("CastLike", 15): cast_like,
        ("Shape", 15): _shape,
        ("BatchNormalization", 14): _batch_normalization,
        ("HardSwish", 14): hard_swish,
        ("Relu", 14): _relu,
        ("Reshape", 14): _reshape,
        ("Trilu", 14): trilu,
    }
)
"""By operator and opset: what makes a node of that opset one of the opset before."""

UP: MappingProxyType[tuple[str, int], Rewrite] = MappingProxyType(
    {
        ("GridSample", 20): _grid_sample({"bilinear": "linear", "bicubic": "cubic"}, 5),
        ("GroupNormalization", 21): group_parameters,
    }
)
"""By operator and opset: what makes a node of the opset before one of that opset."""
