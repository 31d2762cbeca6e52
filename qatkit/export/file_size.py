"""The limit of protobuf on the size of one ONNX file."""

from __future__ import annotations

from qatkit.errors import QatkitError, shorten


def too_large(name: str, error: Exception) -> QatkitError:
    """Return what to raise where protobuf's limit of 2 GB is exceeded."""
    return QatkitError(
        f"{name}: has more than the 2 GB of one ONNX file ({shorten(str(error))}); "
        "give weights='int8', or export the model in parts"
    )
