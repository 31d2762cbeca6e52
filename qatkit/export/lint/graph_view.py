"""A read-only view on one ONNX graph: producers, consumers, shapes, types and constant values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from qatkit.errors import QatkitError, shorten
from qatkit.export.lint.shapes import Shape, infer_shapes, shape_of
from qatkit.export.lint.subgraphs import captured, subgraphs

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto, TypeProto

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
        """Return the value of an attribute, ``default`` where it is not written."""
        from onnx import helper

        for attribute in self.raw.attribute:
            if attribute.name == name:
                value = helper.get_attribute_value(attribute)
                return value.decode() if isinstance(value, bytes) else value
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
        base_dir: folder of the file, where external tensor data lies.
        parent: the view that holds the If, Loop or Scan node of this subgraph, ``None`` for the
            main graph.
        prefix: put in front of every node name.
    """

    def __init__(
        self,
        model: ModelProto,
        graph: GraphProto,
        inferred: GraphProto,
        base_dir: str = "",
        parent: GraphView | None = None,
        prefix: str = "",
    ) -> None:
        """Index nodes, tensors and types."""
        self.model, self.graph, self.parent = model, graph, parent
        self.name = prefix + (graph.name or "graph")
        self.inputs = tuple(value.name for value in graph.input)
        self.outputs = tuple(value.name for value in graph.output)
        self._base_dir, self._inferred, self._prefix = base_dir, inferred, prefix
        self.memo: dict[tuple[str, str], Any] = {}
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._sparse = {sparse.values.name for sparse in graph.sparse_initializer}
        self.nodes = tuple(_node(raw, index, prefix) for index, raw in enumerate(graph.node))
        self._producers = {name: node for node in self.nodes for name in node.outputs if name}
        self._consumers = _index_consumers(self.nodes)
        self._types = _index_types(inferred)
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

    def array(self, tensor: str) -> np.ndarray[Any, Any] | None:
        """Return the value of a constant, through Identity, Cast, Transpose; ``None`` if unknown.

        Raises:
            QatkitError: the value lies in an external data file that cannot be read.
        """
        if tensor in self._initializers:
            return self._read(self._initializers[tensor])
        node = self._producers.get(tensor)
        if node is None:
            return self.parent.array(tensor) if self.parent is not None else None
        if node.op == "Constant":
            return self._constant_value(node)
        if node.op not in ("Identity", "Cast", "Transpose"):
            return None
        value = self.array(node.input(0))
        if value is None or node.op == "Identity":
            return value
        if node.op == "Transpose":
            return np.transpose(value, node.attribute("perm"))
        from onnx import helper

        dtype: np.dtype[Any] = helper.tensor_dtype_to_np_dtype(node.attribute("to", 1))
        converted: np.ndarray[Any, Any] = value.astype(dtype)
        return converted

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
        from onnx import TensorProto

        code = 0
        if tensor in self._initializers:
            code = self._initializers[tensor].data_type
        elif tensor in self._types:
            code = self._types[tensor].tensor_type.elem_type
        elif tensor not in self._producers and self.parent is not None:
            return self.parent.dtype(tensor)
        return TensorProto.DataType.Name(code).lower() if code else None

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
                views.append(GraphView(self.model, graph, inferred, self._base_dir, self, prefix))
        return tuple(views)

    def walk(self) -> Iterator[GraphView]:
        """Yield this view and every one inside it."""
        yield self
        for view in self.subviews:
            yield from view.walk()

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

    def _read(self, tensor: TensorProto) -> np.ndarray[Any, Any]:
        from onnx import numpy_helper

        try:
            return numpy_helper.to_array(tensor, self._base_dir)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise QatkitError(
                f"tensor {tensor.name!r}: value cannot be read ({shorten(str(error), 120)}): "
                "give the path of the file with its external data beside it"
            ) from None
        except Exception as error:  # onnx.checker.ValidationError has no public base class
            if type(error).__name__ != "ValidationError":
                raise
            raise QatkitError(
                f"tensor {tensor.name!r}: external data not found: give the path of the file, "
                "with its external data beside it"
            ) from None

    def _constant_value(self, node: Node) -> np.ndarray[Any, Any] | None:
        for name in ("value_float", "value_floats", "value_int", "value_ints"):
            if node.has_attribute(name):
                dtype = np.float32 if "float" in name else np.int64
                return np.asarray(node.attribute(name), dtype=dtype)
        return self._read(node.attribute("value")) if node.has_attribute("value") else None


def open_view(model: ModelProto, base_dir: str = "") -> GraphView:
    """Return the view on the main graph of ``model``, with shapes inferred where possible."""
    return GraphView(model, model.graph, infer_shapes(model), base_dir)


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
