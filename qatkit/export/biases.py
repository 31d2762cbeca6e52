"""An ONNX pass for engines that run an operator in INT8 only without a bias."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto


def set_biases_apart(graph: GraphProto, kinds: Collection[str]) -> None:
    """Keep the bias of each quantized operator of ``kinds`` apart from it, in place.

    ONNX Runtime fuses a Gemm with a float bias only if a quantizer follows at once; without a bias
    it always does. It makes such a Gemm of a MatMul and an Add of a vector, but not of a MatMul and
    a Sub. What is not fused dequantizes its weight on every run. ``x - (-b)`` is ``x + b`` to the
    last bit.

    Args:
        graph: what `qatkit.export.qdq.insert_qdq` made.
        kinds: of ``Gemm`` and ``MatMul``.
    """
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    chosen = {
        node.output[0]: node.op_type
        for node in graph.node
        if node.op_type in kinds and dequantized.issuperset(node.input[:2])
    }
    nodes: list[NodeProto] = []
    for node in graph.node:
        if chosen.get(node.output[0]) == "Gemm" and len(node.input) == 3:
            nodes += _split(node)
        else:
            nodes.append(node)
    matmuls = {name for name, kind in chosen.items() if kind == "MatMul"}
    if matmuls:
        _subtract(graph, nodes, matmuls)
    del graph.node[:]
    graph.node.extend(nodes)


def _split(gemm: NodeProto) -> list[NodeProto]:
    """Return a Gemm without its bias, and the Add."""
    from onnx import helper

    bias, result = gemm.input.pop(), gemm.output[0]
    gemm.output[0] = f"{result}/without_bias"
    name = f"{gemm.name or result}/bias"
    return [gemm, helper.make_node("Add", [gemm.output[0], bias], [result], name)]


def _subtract(graph: GraphProto, nodes: list[NodeProto], matmuls: set[str]) -> None:
    """Turn each Add of a vector to one of the tensors ``matmuls`` into a Sub."""
    from onnx import numpy_helper

    vectors = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 1}
    for node in nodes:
        data = next((name for name in node.input if name in matmuls), None)
        if node.op_type != "Add" or data is None:
            continue
        bias = vectors.get(node.input[1 - list(node.input).index(data)])
        if bias is None:
            continue
        negated = numpy_helper.from_array(-numpy_helper.to_array(bias), f"{bias.name}.negated")
        if all(tensor.name != negated.name for tensor in graph.initializer):
            graph.initializer.append(negated)
        node.op_type = "Sub"
        node.input[:] = [data, negated.name]
