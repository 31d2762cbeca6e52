"""Small ONNX passes around the Q/DQ pass: no identities, no batch norms, nothing unused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto


def remove_identities(graph: GraphProto) -> None:
    """Remove Identity nodes, in place; one that makes a graph output stays."""
    outputs = {value.name for value in graph.output}
    renamed: dict[str, str] = {}
    kept: list[NodeProto] = []
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        if node.op_type == "Identity" and node.output[0] not in outputs:
            renamed[node.output[0]] = node.input[0]
        else:
            rename_in_subgraphs(node, renamed)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def batch_norm_to_affine(model: ModelProto) -> None:
    """Replace each BatchNormalization in eval form by a Mul and an Add, in place.

    ``y = x * a + b`` with ``a = gamma / sqrt(var + eps)``, ``b = beta - mean * a``. Those behind a
    quantized layer were folded into it before; the ones left stand behind something else, or are
    a subclass that was folded, and do nothing: these go.
    """
    from onnx import helper, numpy_helper, shape_inference

    graph = model.graph
    if not any(node.op_type == "BatchNormalization" for node in graph.node):
        return
    inferred = shape_inference.infer_shapes(model).graph
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*inferred.value_info, *inferred.input)
        if value.type.tensor_type.HasField("shape")
    }
    constants = {tensor.name: tensor for tensor in graph.initializer}
    kept: list[NodeProto] = []
    for node in graph.node:
        parameters = [constants.get(name) for name in node.input[1:]]
        usable = node.op_type == "BatchNormalization" and len(node.output) == 1
        if not usable or None in parameters or node.input[0] not in ranks:
            kept.append(node)
            continue
        eps = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        gamma, beta, mean, var = (
            numpy_helper.to_array(tensor).astype(np.float64)
            for tensor in parameters
            if tensor is not None
        )
        factor = gamma / np.sqrt(var + eps)
        if np.all(factor == 1) and np.all(beta == mean * factor):
            kept.append(helper.make_node("Identity", [node.input[0]], [node.output[0]]))
            continue
        shape = (-1, *[1] * (ranks[node.input[0]] - 2))
        base = node.name or node.output[0]
        pairs = (("Mul", factor), ("Add", beta - mean * factor))
        source = node.input[0]
        for kind, vector in pairs:
            constant = f"{base}.{kind.lower()}"
            graph.initializer.append(
                numpy_helper.from_array(vector.reshape(shape).astype(np.float32), constant)
            )
            target = node.output[0] if kind == "Add" else f"{base}/Mul_output"
            kept.append(helper.make_node(kind, [source, constant], [target], f"{base}/{kind}"))
            source = target
    del graph.node[:]
    graph.node.extend(kept)
    remove_identities(graph)


def remove_unused(graph: GraphProto) -> None:
    """Remove initializers that nothing reads, and constants likewise, in place."""
    used = {value.name for value in graph.output} | _names_read(graph)
    for i in reversed(range(len(graph.node))):
        if graph.node[i].op_type == "Constant" and graph.node[i].output[0] not in used:
            del graph.node[i]
    for i in reversed(range(len(graph.initializer))):  # to extend a list would copy the weights
        if graph.initializer[i].name not in used:
            del graph.initializer[i]


def _names_read(graph: GraphProto) -> set[str]:
    names: set[str] = set()
    for node in graph.node:
        names.update(node.input)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                names |= _names_read(attribute.g) | {value.name for value in attribute.g.output}
    return names


def rename_in_subgraphs(node: NodeProto, renamed: dict[str, str]) -> None:
    """Rename what the graphs inside an If, a Loop or a Scan read, in place."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            for inner in attribute.g.node:
                for i, name in enumerate(inner.input):
                    inner.input[i] = renamed.get(name, name)
                rename_in_subgraphs(inner, renamed)
