"""Which nodes of a file stay in float32 when the rest becomes float16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qatkit.errors import QatkitError
from qatkit.export.graph_editor import subgraphs, title
from qatkit.export.half_precision import MOST, fits_half, largest_value
from qatkit.export.opset_conversion import schema_of, type_string

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TypeProto

FLOAT, FLOAT16 = "tensor(float)", "tensor(float16)"
QUANTIZING = ("QuantizeLinear", "DequantizeLinear")
_COPIES = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "Split"}
    | {"Squeeze", "Transpose", "Unsqueeze"}
)


class Regions:
    """Tells for each node, and each of its inputs, in which type it computes.

    Args:
        model: a Q/DQ file in float32.
        types: the type of each tensor.
        constants: the arrays of the initializers.

    Raises:
        QatkitError: the range of a quantizer is beyond float16.
    """

    def __init__(
        self, model: ModelProto, types: dict[str, TypeProto], constants: dict[str, Any]
    ) -> None:
        """Look at the whole graph once."""
        self._opset = next(one.version for one in model.opset_import if one.domain == "")
        self._types, self._constants = types, constants
        self._nodes = list(model.graph.node)
        self._producers = {name: node for node in self._nodes for name in node.output if name}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in self._nodes:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._wide = {id(node) for node in self._nodes if not self._knows_float16(node)}
        self._wide |= self._computed_from_shapes()
        self._wide |= self._around([node for node in self._nodes if self._has_unfit_scale(node)])

    def is_wide(self, node: NodeProto) -> bool:
        """Tell whether a node computes in float32."""
        return id(node) in self._wide

    def wants(self, node: NodeProto, position: int) -> str:
        """Return the type that a node wants for one of its float inputs."""
        if self.is_wide(node) or self._parameter(node, position) == FLOAT:
            return FLOAT
        return FLOAT16

    def _parameter(self, node: NodeProto, position: int) -> str:
        parameters = schema_of(node.op_type, self._opset).inputs
        return str(parameters[min(position, len(parameters) - 1)].type_str)

    def _knows_float16(self, node: NodeProto) -> bool:
        schema = None if node.domain else schema_of(node.op_type, self._opset)
        if schema is None or any(True for _ in subgraphs(node)):
            return False
        allowed = {one.type_param_str: one.allowed_type_strs for one in schema.type_constraints}
        for names, parameters in ((node.input, schema.inputs), (node.output, schema.outputs)):
            for position, name in enumerate(names):
                found = type_string(self._types.get(name)) if name else FLOAT16
                kind = parameters[min(position, len(parameters) - 1)].type_str
                fixed = kind == FLOAT and names is node.input
                refused = found == FLOAT and FLOAT16 not in allowed.get(kind, ())
                if not found or (refused and not fixed):  # nothing found: a sequence, or unknown
                    return False
        return True

    def _computed_from_shapes(self) -> set[int]:
        """Return the nodes that compute with sizes and positions, which need all their digits."""
        integers: set[str] = set()
        floats: set[str] = set()
        found: set[int] = set()
        for node in self._nodes:
            given = {name for name in node.input if name and name not in self._constants}
            if node.op_type in ("Shape", "Size"):
                integers.update(node.output)
            elif given and given <= integers | floats:
                is_float = type_string(self._types.get(node.output[0])) == FLOAT
                if not is_float:
                    integers.update(node.output)
                elif node.op_type == "Cast" or given & floats:
                    floats.update(node.output)
                if given & floats or set(node.output) & floats:
                    found.add(id(node))
        return found

    def _has_unfit_scale(self, node: NodeProto) -> bool:
        if node.op_type not in QUANTIZING:
            return False
        scale = self._constants[node.input[1]]
        largest = largest_value(scale, self._constants[node.input[2]].dtype)
        if largest > MOST:
            name = title(node).rpartition("/")[0]
            raise QatkitError(
                f"{name}: its range of {largest:g} is beyond the {MOST:g} of "
                "float16; give precision='float32' or a narrower range"
            )
        return not fits_half(scale)

    def _around(self, unfit: list[NodeProto]) -> set[int]:
        """Return Q/DQ nodes, what reads them, and all other Q/DQ nodes that this reads.

        A Cast between a DQ and the operator that it feeds would keep an engine from fusing them.
        """
        found: set[int] = set()
        waiting = list(unfit)
        while waiting:
            node = waiting.pop()
            if id(node) in found:
                continue
            found.add(id(node))
            behind = [one for name in node.output for one in self._readers.get(name, ())]
            before = [self._producers[name] for name in node.input if name in self._producers]
            if node.op_type == "QuantizeLinear":
                waiting += behind
            elif node.op_type == "DequantizeLinear":
                waiting += [*before, *(one for one in behind if one.op_type not in QUANTIZING)]
            else:
                waiting += [one for one in before if self._gives_codes(one)]
                if node.op_type in _COPIES:
                    waiting += [one for one in behind if one.op_type not in QUANTIZING]
        return found

    def _gives_codes(self, node: NodeProto) -> bool:
        """Tell whether a node is a DQ, or copies what a DQ gives."""
        if node.op_type == "DequantizeLinear":
            return True
        source = self._producers.get(node.input[0]) if node.op_type in _COPIES else None
        return source is not None and self._gives_codes(source)
