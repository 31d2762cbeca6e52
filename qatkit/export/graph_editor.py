"""What a pass over an ONNX file needs: types and shapes, constants, and new nodes."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from qatkit.errors import QatkitError, shorten

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TypeProto

Array = Any
"""A NumPy array."""

_SMALL = 1024
"""Elements of a constant that can be a shape."""


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """Return the attributes that are written, strings as ``str``."""
    from onnx import helper

    values = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    return {
        name: value.decode() if isinstance(value, bytes) else value
        for name, value in values.items()
    }


def title(node: NodeProto) -> str:
    """Return what to call a node in a message."""
    return node.name or f"{node.op_type}({', '.join(node.output)})"


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """Yield the graphs inside an If, a Loop or a Scan."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def all_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield a graph and every one inside it."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from all_graphs(inner)


def infer_types(model: ModelProto, *, strict: bool = False) -> dict[str, TypeProto]:
    """Return the type of each tensor by name, as far as ONNX can tell.

    Args:
        model: the file.
        strict: check every node against its operator.

    Raises:
        QatkitError: ``strict``, and a node does not fit its operator.
    """
    from onnx import helper, shape_inference

    try:
        inferred = shape_inference.infer_shapes(
            without_weights(model), check_type=strict, strict_mode=strict, data_prop=True
        )
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise QatkitError(
            f"the file breaks the rules of ONNX ({shorten(lines[-1] if lines else '', 220)}); "
            "report this model"
        ) from None
    types: dict[str, TypeProto] = {}
    for graph in all_graphs(inferred.graph):
        for tensor in graph.initializer:
            types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        for value in (*graph.input, *graph.value_info, *graph.output):
            types[value.name] = value.type
    return types


def without_weights(model: ModelProto, missing: Container[str] = ()) -> ModelProto:
    """Return a copy whose large constants are inputs: types and shapes do not need their values.

    Args:
        model: the file.
        missing: names of constants of any size that have no value yet.
    """
    import onnx
    from onnx import helper

    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    graph = model.graph
    light.graph.CopyFrom(onnx.GraphProto(name=graph.name, node=graph.node, output=graph.output))
    light.graph.input.extend(graph.input)
    light.graph.value_info.extend(graph.value_info)
    for tensor in graph.initializer:
        if math.prod(tensor.dims) <= _SMALL and tensor.name not in missing:
            light.graph.initializer.append(tensor)
        else:
            kind = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            light.graph.input.append(kind)
    return light


def optional_input(node: NodeProto, index: int) -> str:
    """Return the name of an input, ``""`` where it is left out."""
    return node.input[index] if index < len(node.input) else ""


class CannotRewriteError(Exception):
    """A node has no counterpart; the message says what stands in the way."""


class GraphEditor:
    """Rewrites the nodes of a model one by one, those inside If, Loop and Scan too.

    Args:
        model: changed in place.
    """

    def __init__(self, model: ModelProto) -> None:
        """Index the model."""
        self.model = model
        self._types = infer_types(model)
        self._constants: dict[str, Any] = {}
        for graph in all_graphs(model.graph):
            self._constants |= {tensor.name: tensor for tensor in graph.initializer}
            for node in graph.node:
                if node.op_type == "Constant" and node.attribute[0].HasField("t"):
                    self._constants[node.output[0]] = node.attribute[0].t
        self._names = set(self._types) | set(self._constants)
        for graph in all_graphs(model.graph):
            self._names.update(name for node in graph.node for name in node.output)
        self._emitted: list[NodeProto] = []

    def each_node(self) -> Iterator[NodeProto]:
        """Yield every node; what is emitted until the next one takes its place."""
        yield from self._of(self.model.graph)

    def _of(self, graph: GraphProto) -> Iterator[NodeProto]:
        kept: list[NodeProto] = []
        for node in list(graph.node):
            for inner in subgraphs(node):
                yield from self._of(inner)
            self._emitted = []
            yield node
            kept += self._emitted
        del graph.node[:]
        graph.node.extend(kept)

    def keep(self, node: NodeProto) -> None:
        """Leave a node as it is."""
        self._emitted.append(node)

    def emit(self, node: NodeProto, op: str, inputs: list[str], **attributes: Any) -> str:
        """Add a node in the place of ``node`` and return the name of its output."""
        return self.emit_as(self.new_name(f"{title(node)}/{op}"), op, inputs, **attributes)

    def emit_as(self, output: str, op: str, inputs: list[str], **attributes: Any) -> str:
        """Add a node with an output of that name and return the name."""
        from onnx import helper

        self._emitted.append(helper.make_node(op, inputs, [output], f"{output}/{op}", **attributes))
        return output

    def add_constant(self, node: NodeProto, array: Array) -> str:
        """Add a constant for the nodes in the place of ``node`` and return its name."""
        from onnx import numpy_helper

        name = self.new_name(f"{title(node)}/constant")
        tensor = numpy_helper.from_array(np.asarray(array), name)
        self.model.graph.initializer.append(tensor)
        self._constants[name] = tensor
        return name

    def new_name(self, base: str) -> str:
        """Return a name that nothing has yet."""
        name, number = base, 0
        while name in self._names:
            number += 1
            name = f"{base}_{number}"
        self._names.add(name)
        return name

    def constant(self, name: str) -> Array | None:
        """Return the value of a constant, ``None`` for any other tensor."""
        from onnx import numpy_helper

        tensor = self._constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def known_constant(self, name: str, what: str) -> Array:
        """Return the value of a constant; raise CannotRewriteError for any other tensor."""
        value = self.constant(name)
        if value is None:
            raise CannotRewriteError(f"its {what} are computed")
        return value

    def number(self, node: NodeProto, value: float) -> str:
        """Add a constant scalar of the type of the first input of ``node``."""
        return self.add_constant(node, np.asarray(value, self.numpy_dtype(node.input[0])))

    def dtype(self, name: str) -> int:
        """Return the element type, 0 if unknown."""
        found = self._types.get(name)
        return 0 if found is None else int(found.tensor_type.elem_type)

    def numpy_dtype(self, name: str) -> Any:
        """Return the element type for NumPy, float32 if unknown."""
        from onnx import helper

        return helper.tensor_dtype_to_np_dtype(self.dtype(name) or 1)

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """Return the shape, ``None`` per open dimension, or ``None`` for an unknown rank."""
        found = self._types.get(name)
        if found is None or not found.tensor_type.HasField("shape"):
            return None
        dims = found.tensor_type.shape.dim
        return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)

    def rank(self, name: str) -> int:
        """Return the number of dimensions; raise CannotRewriteError if it is unknown."""
        shape = self.shape(name)
        if shape is None:
            raise CannotRewriteError("the rank of its input is unknown")
        return len(shape)
