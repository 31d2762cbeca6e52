"""The ONNX pass that turns marker nodes into QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qatkit.errors import QatkitError
from qatkit.export.cleanup import remove_identities
from qatkit.export.marker import DOMAIN, OPERATOR, Codes

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

SUFFIX_Q = "/QuantizeLinear"
SUFFIX_DQ = "/DequantizeLinear"
SUFFIX_CLIP = "/Clip"
_ORDER = "axes of the weight in the order "


@dataclass(frozen=True)
class _Mark:
    """The attributes of one marker node."""

    name: str
    scale: Any
    codes: Codes
    axis: int | None

    def real(self, code: int) -> Any:
        """Return the number that a code stands for."""
        return np.float32(code - self.codes.zero_point) * self.scale


def insert_qdq(model: ModelProto) -> None:
    """Replace every marker by Q and DQ, in place.

    Identities go first: the exporter makes them between layers with one weight.
    The same quantizer on the same tensor becomes one pair. A grid narrower than the type of its
    codes gets a Clip in front of Q. A weight, or another constant, becomes int8 -> DQ. A transpose
    of a quantized weight is done on the weight.

    Args:
        model: what the exporter wrote.

    Raises:
        QatkitError: a marker is inside a subgraph.
    """
    remove_identities(model.graph)
    _Pass(model.graph).run()
    for node in _all_nodes(model.graph):
        if node.domain == DOMAIN:
            raise QatkitError(
                f"{_attributes(node)['name'].decode()}: is inside an If or Loop, "
                "where Q and DQ cannot be placed; disable it by a Rule(enabled=False)"
            )
    for i in reversed(range(len(model.opset_import))):
        if model.opset_import[i].domain == DOMAIN:
            del model.opset_import[i]


class _Pass:
    def __init__(self, graph: GraphProto) -> None:
        from onnx import numpy_helper

        self._graph = graph
        self._constants: dict[str, Any] = {i.name: i for i in graph.initializer}
        self._to_array = numpy_helper.to_array
        self._from_array = numpy_helper.from_array
        self._nodes: list[NodeProto] = []
        self._renamed: dict[str, str] = {}
        self._made: dict[tuple[str, str], str] = {}
        self._count: dict[str, int] = {}

    def run(self) -> None:
        self._split_weights()
        transposes = self._transposed_weights()
        for node in self._graph.node:
            for i, name in enumerate(node.input):
                node.input[i] = self._renamed.get(name, name)
            if node.op_type == OPERATOR and node.domain == DOMAIN:
                self._renamed[node.output[0]] = self._convert(node, transposes.get(node.output[0]))
            elif (
                node.op_type == "Transpose"
                and node.input[0] in self._made.values()
                and (node.name in {t.name for t in transposes.values()})
            ):
                self._renamed[node.output[0]] = node.input[0]
            else:
                self._nodes.append(node)
        for output in self._graph.output:
            if output.name in self._renamed:
                self._expose(output.name)
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)

    def _expose(self, name: str) -> None:
        """Keep the name of a graph output that a quantizer makes."""
        from onnx import helper

        self._nodes.append(
            helper.make_node("Identity", [self._renamed[name]], [name], f"{name}/Identity")
        )

    def _split_weights(self) -> None:
        """Give each slice of the rows of a marked weight a marked weight of its own."""
        makers = {node.output[0]: node for node in self._graph.node}
        nodes: list[NodeProto] = []
        for node in self._graph.node:
            marker = makers.get(node.input[0]) if node.op_type == "Slice" else None
            if marker is None or marker.domain != DOMAIN or marker.input[0] not in self._constants:
                nodes.append(node)
                continue
            rows = self._rows(node)
            nodes.append(node if rows is None else self._part(marker, rows, node.output[0]))
        read = {name for node in nodes for name in node.input}
        read |= {output.name for output in self._graph.output}
        kept = [node for node in nodes if node.domain != DOMAIN or node.output[0] in read]
        del self._graph.node[:]
        self._graph.node.extend(kept)

    def _rows(self, node: NodeProto) -> slice | None:
        """Return the rows that a Slice takes, ``None`` if it is no plain slice of axis 0."""
        start, stop, axis, *step = (
            self._to_array(self._constant(name)).tolist() for name in node.input[1:]
        )
        plain = len(start) == 1 and axis == [0] and step in ([], [[1]])
        return slice(start[0], stop[0]) if plain else None

    def _part(self, marker: NodeProto, rows: slice, output: str) -> NodeProto:
        """Return a marker of some rows of a weight, its constants added."""
        from onnx import helper

        attributes = _attributes(marker)
        weight = self._to_array(self._constants[marker.input[0]])
        scale = self._to_array(self._constant(marker.input[1]))
        first, last, _ = rows.indices(weight.shape[0])
        name = name_rows(attributes["name"].decode(), first, last)
        parts = [weight[rows], scale[rows] if attributes["axis"] == 0 else scale]
        inputs = [f"{name}.raw", f"{name}.step"]
        for part, constant in zip(parts, inputs, strict=True):
            self._add_constant(constant, part)
            self._constants[constant] = self._graph.initializer[-1]
        del attributes["name"]
        part = helper.make_node(OPERATOR, inputs, [output], name, domain=DOMAIN, **attributes)
        part.attribute.append(helper.make_attribute("name", name))
        return part

    def _transposed_weights(self) -> dict[str, NodeProto]:
        """Return the transpose behind each marked weight that is read by nothing else."""
        readers: dict[str, list[NodeProto]] = {}
        for node in self._graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        found = {}
        for node in self._graph.node:
            if node.domain != DOMAIN or node.input[0] not in self._constants:
                continue
            behind = readers.get(node.output[0], [])
            if len(behind) == 1 and behind[0].op_type == "Transpose":
                found[node.output[0]] = behind[0]
        return found

    def _convert(self, node: NodeProto, transpose: NodeProto | None) -> str:
        """Emit the nodes of one marker and return the name of the dequantized tensor."""
        data = node.input[0]
        attributes = _attributes(node)
        name = attributes["name"].decode()
        if (data, name) in self._made:
            return self._made[data, name]
        axis = attributes["axis"] if attributes["axis"] >= 0 else None
        scale = self._to_array(self._constant(node.input[1]))
        codes = Codes(*(attributes[field] for field in Codes._fields))
        mark = _Mark(name, scale, codes, axis)
        if data in self._constants:
            result = self._weight(data, mark, transpose)
        else:
            result = self._activation(data, mark)
        self._made[data, name] = result
        return result

    def _weight(self, data: str, mark: _Mark, transpose: NodeProto | None) -> str:
        """Emit the codes of a constant; floats become codes as in `qatkit.functional`."""
        weight = self._to_array(self._constants[data])
        order: list[int] = []
        if transpose is not None:
            order = list(_attributes(transpose)["perm"])
            weight = np.ascontiguousarray(weight.transpose(order))
            axis = None if mark.axis is None else order.index(mark.axis)
            mark = _Mark(mark.name, mark.scale, mark.codes, axis)
        base = self._base(mark.name)
        scale, zero = self._grid(base, mark)
        if weight.dtype != np.int8:
            shape = [-1 if d == mark.axis else 1 for d in range(weight.ndim)]
            step = np.float32(mark.scale) if mark.axis is None else mark.scale.reshape(shape)
            lowest, highest, center, unsigned = mark.codes
            integers = np.clip(np.rint(weight * (1 / step)), lowest - center, highest - center)
            weight = (integers + center).astype(np.uint8 if unsigned else np.int8)
        self._add_constant(f"{base}.codes", weight)
        result = self._node("DequantizeLinear", [f"{base}.codes", scale, zero], base, mark.axis)
        if transpose is not None:
            self._nodes[-1].doc_string = f"{_ORDER}{' '.join(map(str, order))}"
        return result

    def _activation(self, data: str, mark: _Mark) -> str:
        base = self._base(mark.name)
        scale, zero = self._grid(base, mark)
        if not mark.codes.fill_type:
            low, high = (mark.real(code) for code in mark.codes[:2])
            self._add_constant(f"{base}.low", np.asarray(low, np.float32))
            self._add_constant(f"{base}.high", np.asarray(high, np.float32))
            data = self._node("Clip", [data, f"{base}.low", f"{base}.high"], base, None)
        codes = self._node("QuantizeLinear", [data, scale, zero], base, mark.axis)
        return self._node("DequantizeLinear", [codes, scale, zero], base, mark.axis)

    def _base(self, name: str) -> str:
        """Return the name, numbered from its second use on."""
        number = self._count[name] = self._count.get(name, -1) + 1
        return f"{name}#{number}" if number else name

    def _grid(self, base: str, mark: _Mark) -> tuple[str, str]:
        """Add the scale and the zero point, whose type is that of the codes."""
        scale = np.asarray(mark.scale, np.float32)
        kind = np.uint8 if mark.codes.unsigned else np.int8
        self._add_constant(f"{base}.scale", scale)
        zero_point = np.full(scale.shape, mark.codes.zero_point, kind)
        self._add_constant(f"{base}.zero_point", zero_point)
        return f"{base}.scale", f"{base}.zero_point"

    def _node(self, kind: str, inputs: list[str], base: str, axis: int | None) -> str:
        from onnx import helper

        output = f"{base}/{kind}_output"
        settings: dict[str, Any] = {} if kind == "Clip" else {"axis": 1 if axis is None else axis}
        self._nodes.append(helper.make_node(kind, inputs, [output], f"{base}/{kind}", **settings))
        return output

    def _add_constant(self, name: str, array: Any) -> None:
        tensor = self._from_array(np.asarray(array), name)
        self._graph.initializer.append(tensor)

    def _constant(self, name: str) -> Any:
        if name in self._constants:
            return self._constants[name]
        for node in self._graph.node:
            if node.op_type == "Constant" and node.output[0] == name:
                return _attributes(node)["value"]
            if node.op_type == "Identity" and node.output[0] == name:
                return self._constant(node.input[0])
        raise QatkitError(
            f"{name}: the exporter made a scale that is not a constant; report this model"
        )


def order_of(dq: NodeProto) -> tuple[int, ...] | None:
    """Return the order of axes that a weight has in the file, ``None`` for that of the model."""
    found = dq.doc_string
    return tuple(map(int, found[len(_ORDER) :].split())) if found.startswith(_ORDER) else None


def name_rows(name: str, first: int, last: int) -> str:
    """Return what the nodes of some rows of a weight are called.

    >>> split_rows(name_rows("in_proj_weight_quantizer", 0, 64))
    ('in_proj_weight_quantizer', slice(0, 64, None))
    """
    return f"{name}[{first}:{last}]"


def split_rows(name: str) -> tuple[str, slice]:
    """Return the name of a quantizer and the rows of its weight: all, if none are named."""
    whole, _, rows = name.removesuffix("]").partition("[")
    first, _, last = rows.partition(":")
    return whole, slice(int(first), int(last)) if rows else slice(None)


def _attributes(node: NodeProto) -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _all_nodes(graph: GraphProto) -> list[NodeProto]:
    """Return the nodes of a graph and of the graphs inside its nodes."""
    nodes = list(graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                nodes += _all_nodes(attribute.g)
    return nodes
