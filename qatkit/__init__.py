"""qatkit: quantization-aware training for PyTorch, to a verified QDQ ONNX file.

In the order of use: `plan`, `prepare`, `calibrate`, training with a `QATSchedule`, `export_onnx`.
"""

from typing import TYPE_CHECKING

from qatkit import nn
from qatkit.calibrate import calibrate
from qatkit.calibration_report import CalibrationReport
from qatkit.checkpoint import load, save
from qatkit.config import QuantConfig, Rule
from qatkit.errors import QatkitError
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

if TYPE_CHECKING:
    from qatkit.export import (
        ExportReport,
        Finding,
        VerifyReport,
        export_onnx,
        lint_onnx,
        verify_onnx,
    )

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

_OF_EXPORT = (
    "ExportReport",
    "Finding",
    "VerifyReport",
    "export_onnx",
    "lint_onnx",
    "verify_onnx",
)


def __getattr__(name: str) -> object:
    """Import the exporter at its first use: it is a third of what importing qatkit would cost."""
    if name not in _OF_EXPORT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qatkit import export

    return getattr(export, name)


def __dir__() -> list[str]:
    """Return all names, those of the exporter too."""
    return sorted({*globals(), *_OF_EXPORT})
