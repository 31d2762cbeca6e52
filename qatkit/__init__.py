"""qatkit: quantization-aware training for PyTorch, to a verified QDQ ONNX file.

In the order of use: `plan`, `prepare`, `calibrate`, training with a `QATSchedule`, `export_onnx`.
"""

from qatkit import nn
from qatkit.calibrate import CalibrationReport, calibrate
from qatkit.checkpoint import load, save
from qatkit.config import QuantConfig, Rule
from qatkit.errors import QatkitError
from qatkit.export import (
    ExportReport,
    Finding,
    VerifyReport,
    export_onnx,
    lint_onnx,
    verify_onnx,
)
from qatkit.freeze import freeze_batch_norm, freeze_ranges
from qatkit.functional import fake_quantize, shrink_range
from qatkit.graph.plan import Plan
from qatkit.modes import disable_quantization, enable_quantization
from qatkit.prepare import plan, prepare
from qatkit.quantizer import TensorQuantizer
from qatkit.schedule import QATSchedule
from qatkit.spec import QuantSpec
from qatkit.summary import summary
from qatkit.version import __version__ as __version__

__all__ = [
    "CalibrationReport",
    "ExportReport",
    "Finding",
    "Plan",
    "QATSchedule",
    "QatkitError",
    "QuantConfig",
    "QuantSpec",
    "Rule",
    "TensorQuantizer",
    "VerifyReport",
    "calibrate",
    "disable_quantization",
    "enable_quantization",
    "export_onnx",
    "fake_quantize",
    "freeze_batch_norm",
    "freeze_ranges",
    "lint_onnx",
    "load",
    "nn",
    "plan",
    "prepare",
    "save",
    "shrink_range",
    "summary",
    "verify_onnx",
]
