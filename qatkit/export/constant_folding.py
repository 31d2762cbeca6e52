"""Compute what a graph computes from constants alone, once, at export."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qatkit.export.cleanup import remove_identities
from qatkit.export.marker import DOMAIN

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

_LARGEST = 1 << 26
_LARGEST_REPEATED = 1 << 20
"""Elements of a folded constant: beyond, a file would grow by what it can compute."""
_REPEATING = frozenset({"Expand", "Tile", "ConstantOfShape"})
_NEVER = frozenset(
    {"Constant", "Identity", "QuantizeLinear", "DequantizeLinear", "RandomNormal", "RandomUniform"}
)


def constants_to_initializers(graph: GraphProto) -> None:
    """Turn Constant nodes of numbers into initializers, in place."""
    from onnx import numpy_helper

    kept: list[NodeProto] = []
    for node in graph.node:
        value = _value(node) if node.op_type == "Constant" else None
        if value is None:
            kept.append(node)
        else:
            graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
    del graph.node[:]
    graph.node.extend(kept)


def fold_constants(model: ModelProto) -> None:
    """Replace nodes that read only constants by their results, in place.

    PyTorch's exporter folds few operators. Weights that a forward computes, and biases from small
    networks over fixed coordinates, are constants of the file after this.

    Args:
        model: what the exporter wrote, markers included; these stay.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    remove_identities(graph)
    constants_to_initializers(graph)
    known: dict[str, Any] = {t.name: t for t in graph.initializer}
    rest: list[NodeProto] = []
    made: dict[str, Any] = {}
    versions = {entry.domain: entry.version for entry in model.opset_import}
    for node in graph.node:
        if not _foldable(node, known):
            rest.append(node)
            continue
        given = [numpy_helper.to_array(known[name]) if name else None for name in node.input]
        results = _run(node, given, versions.get("", 13))
        if results is None:
            rest.append(node)
            continue
        for name, result in zip(node.output, results, strict=True):
            if name:
                known[name] = made[name] = numpy_helper.from_array(result, name)
    del graph.node[:]
    graph.node.extend(rest)
    read = _read(graph)
    graph.initializer.extend(tensor for name, tensor in made.items() if name in read)
    for output in graph.output:
        if output.name in made:  # a constant result keeps its node
            graph.node.append(
                helper.make_node("Constant", [], [output.name], value=made[output.name])
            )


def _foldable(node: NodeProto, known: dict[str, Any]) -> bool:
    nested = any(attribute.HasField("g") for attribute in node.attribute)
    plain = node.domain in ("", "ai.onnx") and node.domain != DOMAIN
    constant = any(node.input) and all(name in known for name in node.input if name)
    return plain and constant and not nested and node.op_type not in _NEVER


def _run(node: NodeProto, given: list[Any], opset: int) -> list[Any] | None:
    """Return the outputs of one node, ``None`` if they cannot be had or are too large."""
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    names = [name for name in dict.fromkeys(node.input) if name]
    feeds = {name: value for name, value in zip(node.input, given, strict=True) if name}
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(feeds[name].dtype), None
        )
        for name in names
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None)
        for name in node.output
        if name
    ]
    graph = helper.make_graph([node], "constant", inputs, outputs)
    one = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    try:
        results = iter(ReferenceEvaluator(one).run(None, feeds))
    except Exception:  # an operator that the evaluator does not know
        return None
    found = [np.asarray(next(results)) if name else None for name in node.output]
    limit = _LARGEST_REPEATED if node.op_type in _REPEATING else _LARGEST
    large = any(result is not None and result.size > limit for result in found)
    return None if large else found


def _read(graph: GraphProto) -> set[str]:
    """Return every name that a node reads, in subgraphs too."""
    names = {name for node in graph.node for name in node.input}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                names |= _read(attribute.g)
    return names


def _value(node: NodeProto) -> Any:
    """Return the numbers of a Constant, ``None`` for strings and sparse tensors."""
    from onnx import AttributeProto, helper, numpy_helper

    attribute = node.attribute[0]
    value = helper.get_attribute_value(attribute)
    if attribute.type == AttributeProto.TENSOR:
        return numpy_helper.to_array(value)
    if attribute.type in (AttributeProto.FLOAT, AttributeProto.FLOATS):
        return np.asarray(value, np.float32)
    if attribute.type in (AttributeProto.INT, AttributeProto.INTS):
        return np.asarray(value, np.int64)
    return None
