"""A read-only view on one ONNX graph: producers, consumers, shapes, types and constant values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any

from qatkit.errors import QatkitError
from qatkit.export.lint.constants import (
    NOT_EVALUATED,
    Array,
    constant_node_value,
    evaluate,
    read_tensor,
)
from qatkit.export.lint.shapes import Shape, infer_shapes, shape_of
from qatkit.export.lint.subgraphs import captured, subgraphs
from qatkit.export.onnx_file import OnnxFile

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TypeProto

# Operators whose output differs from run to run, or is not a function of the inputs alone.
NOT_FOLDABLE = frozenset(
    {"If", "Loop", "Scan", "RandomNormal", "RandomUniform", "RandomNormalLike"}
    | {"RandomUniformLike", "Multinomial", "Bernoulli"}
)


@dataclass(frozen=True, eq=False)
class Node:
    """One operator call.

    Attributes:
        name: name for messages: the node's own, or ``OpType(output)``, behind the names of
            enclosing nodes.
        op: operator type.
        domain: operator set, ``""`` for the standard one.
        inputs: tensor names, ``""`` for an omitted input.
        outputs: tensor names.
        index: position in its graph.
        raw: the protobuf message.
    """

    name: str
    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    index: int
    raw: NodeProto = field(repr=False)

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return the value of an attribute, ``default`` where it is not written or of another type.

        Without a default any type will do, ``None`` stands for an attribute that is not written.
        """
        from onnx import helper

        for attribute in self.raw.attribute:
            if attribute.name == name:
                value = helper.get_attribute_value(attribute)
                value = value.decode() if isinstance(value, bytes) else value
                return value if default is None or type(value) is type(default) else default
        return default

    def has_attribute(self, name: str) -> bool:
        """Return whether the attribute is written in the file."""
        return any(attribute.name == name for attribute in self.raw.attribute)

    def input(self, index: int) -> str:
        """Return the name of an input, ``""`` where it is omitted."""
        return self.inputs[index] if index < len(self.inputs) else ""

    @property
    def output(self) -> str:
        """The first output."""
        return self.outputs[0] if self.outputs else ""

    @property
    def is_q(self) -> bool:
        """Whether this is a QuantizeLinear of any domain (P1 judges the domain)."""
        return self.op == "QuantizeLinear"

    @property
    def is_dq(self) -> bool:
        """Whether this is a DequantizeLinear of any domain."""
        return self.op == "DequantizeLinear"


class GraphView:
    """One graph of a model, indexed once and shared by all rules.

    Args:
        model: the model the graph belongs to (for opset and IR version).
        graph: the graph to look at.
        inferred: the same graph with inferred shapes, or ``graph`` itself.
        file: what reads the data of tensors.
        parent: the view that holds the If, Loop or Scan node of this subgraph, ``None`` for the
            main graph.
        prefix: put in front of every node name.
    """

    def __init__(
        self,
        model: ModelProto,
        graph: GraphProto,
        inferred: GraphProto,
        file: OnnxFile,
        parent: GraphView | None = None,
        prefix: str = "",
    ) -> None:
        """Index nodes, tensors and types."""
        self.model, self.graph, self.parent = model, graph, parent
        self.name = prefix + (graph.name or "graph")
        self.inputs = tuple(value.name for value in graph.input)
        self.outputs = tuple(value.name for value in graph.output)
        self._file, self._inferred, self._prefix = file, inferred, prefix
        self.memo: dict[tuple[str, str], Any] = {}
        self._computed: dict[str, Array | None] = {}
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._sparse = {sparse.values.name for sparse in graph.sparse_initializer}
        self.nodes = tuple(_node(raw, index, prefix) for index, raw in enumerate(graph.node))
        self._producers = {name: node for node in self.nodes for name in node.outputs if name}
        self._consumers = _index_consumers(self.nodes)
        self._types = _index_types(inferred)
        self._check_order()
        self._constants = self._fold()

    def producer(self, tensor: str) -> Node | None:
        """Return the node that makes ``tensor``, also in an enclosing graph, or ``None``."""
        if tensor in self._producers or self.parent is None or tensor in self._initializers:
            return self._producers.get(tensor)
        return None if tensor in self.inputs else self.parent.producer(tensor)

    def local_producer(self, tensor: str) -> Node | None:
        """Return the node of this very graph that makes ``tensor``."""
        return self._producers.get(tensor)

    def consumers(self, tensor: str) -> tuple[Node, ...]:
        """Return the nodes of this graph that read ``tensor``, themselves or in a subgraph."""
        return tuple(self._consumers.get(tensor, ()))

    def is_constant(self, tensor: str) -> bool:
        """Return whether ``tensor`` depends on initializers and Constant nodes alone."""
        if tensor in self._constants:
            return True
        known = tensor in self._producers or tensor in self.inputs
        return self.parent is not None and not known and self.parent.is_constant(tensor)

    def array(self, tensor: str) -> Array | None:
        """Return the value of a constant, ``None`` if it is unknown or no constant.

        Raises:
            QatkitError: the value is damaged, or in an external data file that cannot be read.
        """
        if tensor in self._initializers:
            return read_tensor(self._initializers[tensor], self._file)
        node = self._producers.get(tensor)
        if node is None:
            return self.parent.array(tensor) if self.parent is not None else None
        if node.op == "Constant":
            return constant_node_value(node.raw, self._file)
        if tensor not in self._computed:
            self._computed[tensor] = self._compute(node, tensor)
        return self._computed[tensor]

    def _compute(self, node: Node, tensor: str) -> Array | None:
        if node.domain or tensor not in self._constants or node.op in NOT_EVALUATED:
            return None
        inputs: dict[str, Array] = {}
        for name in filter(None, node.inputs):
            value = self.array(name)
            if value is None:
                return None
            inputs[name] = value
        return evaluate(node.raw, inputs, tensor, self.opset)

    def shape(self, tensor: str) -> Shape | None:
        """Return the shape, ``None`` per unknown dimension, or ``None`` for an unknown rank."""
        if tensor in self._initializers:
            return tuple(self._initializers[tensor].dims)
        if tensor in self._types:
            return shape_of(self._types[tensor])
        if tensor in self._producers or self.parent is None:
            return None
        return self.parent.shape(tensor)

    def dtype(self, tensor: str) -> str | None:
        """Return the element type, for example ``int8`` or ``float``; ``None`` if unknown."""
        code = 0
        if tensor in self._initializers:
            code = self._initializers[tensor].data_type
        elif tensor in self._types:
            code = self._types[tensor].tensor_type.elem_type
        elif tensor not in self._producers and self.parent is not None:
            return self.parent.dtype(tensor)
        return type_name(code)

    @cached_property
    def opset(self) -> int:
        """Version of the standard operator set."""
        return max(
            (one.version for one in self.model.opset_import if one.domain in ("", "ai.onnx")),
            default=1,
        )

    @cached_property
    def has_qdq(self) -> bool:
        """Whether any graph of the model holds a QuantizeLinear or DequantizeLinear."""
        if self.parent is not None:
            return self.parent.has_qdq
        return any(node.is_q or node.is_dq for view in self.walk() for node in view.nodes)

    @cached_property
    def subviews(self) -> tuple[GraphView, ...]:
        """The views on the graphs inside If, Loop and Scan nodes."""
        views = []
        for node, twin in zip(self.nodes, self._inferred.node, strict=True):
            pairs = zip(subgraphs(node.raw), subgraphs(twin), strict=True)
            for (label, graph), (_, inferred) in pairs:
                prefix = f"{node.name}/{label}/"
                views.append(GraphView(self.model, graph, inferred, self._file, self, prefix))
        return tuple(views)

    def walk(self) -> Iterator[GraphView]:
        """Yield this view and every one inside it."""
        yield self
        for view in self.subviews:
            yield from view.walk()

    def _check_order(self) -> None:
        """Refuse a cycle, in which every walk would be lost."""
        before = {
            node.index: {
                self._producers[name].index for name in node.inputs if name in self._producers
            }
            for node in self.nodes
        }
        try:
            TopologicalSorter(before).prepare()
        except CycleError as error:
            node = self.nodes[error.args[1][0]]
            raise QatkitError(
                f"graph {self.name!r}: node {node.name!r} reads its own output on a cycle: "
                "check the file with onnx.checker.check_model"
            ) from None

    def _fold(self) -> frozenset[str]:
        constants = set(self._initializers) | self._sparse
        for node in self.nodes:
            if node.op in NOT_FOLDABLE:
                continue
            inputs = [name for name in node.inputs if name]
            if all(name in constants or self._outer_constant(name) for name in inputs):
                constants.update(name for name in node.outputs if name)
        return frozenset(constants)

    def _outer_constant(self, tensor: str) -> bool:
        local = tensor in self._producers or tensor in self.inputs
        return self.parent is not None and not local and self.parent.is_constant(tensor)


def open_view(model: OnnxFile | ModelProto) -> GraphView:
    """Return the view on the main graph of a model, with shapes inferred where possible."""
    file = model if isinstance(model, OnnxFile) else OnnxFile(model)
    return GraphView(file.model, file.model.graph, infer_shapes(file.model), file)


def type_name(code: int) -> str | None:
    """Return the name of an element type, for example ``int8``; ``None`` for an unknown code."""
    from onnx import TensorProto

    if code == TensorProto.UNDEFINED or code not in TensorProto.DataType.values():
        return None
    name: str = TensorProto.DataType.Name(code)
    return name.lower()


def _node(raw: NodeProto, index: int, prefix: str) -> Node:
    inputs, outputs = tuple(raw.input), tuple(raw.output)
    name = raw.name or f"{raw.op_type}({outputs[0] if outputs else index})"
    domain = "" if raw.domain == "ai.onnx" else raw.domain
    return Node(prefix + name, raw.op_type, domain, inputs, outputs, index, raw)


def _index_consumers(nodes: tuple[Node, ...]) -> Mapping[str, list[Node]]:
    consumers: dict[str, list[Node]] = {}
    for node in nodes:
        names = {name for name in node.inputs if name}
        for _, graph in subgraphs(node.raw):
            names |= captured(graph)
        for name in names:
            consumers.setdefault(name, []).append(node)
    return consumers


def _index_types(graph: GraphProto) -> Mapping[str, TypeProto]:
    values = [*graph.value_info, *graph.input, *graph.output]
    return {value.name: value.type for value in values}
