"""Run PyTorch's ONNX exporter on a lowered model."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qatkit.errors import QatkitError, shorten
from qatkit.export.inputs import (
    arguments,
    batch_axes,
    input_names,
    output_names,
    take_tensors,
)
from qatkit.export.marker import DOMAIN, exportable
from qatkit.graph.structure import tensors

if TYPE_CHECKING:
    from onnx import ModelProto


def trace(
    lowered: nn.Module,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    opset: int,
    dynamic_batch: bool,
) -> ModelProto:
    """Return what the exporter makes of ``lowered``, with marker nodes in it.

    Args:
        lowered: the lowered copy; it takes tensors one by one afterwards.
        model: the model it was made from, for names.
        args: positional arguments, float32 on the CPU.
        kwargs: keyword arguments.
        opset: the opset to write.
        dynamic_batch: leave the batch dimension open.

    Raises:
        QatkitError: the exporter cannot express the model.
    """
    import onnx

    inputs = arguments(model, args, kwargs)
    buffer: Any = io.BytesIO()
    with exportable(opset):
        result = _run(lowered, args, kwargs, type(model).__name__)
        outputs = output_names(result)
        take_tensors(lowered, args, kwargs, result)
        with _one_line_errors(type(model).__name__, opset):
            torch.onnx.export(
                lowered,
                tuple(tensors((args, kwargs))),
                buffer,
                opset_version=opset,
                dynamo=False,
                input_names=input_names(inputs),
                output_names=list(outputs),
                dynamic_axes=batch_axes(inputs, outputs, dynamic=dynamic_batch),
                custom_opsets={DOMAIN: 1},
            )
    return onnx.load_model_from_string(buffer.getvalue())


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    try:
        return model(*args, **kwargs)
    except QatkitError:
        raise
    except Exception as error:
        raise QatkitError(
            f"{name}: does not run on example_inputs ({shorten(str(error), 160)}); "
            "give what it was prepared with"
        ) from None


def too_large(name: str, error: Exception) -> QatkitError:
    """Return what to raise where protobuf's limit of 2 GB is exceeded."""
    return QatkitError(
        f"{name}: has more than the 2 GB of one ONNX file ({shorten(str(error))}); "
        "export the model in parts"
    )


@contextlib.contextmanager
def _one_line_errors(name: str, opset: int) -> Iterator[None]:
    """Turn what the exporter raises into one line, and keep it from printing whole graphs."""
    try:
        with _stdout_kept_unless_failing():
            yield
    except QatkitError:
        raise
    except torch.onnx.errors.UnsupportedOperatorError as error:
        raise QatkitError(
            f"{name}: opset {opset} cannot express it ({shorten(str(error), 160)}); "
            "try a higher opset, up to 20"
        ) from None
    except Exception as error:
        if "2GiB" in str(error):
            raise too_large(name, error) from None
        raise QatkitError(
            f"{name}: PyTorch's ONNX exporter fails ({shorten(str(error), 200)}); "
            "see that the float model exports with torch.onnx.export(dynamo=False)"
        ) from None


@contextlib.contextmanager
def _stdout_kept_unless_failing() -> Iterator[None]:
    """Hold back what is printed, by C++ code too, and print it at the end; after an error drop it.

    PyTorch prints the whole graph, thousands of lines, before it raises.
    """
    sys.stdout.flush()
    try:
        terminal = os.dup(1)
    except OSError:  # no standard output, so nothing to hold back
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 1)
        try:
            yield
            sys.stdout.flush()
            held.seek(0)
            os.write(terminal, held.read())
        finally:
            os.dup2(terminal, 1)
            os.close(terminal)
