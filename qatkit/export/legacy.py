"""The front end that traces with TorchScript: ``torch.onnx.export(dynamo=False)``."""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qatkit.errors import QatkitError, shorten
from qatkit.export.file_size import too_large
from qatkit.export.front_end import FrontEnd, Traceable
from qatkit.export.held_output import output_held
from qatkit.export.marker import DOMAIN, exportable

if TYPE_CHECKING:
    from onnx import ModelProto


_REGISTERS = ("register_custom_op_symbolic", "unregister_custom_op_symbolic")


def _missing() -> str:
    text = (
        f"torch {torch.__version__} has no torch.onnx.export(dynamo=False); use front_end='dynamo'"
    )
    if "dynamo" not in inspect.signature(torch.onnx.export).parameters:
        return text
    try:
        from torch.onnx import symbolic_helper, utils  # noqa: F401
    except ImportError:
        return text
    known = (getattr(torch.onnx, name, None) for name in _REGISTERS)
    return text if None in known else ""


def _write(model: Traceable, opset: int) -> ModelProto:
    """Return the file, as the interface says.

    It goes through a folder: there the exporter puts the weights of a large model beside it.
    """
    import onnx

    with (
        tempfile.TemporaryDirectory() as folder,
        exportable(opset),
        _one_line_errors(model.name, opset),
    ):
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            model.module,
            model.tensors,
            str(path),
            opset_version=opset,
            dynamo=False,
            input_names=list(model.input_names),
            output_names=list(model.output_names),
            dynamic_axes={name: dict(axes) for name, axes in model.batch_axes.items()},
            custom_opsets={DOMAIN: 1},
        )
        return onnx.load(path)


@contextlib.contextmanager
def _one_line_errors(name: str, opset: int) -> Iterator[None]:
    """Turn what the exporter raises into one line, and keep it from printing whole graphs."""
    try:
        with output_held():
            yield
    except QatkitError:
        raise
    except torch.onnx.errors.UnsupportedOperatorError as error:
        raise QatkitError(
            f"{name}: opset {opset} cannot express it ({shorten(str(error), 160)}); "
            "try a higher opset, up to 20, or front_end='dynamo'"
        ) from None
    except Exception as error:
        if "2GiB" in str(error):
            raise too_large(name, error) from None
        raise QatkitError(
            f"{name}: PyTorch's ONNX exporter fails ({shorten(str(error), 200)}); "
            "see that the float model exports with torch.onnx.export(dynamo=False)"
        ) from None


LEGACY = FrontEnd("legacy", range(13, 21), _missing, _write)
