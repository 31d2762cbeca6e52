"""From a trained model to a verified QDQ ONNX file."""

from qatkit.export.exporter import export_onnx
from qatkit.export.lint import Finding, lint_onnx
from qatkit.export.report import ExportReport
from qatkit.export.verify import verify_onnx
from qatkit.export.verify_report import VerifyReport

__all__ = [
    "ExportReport",
    "Finding",
    "VerifyReport",
    "export_onnx",
    "lint_onnx",
    "verify_onnx",
]
