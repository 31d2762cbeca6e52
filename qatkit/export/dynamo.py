"""The front end that traces with ``torch.export``: ``torch.onnx.export(dynamo=True)``."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qatkit.errors import MissingExtraError, QatkitError, shorten
from qatkit.export.constant_folding import constants_to_initializers, fold_constants
from qatkit.export.dynamo_translations import translations
from qatkit.export.file_size import too_large
from qatkit.export.front_end import FrontEnd, Traceable
from qatkit.export.held_output import output_held

if TYPE_CHECKING:
    from onnx import ModelProto

_COLOR = re.compile(r"\x1b\[[0-9;]*m")


def _missing() -> str:
    if "custom_translation_table" in inspect.signature(torch.onnx.export).parameters:
        return ""
    return f"torch {torch.__version__} is too old for it; use front_end='legacy', or torch 2.6"


def _write(model: Traceable, opset: int) -> ModelProto:
    """Return the file, as the interface says."""
    if importlib.util.find_spec("onnxscript") is None:
        raise MissingExtraError("onnxscript", "onnx")
    tensors, shapes = _open_batch(model)
    with _nothing_logged(), _one_line_errors(model):
        program: Any = torch.onnx.export(
            model.module,
            tensors,
            dynamo=True,
            opset_version=opset,
            input_names=list(model.input_names),
            output_names=list(model.output_names),
            dynamic_shapes=shapes,
            custom_translation_table=translations(),
            external_data=False,
            optimize=True,
            verbose=False,
        )
        proto: ModelProto = program.model_proto
    return _tidy(proto, model)


def _open_batch(model: Traceable) -> tuple[tuple[Tensor, ...], Any]:
    """Return the example tensors, and which of their dimensions are open.

    ``torch.export`` takes a dimension of length 1 for a constant, so such a batch is doubled.
    """
    open_axes = [model.batch_axes.get(name, {}) for name in model.input_names]
    if not any(open_axes):
        return model.tensors, None
    tensors = [
        torch.cat([tensor] * 2) if axes and tensor.shape[0] == 1 else tensor
        for tensor, axes in zip(model.tensors, open_axes, strict=True)
    ]
    dim: Any = torch.export.Dim
    return tuple(tensors), (tuple(dict.fromkeys(axes, dim.DYNAMIC) for axes in open_axes),)


@contextlib.contextmanager
def _nothing_logged() -> Iterator[None]:
    """Hold back what the exporter and its libraries log."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _one_line_errors(model: Traceable) -> Iterator[None]:
    """Say the first cause of a failure in one line; the exporter's own message has dozens."""
    try:
        with output_held():
            yield
    except QatkitError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, QatkitError):
            raise cause from None
        reason = " ".join(_COLOR.sub("", str(cause)).split()) or type(cause).__name__
        if "2GB" in reason or "2GiB" in reason:
            raise too_large(model.name, error) from None
        remedy = "try front_end='legacy'"
        if model.batch_axes:
            remedy += ", or dynamic_batch=False where the model fixes its batch"
        raise QatkitError(
            f"{model.name}: PyTorch's ONNX exporter fails ({shorten(reason, 200)}); {remedy}"
        ) from None


def _tidy(proto: ModelProto, model: Traceable) -> ModelProto:
    """Bring what the exporter wrote into the form of the legacy one, whatever its version."""
    if proto.functions:
        from onnx import inliner

        proto = inliner.inline_local_functions(proto)
    _forget_origins(proto)
    constants_to_initializers(proto.graph)
    fold_constants(proto)
    _name_open_axes(proto, model)
    return proto


def _forget_origins(proto: ModelProto) -> None:
    """Remove what the exporter says about the Python code: paths, and more text than weights."""
    graph = proto.graph
    for thing in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        thing.ClearField("doc_string")
        if "metadata_props" in thing.DESCRIPTOR.fields_by_name:
            thing.ClearField("metadata_props")
    graph.ClearField("value_info")


def _name_open_axes(proto: ModelProto, model: Traceable) -> None:
    """Give the open dimensions of inputs and outputs the names that the legacy front end gives."""
    for value in (*proto.graph.input, *proto.graph.output):
        axes = model.batch_axes.get(value.name, {})
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if axis in axes:
                dim.dim_param = axes[axis]


DYNAMO = FrontEnd("dynamo", range(18, 19), _missing, _write)
