"""Open an ONNX file for the lint: without its external data, and with one-line errors."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from qatkit.errors import MissingExtraError, QatkitError, QatkitTypeError, shorten

if TYPE_CHECKING:
    from onnx import ModelProto

logger = logging.getLogger(__name__)


def load_for_lint(path_or_model: str | Path | ModelProto) -> tuple[ModelProto, str, str]:
    """Return the model, local functions inlined, the folder of its external data, and its name.

    Args:
        path_or_model: path of an .onnx file, or a model in memory.

    Returns:
        The model; the folder, ``""`` for a model in memory; what to call it in a message.

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
        model, base_dir, where = path_or_model, "", "ModelProto"
    elif isinstance(path_or_model, str | Path):
        path = Path(path_or_model)
        model, base_dir, where = _read_file(path), str(path.parent), str(path)
    else:
        kind = type(path_or_model).__name__
        raise QatkitTypeError(
            f"lint_onnx: got {kind}, give the path of an .onnx file or a ModelProto"
        )
    if not model.HasField("graph") or not model.ir_version:
        raise QatkitError(f"{where}: no graph inside: give a file written by export_onnx()")
    return _inline_functions(model), base_dir, where


def malformed(model: ModelProto) -> str:
    """Return what onnx finds wrong with a model, ``""`` for nothing or a model in several files."""
    import onnx

    external = onnx.TensorProto.EXTERNAL
    if any(tensor.data_location == external for tensor in model.graph.initializer):
        return ""
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # ValidationError has no public base class
        return shorten(str(error), 160)
    return ""


def _read_file(path: Path) -> ModelProto:
    import onnx

    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise QatkitError(f"{path}: {what}: give the path of an .onnx file")
    try:
        return onnx.load(path, load_external_data=False)
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
