"""The ONNX pass that writes a file in float16, for engines where the types in the file decide.

TensorRT 11 runs what is not INT8 in the type that the file says. Here everything that was float32
becomes float16: operators, constants, biases and scales. These stay in float32, with a Cast on the
border: inputs and outputs of the graph; operators, or inputs of operators, that know no float16;
If, Loop and Scan and what is in them; numbers that are computed from shapes; and the Q/DQ pairs
whose scale float16 does not hold, with the operators that they feed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qatkit.errors import QatkitError
from qatkit.export.cleanup import rename_in_subgraphs
from qatkit.export.constant_folding import constants_to_initializers
from qatkit.export.float16_regions import FLOAT, FLOAT16, QUANTIZING, Regions
from qatkit.export.graph_editor import all_graphs, attributes_of, infer_types, subgraphs
from qatkit.export.half_precision import MOST, half_constant, half_scale
from qatkit.export.opset_conversion import type_string

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_SUFFIX = {FLOAT: "float32", FLOAT16: "float16"}

FIRST_OPSET = 19
"""The first one in which a scale may be float16 (P9)."""


def to_float16(model: ModelProto) -> None:
    """Rewrite a Q/DQ file in float16, in place; the codes of its weights stay the same.

    Args:
        model: opset 19 or more, without local functions and batch norms.

    Raises:
        QatkitError: a range or a constant is beyond float16.
    """
    constants_to_initializers(model.graph)
    del model.graph.value_info[:]
    _Pass(model).run()
    infer_types(model, strict=True)


class _Pass:
    def __init__(self, model: ModelProto) -> None:
        from onnx import numpy_helper

        self._graph = model.graph
        self._types = infer_types(model)
        self._constants = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
        self._regions = Regions(model, self._types, self._constants)
        self._scales = {node.input[1] for node in model.graph.node if node.op_type in QUANTIZING}
        self._outputs = {one.name for one in model.graph.output}
        self._names: dict[tuple[str, str], str] = {}
        self._nodes: list[NodeProto] = []
        self._tensors = [one for one in model.graph.initializer if not self._is_float(one.name)]

    def run(self) -> None:
        for value in self._graph.input:
            self._names[value.name, FLOAT] = value.name
        for node in self._graph.node:
            self._convert(node)
        for name in self._outputs:
            if self._is_float(name):
                self._as(name, FLOAT)
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)
        del self._graph.initializer[:]
        self._graph.initializer.extend(self._tensors)

    def _is_float(self, name: str) -> bool:
        return type_string(self._types.get(name)) == FLOAT

    def _convert(self, node: NodeProto) -> None:
        """Emit a node in its type, with Casts in front of it where it reads the other one."""
        for position, name in enumerate(node.input):
            if name and self._is_float(name):
                node.input[position] = self._as(name, self._regions.wants(node, position))
        for inner in subgraphs(node):
            names = {
                name for graph in all_graphs(inner) for one in graph.node for name in one.input
            }
            known = {name for name, _ in self._names} | set(self._constants)
            captured = (name for name in names & known if self._is_float(name))
            rename_in_subgraphs(node, {name: self._as(name, FLOAT) for name in captured})
        kind = FLOAT if self._regions.is_wide(node) else FLOAT16
        if kind == FLOAT16:
            _make_half(node)
        for position, name in enumerate(node.output):
            if name and self._is_float(name):
                actual = f"{name}/float16" if kind == FLOAT16 and name in self._outputs else name
                self._names[name, kind] = node.output[position] = actual
        self._nodes.append(node)

    def _as(self, name: str, kind: str) -> str:
        """Return the name of a float tensor in a type; the first time, emit what makes it."""
        from onnx import helper

        if (name, kind) not in self._names:
            made = name if name in self._outputs else f"{name}/{_SUFFIX[kind]}"
            if name in self._constants:
                made = name if kind == FLOAT16 else made
                self._add_constant(name, made, kind)
            else:
                source = self._names[name, FLOAT if kind == FLOAT16 else FLOAT16]
                to = _code(_SUFFIX[kind])
                self._nodes.append(
                    helper.make_node("Cast", [source], [made], f"{made}/Cast", to=to)
                )
            self._names[name, kind] = made
        return self._names[name, kind]

    def _add_constant(self, name: str, made: str, kind: str) -> None:
        from onnx import numpy_helper

        array = self._constants[name]
        if kind == FLOAT16:
            array = self._half(name, array)
        self._tensors.append(numpy_helper.from_array(np.asarray(array), made))

    def _half(self, name: str, array: Any) -> Any:
        if name in self._scales:
            return half_scale(array)
        half = half_constant(array)
        if half is None:
            raise QatkitError(
                f"{name}: holds {float(np.abs(array).max()):g}, beyond the {MOST:g} of float16; "
                "give precision='float32'"
            )
        return half


def _make_half(node: NodeProto) -> None:
    """Let a node that makes a float of a type it names make a float16."""
    from onnx import helper, numpy_helper

    wide, half = _code("float32"), _code("float16")
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype", "output_datatype") and attribute.i == wide:
            attribute.i = half
    if node.op_type == "ConstantOfShape":
        value = attributes_of(node).get("value")
        array = np.zeros(1, np.float32) if value is None else numpy_helper.to_array(value)
        if array.dtype == np.float32:
            halved = half_constant(array)
            assert halved is not None, "a single number always fits"
            del node.attribute[:]
            node.attribute.append(
                helper.make_attribute("value", numpy_helper.from_array(halved, "value"))
            )


def _code(name: str) -> int:
    """Return the number of ONNX for an element type."""
    from onnx import TensorProto

    return int(TensorProto.DataType.Value(name.upper().replace("FLOAT32", "FLOAT")))
