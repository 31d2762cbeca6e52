"""Write a file at another opset, and check every node against the operators of that opset."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from qatkit.errors import QatkitError
from qatkit.export.graph_editor import (
    CannotRewriteError,
    GraphEditor,
    all_graphs,
    attributes_of,
    infer_types,
    title,
)
from qatkit.export.opset_rewrites import DOWN, UP

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


def convert_opset(model: ModelProto, opset: int) -> None:
    """Bring a model without local functions to an opset, in place.

    The way goes from one opset to the next. At each, nodes whose operator changed its meaning there
    are rewritten, and attributes that appeared there are dropped if they have their default. Then
    every node must exist at the new opset with its attributes, inputs and types.

    Args:
        model: the file; nodes of other domains are left alone.
        opset: 13 or more.

    Raises:
        QatkitError: a node has no counterpart at that opset.
    """
    entry = next(one for one in model.opset_import if one.domain == "")
    while entry.version > opset:
        _step(model, entry.version, opset, down=True)
        entry.version -= 1
    while entry.version < opset:
        _step(model, entry.version + 1, opset, down=False)
        entry.version += 1
    check_opset(model)


def check_opset(model: ModelProto) -> None:
    """Raise QatkitError unless every node of the standard domain fits its operator."""
    opset = next(one.version for one in model.opset_import if one.domain == "")
    types = infer_types(model)
    for graph in all_graphs(model.graph):
        for node in graph.node:
            if not node.domain:
                _check(node, opset, types)


def schema_of(op: str, opset: int) -> Any:
    """Return what ONNX knows of a standard operator at an opset, ``None`` if there is none."""
    return _schema(op, opset)


@functools.cache
def _schema(op: str, opset: int) -> Any:
    import onnx

    try:
        return onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return None


def _step(model: ModelProto, changed: int, opset: int, *, down: bool) -> None:
    """Cross the border between ``changed`` and the opset before."""
    rules = DOWN if down else UP
    ops = {node.op_type for graph in all_graphs(model.graph) for node in graph.node}
    touched = {op for op in ops if _changed_at(op, changed)}
    for graph in all_graphs(model.graph):
        for node in graph.node:
            if down and node.op_type in touched and not node.domain:
                _drop_defaults(node, changed)
    if not any((op, changed) in rules for op in touched):
        return
    editor = GraphEditor(model)
    for node in editor.each_node():
        rule = rules.get((node.op_type, changed))
        if node.domain or rule is None:
            editor.keep(node)
            continue
        try:
            rule(editor, node)
        except CannotRewriteError as error:
            raise _refused(node, opset, f"{error}", changed if down else None) from None


def _changed_at(op: str, opset: int) -> bool:
    schema = _schema(op, opset)
    return schema is not None and schema.since_version == opset


def _drop_defaults(node: NodeProto, changed: int) -> None:
    """Remove attributes that the opset before does not know, where they say nothing."""
    new, old = _schema(node.op_type, changed), _schema(node.op_type, changed - 1)
    if old is None:
        return
    values = attributes_of(node)
    for attribute in list(node.attribute):
        if attribute.name not in old.attributes and attribute.name in new.attributes:
            default = _default(new.attributes[attribute.name], values[attribute.name])
            if values[attribute.name] == default:
                node.attribute.remove(attribute)


def _default(attribute: Any, value: Any) -> Any:
    """Return the default of an attribute; ONNX says in words that it is all ones for dilations."""
    from onnx import helper

    if attribute.name == "dilations":
        return [1] * len(value)
    if not attribute.default_value.name:
        return None
    default = helper.get_attribute_value(attribute.default_value)
    return default.decode() if isinstance(default, bytes) else default


def _check(node: NodeProto, opset: int, types: dict[str, Any]) -> None:
    schema = _schema(node.op_type, opset)
    if schema is None or schema.deprecated:
        raise _refused(node, opset, "no such operator", _first_opset(node.op_type, opset))
    for attribute in node.attribute:
        if attribute.name not in schema.attributes:
            first = _first_opset(node.op_type, opset, attribute.name)
            raise _refused(node, opset, f"no attribute {attribute.name!r}", first)
    count = len(node.input)
    if not schema.min_input <= count <= schema.max_input:
        raise _refused(node, opset, f"{count} inputs, it takes {schema.max_input}", None)
    if len(node.output) > schema.max_output:
        raise _refused(node, opset, f"{len(node.output)} outputs", None)
    allowed = {one.type_param_str: one.allowed_type_strs for one in schema.type_constraints}
    for position, name in enumerate(node.input):
        parameter = schema.inputs[min(position, len(schema.inputs) - 1)]
        found = type_string(types.get(name)) if name else ""
        if found and found not in allowed.get(parameter.type_str, [parameter.type_str]):
            raise _refused(node, opset, f"{parameter.name} is {found}", None)


def type_string(kind: Any) -> str:
    """Return a tensor type as ONNX writes it in its operators, ``""`` for any other."""
    from onnx import TensorProto

    if kind is None or not kind.tensor_type.elem_type:
        return ""
    return f"tensor({TensorProto.DataType.Name(kind.tensor_type.elem_type).lower()})"


def _first_opset(op: str, opset: int, attribute: str = "") -> int | None:
    """Return the first opset above ``opset`` that has an operator, or an attribute of it."""
    for later in range(opset + 1, 24):
        schema = _schema(op, later)
        if schema is not None and (not attribute or attribute in schema.attributes):
            return later
    return None


def _refused(node: NodeProto, opset: int, why: str, remedy: int | None) -> QatkitError:
    what = f"{title(node)}: opset {opset} cannot express {node.op_type} ({why})"
    if remedy is None:
        return QatkitError(f"{what}; replace it in the model or leave it out")
    return QatkitError(f"{what}; export with opset={remedy} or more")
