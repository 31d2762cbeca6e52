"""From a trained model to a verified QDQ ONNX file."""

from qatkit.export.exporter import ExportReport, export_onnx
from qatkit.export.lint import Finding, lint_onnx
from qatkit.export.verify import VerifyReport, verify_onnx

__all__ = [
    "ExportReport",
    "Finding",
    "VerifyReport",
    "export_onnx",
    "lint_onnx",
    "verify_onnx",
]
