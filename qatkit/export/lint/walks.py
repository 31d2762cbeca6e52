"""Walks over a `GraphView` that several rules share, and what they say about a node."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from qatkit.backend import Backend
from qatkit.export.lint.graph_view import GraphView, Node

# Copies that keep every value of their input: both sides can share one integer tensor.
WHOLE_COPIES = frozenset(
    {"MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Expand"}
    | {"Concat", "Dropout", "DepthToSpace", "SpaceToDepth"}
)
FLOATS = frozenset({"float", "float16", "bfloat16", "double"})
CONVS = frozenset({"Conv", "ConvTranspose"})
# Nothing happens here at inference; exporters leave these anywhere.
IDENTITIES = frozenset({"Identity", "Dropout"})
# With a constant, what a batch norm or a bias may look like.
AFFINE = frozenset({"Add", "Sub", "Mul"})


def is_copy(view: GraphView, node: Node, backend: Backend) -> bool:
    """Return whether ``node`` only moves values, nearest Resize and float casts included."""
    if node.domain:
        return False
    if node.op in backend.copies or node.op in WHOLE_COPIES:
        return True
    if node.op in ("Resize", "Upsample"):
        return bool(node.attribute("mode", "nearest") == "nearest")
    if node.op == "Cast":
        return view.dtype(node.input(0)) in FLOATS and view.dtype(node.output) in FLOATS
    return False


def real_producer(view: GraphView, tensor: str) -> Node | None:
    """Return the node that makes ``tensor``, through Identity and Dropout."""
    node = view.producer(tensor)
    while node is not None and node.op in IDENTITIES:
        node = view.producer(node.input(0))
    return node


def real_readers(view: GraphView, tensor: str) -> Iterator[Node]:
    """Yield the nodes that read ``tensor``, through Identity and Dropout."""
    for node in view.consumers(tensor):
        if node.op in IDENTITIES:
            yield from real_readers(view, node.output)
        else:
            yield node


def quantizer_of(view: GraphView, dequantize: Node) -> Node | None:
    """Return the QuantizeLinear whose codes ``dequantize`` reads, ``None`` for stored codes."""
    quantize = real_producer(view, dequantize.input(0))
    return quantize if quantize is not None and quantize.is_q else None


def dq_behind(view: GraphView, tensor: str, backend: Backend) -> Node | None:
    """Return the DequantizeLinear behind ``tensor``, through copies and Pad, ``None`` for float.

    A Concat counts as quantized when every input that is not a constant is.
    """
    key = ("dq_behind", tensor)
    if key not in view.memo:
        view.memo[key] = _dq_behind(view, tensor, backend)
    found: Node | None = view.memo[key]
    return found


def _dq_behind(view: GraphView, tensor: str, backend: Backend) -> Node | None:
    node = view.producer(tensor)
    while node is not None and not node.is_dq:
        if node.op == "Concat":
            data = [name for name in node.inputs if name and not view.is_constant(name)]
            sources = [dq_behind(view, name, backend) for name in data]
            return sources[0] if sources and None not in sources else None
        if not (is_copy(view, node, backend) or node.op == "Pad"):
            return None
        node = view.producer(node.input(0))
    return node


def is_quantized(view: GraphView, tensor: str, backend: Backend) -> bool:
    """Return whether ``tensor`` carries dequantized codes."""
    return dq_behind(view, tensor, backend) is not None


def weighted_nodes(view: GraphView, backend: Backend) -> Iterator[Node]:
    """Yield the weighted operators on float data; constant and integer arithmetic is left out."""
    for node in view.nodes:
        if node.op not in backend.weighted or node.domain or len(node.inputs) < 2:
            continue
        if not view.is_constant(node.output) and view.dtype(node.output) in FLOATS | {None}:
            yield node


def weight_input(view: GraphView, node: Node) -> int | None:
    """Return which input is the constant weight; ``None`` for two activations."""
    if view.is_constant(node.input(1)):
        return 1
    return 0 if node.op == "MatMul" and view.is_constant(node.input(0)) else None


def is_int8(view: GraphView, node: Node, backend: Backend) -> bool:
    """Return whether both inputs of a weighted operator are quantized."""
    return all(is_quantized(view, node.input(index), backend) for index in (0, 1))


def constant_operand(view: GraphView, node: Node) -> int | None:
    """Return which of the two inputs of a binary operator is constant, if exactly one is."""
    flags = [view.is_constant(name) for name in node.inputs[:2]]
    return flags.index(True) if flags.count(True) == 1 and len(flags) == 2 else None


def weighted_behind(view: GraphView, tensor: str, backend: Backend) -> Node | None:
    """Return the weighted operator behind ``tensor``, through batch norm, bias, identities."""
    node = view.producer(tensor)
    while node is not None:
        if node.op in backend.weighted:
            return node
        if node.op == "BatchNormalization" or node.op in IDENTITIES:
            node = view.producer(node.input(0))
        elif node.op in AFFINE and (constant := constant_operand(view, node)) is not None:
            node = view.producer(node.input(1 - constant))
        else:
            return None
    return None


def quantizers_after(
    view: GraphView,
    tensor: str,
    backend: Backend,
    *,
    through: frozenset[str] = frozenset(),
    whole: bool = False,
) -> list[Node]:
    """Return the QuantizeLinear nodes that ``tensor`` reaches through copies and Pad.

    Args:
        view: the graph.
        tensor: where to start.
        backend: names the copies.
        through: more operators to walk through.
        whole: pass only copies that keep every value and no Concat, instead of all copies.
    """
    found, seen, todo = [], {tensor}, [tensor]
    while todo:
        for node in view.consumers(todo.pop()):
            if node.is_q:
                found.append(node)
                continue
            if whole:
                passes = node.op in WHOLE_COPIES and node.op != "Concat"
            else:
                passes = is_copy(view, node, backend) or node.op in through or node.op == "Pad"
            if passes:
                todo += [name for name in node.outputs if name and name not in seen]
                seen.update(node.outputs)
    return found


def scale_of(view: GraphView, node: Node) -> np.ndarray[Any, Any] | None:
    """Return the scales of a Q or DQ as a flat float64 array, ``None`` if not constant."""
    key = ("scale", node.name + node.output)
    if key not in view.memo:
        value = view.array(node.input(1)) if node.input(1) else None
        numbers = value is not None and value.dtype.kind not in "OSU"
        view.memo[key] = np.asarray(value, dtype=np.float64).ravel() if numbers else None
    found: np.ndarray[Any, Any] | None = view.memo[key]
    return found


def same_scale(view: GraphView, first: Node, second: Node) -> bool | None:
    """Return whether two Q or DQ nodes use one scale; ``None`` where that is unknown."""
    if first.input(1) == second.input(1):
        return True
    one, other = scale_of(view, first), scale_of(view, second)
    if one is None or other is None:
        return None
    return one.shape == other.shape and bool(
        np.allclose(one, other, rtol=1e-6, atol=0.0, equal_nan=True)
    )


def show_scale(view: GraphView, node: Node) -> str:
    """Return the scale of a Q or DQ for a message."""
    scale = scale_of(view, node)
    if scale is None:
        return "unknown"
    return f"{scale[0]:.6g}" if scale.size == 1 else f"[{scale.size} values]"


def quantized_shape(view: GraphView, node: Node) -> tuple[int | None, ...] | None:
    """Return the shape of the data of a Q or DQ: Q and DQ keep it, so either side will do."""
    shape = view.shape(node.input(0))
    return shape if shape is not None else view.shape(node.output)


def norm_axes(view: GraphView, node: Node, rank: int | None) -> tuple[int, ...] | None:
    """Return the axes of a Reduce operator, counted from the front where the rank is known."""
    axes = node.attribute("axes")
    if axes is None and node.input(1):
        value = view.array(node.input(1))
        axes = None if value is None else value.ravel().tolist()
    if axes is None:
        return None
    return tuple(sorted(int(axis) % rank if rank else int(axis) for axis in axes))
