"""The graphs inside If, Loop and Scan nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, NodeProto


def subgraphs(raw: NodeProto) -> list[tuple[str, GraphProto]]:
    """Return the attribute name and the graph of each subgraph of a node."""
    found = []
    for attribute in raw.attribute:
        found += [(attribute.name, graph) for graph in _graphs_of(attribute)]
    return found


def _graphs_of(attribute: AttributeProto) -> list[GraphProto]:
    from onnx import AttributeProto

    if attribute.type == AttributeProto.GRAPH:
        return [attribute.g]
    return list(attribute.graphs) if attribute.type == AttributeProto.GRAPHS else []


def captured(graph: GraphProto) -> set[str]:
    """Return the names that a subgraph reads and does not make."""
    made = {value.name for value in graph.input} | {one.name for one in graph.initializer}
    read: set[str] = {value.name for value in graph.output}
    for raw in graph.node:
        made.update(raw.output)
        read.update(raw.input)
        for _, inner in subgraphs(raw):
            read |= captured(inner)
    return read - made
