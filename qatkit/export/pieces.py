"""Cut a Q/DQ file at the quantizers of its activations, into pieces that run one after another."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qatkit.export.lint.subgraphs import captured, subgraphs

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto


@dataclass(frozen=True, eq=False)
class Piece:
    """Some nodes of a graph, none of which reads an activation that is quantized among them.

    Attributes:
        nodes: in an order in which they run; what depends on constants alone is in every piece
            that reads it.
        reads: names of tensors that are neither made here nor constant.
        makes: names of tensors that later pieces read, or that are outputs of the graph.
        pairs: the QuantizeLinear of each activation here, and its DequantizeLinear.
    """

    nodes: tuple[NodeProto, ...]
    reads: frozenset[str]
    makes: tuple[str, ...]
    pairs: tuple[tuple[NodeProto, NodeProto], ...]


def read_by(node: NodeProto) -> set[str]:
    """Return the names of the tensors that a node reads, those read by the graphs in it too."""
    names = {name for name in node.input if name}
    for _, inner in subgraphs(node):
        names |= captured(inner)
    return names


def quantizer_pairs(graph: GraphProto) -> list[tuple[NodeProto, NodeProto]]:
    """Return the QuantizeLinear of each activation and its DequantizeLinear."""
    constants = {tensor.name for tensor in graph.initializer}
    readers = {node.input[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    return [
        (node, readers[node.output[0]])
        for node in graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants
    ]


def cut(graph: GraphProto) -> list[Piece]:
    """Return the pieces of a graph in the order in which they run.

    A piece ends where a node reads what a quantizer in it makes.
    """
    pairs = {q.output[0]: (q, dq) for q, dq in quantizer_pairs(graph)}
    fixed = _Fixed(graph, pairs)
    groups: list[list[NodeProto]] = [[]]
    cuts: set[str] = set()
    for node in _in_order(graph, fixed, pairs):
        if not cuts.isdisjoint(read_by(node)):
            groups.append([])
            cuts = set()
        groups[-1].append(node)
        if node.op_type == "DequantizeLinear" and node.input[0] in pairs:
            cuts.update(node.output)
    outputs = {value.name for value in graph.output}
    needed: set[str] = set(outputs)
    pieces = []
    for index in reversed(range(len(groups))):
        own = groups[index]
        made = {name for node in own for name in node.output if name}
        read = {name for node in own for name in read_by(node)}
        wanted = outputs & fixed.made if index == len(groups) - 1 else set()
        nodes = (*fixed.behind(read | wanted), *own)
        inside = made | {name for node in nodes for name in node.output}
        reads = frozenset(read - inside - fixed.names)
        makes = tuple(sorted((needed & made) | wanted))
        found = tuple(pairs[node.output[0]] for node in own if node.output[0] in pairs)
        pieces.append(Piece(nodes, reads, makes, found))
        needed |= reads
    return pieces[::-1]


def _in_order(
    graph: GraphProto, fixed: _Fixed, pairs: dict[str, tuple[NodeProto, NodeProto]]
) -> Iterator[NodeProto]:
    """Yield the nodes that compute from inputs, each DequantizeLinear right behind its Q."""
    behind: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in pairs:
            behind.setdefault(node.input[0], []).append(node)
    for node in graph.node:
        if not fixed.made.isdisjoint(node.output) or (
            node.op_type == "DequantizeLinear" and node.input[0] in behind
        ):
            continue
        yield node
        yield from behind.get(node.output[0], ())


class _Fixed:
    """What depends on constants alone.

    Attributes:
        names: initializers and what nodes make of them.
        made: the second of these.
    """

    def __init__(self, graph: GraphProto, quantized: Container[str] = ()) -> None:
        self.names = {tensor.name for tensor in graph.initializer}
        self.made: set[str] = set()
        self._makers: dict[str, NodeProto] = {}
        self._order: dict[str, int] = {}
        for index, node in enumerate(graph.node):
            random = node.op_type.startswith("Random")
            if random or node.output[0] in quantized or not read_by(node) <= self.names:
                continue
            made = [name for name in node.output if name]
            self.names.update(made)
            self.made.update(made)
            self._makers |= dict.fromkeys(made, node)
            self._order |= dict.fromkeys(made, index)

    def behind(self, names: set[str]) -> list[NodeProto]:
        """Return the nodes that make those of the names that are constant, in order."""
        found: dict[int, NodeProto] = {}
        waiting = [name for name in names if name in self.made]
        while waiting:
            name = waiting.pop()
            if self._order[name] not in found:
                found[self._order[name]] = self._makers[name]
                waiting += [one for one in read_by(self._makers[name]) if one in self.made]
        return [found[index] for index in sorted(found)]
