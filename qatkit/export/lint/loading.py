"""Open an ONNX file for the lint: without its external data, and with one-line errors."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from qatkit.errors import MissingExtraError, QatkitError, QatkitTypeError, shorten
from qatkit.export.onnx_file import OnnxFile, read_model

if TYPE_CHECKING:
    from onnx import ModelProto

logger = logging.getLogger(__name__)


def load_for_lint(path_or_model: str | Path | ModelProto) -> tuple[OnnxFile, str]:
    """Return the model, local functions inlined, and its name; large initializers stay in the file.

    Args:
        path_or_model: path of an .onnx file, or a model in memory.

    Returns:
        The model; what to call it in a message.

    Raises:
        MissingExtraError: onnx is not installed.
        QatkitTypeError: neither a path nor a ``ModelProto``.
        QatkitError: the file is missing or is no ONNX file.
    """
    try:
        import onnx
    except ImportError:
        raise MissingExtraError("onnx", "onnx") from None
    if isinstance(path_or_model, onnx.ModelProto):
        file, where = OnnxFile(path_or_model), "ModelProto"
    elif isinstance(path_or_model, str | Path):
        path = Path(path_or_model)
        file, where = _read_file(path), str(path)
    else:
        kind = type(path_or_model).__name__
        raise QatkitTypeError(
            f"lint_onnx: got {kind}, give the path of an .onnx file or a ModelProto"
        )
    if not file.model.HasField("graph") or not file.model.ir_version:
        raise QatkitError(f"{where}: no graph inside: give a file written by export_onnx()")
    return dataclasses.replace(file, model=_inline_functions(file.model)), where


def malformed(file: OnnxFile) -> str:
    """Return what onnx finds wrong with a model, ``""`` for nothing or a model in several files."""
    import onnx

    external = onnx.TensorProto.EXTERNAL
    model = onnx.load(file.path, load_external_data=False) if file.places else file.model
    if any(tensor.data_location == external for tensor in model.graph.initializer):
        return ""
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # ValidationError has no public base class
        return shorten(str(error), 160)
    return ""


def _read_file(path: Path) -> OnnxFile:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise QatkitError(f"{path}: {what}: give the path of an .onnx file")
    try:
        return read_model(path)
    except Exception as error:  # protobuf and parser errors share no base class
        raise QatkitError(
            f"{path}: not an ONNX file ({shorten(str(error), 120)}): "
            "give a file written by export_onnx()"
        ) from None


def _inline_functions(model: ModelProto) -> ModelProto:
    """Return the model with the bodies of its local functions in place of the calls."""
    if not model.functions:
        return model
    from onnx import inliner

    try:
        return inliner.inline_local_functions(model)
    except Exception as error:  # C++ errors share no base class
        logger.debug("inlining failed: %s", error)
        return model
