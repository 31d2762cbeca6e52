"""qatkit: quantization-aware training for PyTorch, to a verified QDQ ONNX file.

In the order of use: `plan`, `prepare`, `calibrate`, training with a `QATSchedule`, `export_onnx`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from qatkit import nn
from qatkit.accumulation import quantize_weights_once
from qatkit.calibrate import calibrate
from qatkit.calibration_report import CalibrationReport
from qatkit.checkpoint import load, save
from qatkit.config import QuantConfig, Rule
from qatkit.errors import QatkitError
from qatkit.freeze import freeze_batch_norm, freeze_ranges
from qatkit.functional import fake_quantize, shrink_range
from qatkit.graph.plan import Plan
from qatkit.learned_quantizer import LearnedQuantizer
from qatkit.modes import disable_quantization, enable_quantization
from qatkit.prepare import plan, prepare
from qatkit.quantizer import TensorQuantizer
from qatkit.spec import QuantSpec
from qatkit.summary import summary
from qatkit.training.parameter_groups import parameter_groups
from qatkit.version import __version__ as __version__

if TYPE_CHECKING:
    from qatkit import ptq
    from qatkit.analysis.bit_allocation import BitAllocation, allocate_bits
    from qatkit.analysis.bit_sensitivity import BitSensitivity, bit_sensitivity
    from qatkit.analysis.sensitivity import sensitivity
    from qatkit.analysis.sensitivity_report import Sensitivity
    from qatkit.data.image_preprocess import ImagePreprocess
    from qatkit.data.input_data import InputData, load_inputs
    from qatkit.export import (
        ExportReport,
        Finding,
        VerifyReport,
        export_onnx,
        lint_onnx,
        verify_onnx,
    )
    from qatkit.training.batch_norm import reestimate_batch_norm
    from qatkit.training.distillation import Distiller
    from qatkit.training.nan_guard import NanGuard
    from qatkit.training.oscillation import OscillationTracker, oscillation_loss
    from qatkit.training.schedule import QATSchedule

__all__ = [
    "BitAllocation",
    "BitSensitivity",
    "CalibrationReport",
    "Distiller",
    "ExportReport",
    "Finding",
    "ImagePreprocess",
    "InputData",
    "LearnedQuantizer",
    "NanGuard",
    "OscillationTracker",
    "Plan",
    "QATSchedule",
    "QatkitError",
    "QuantConfig",
    "QuantSpec",
    "Rule",
    "Sensitivity",
    "TensorQuantizer",
    "VerifyReport",
    "allocate_bits",
    "bit_sensitivity",
    "calibrate",
    "disable_quantization",
    "enable_quantization",
    "export_onnx",
    "fake_quantize",
    "freeze_batch_norm",
    "freeze_ranges",
    "lint_onnx",
    "load",
    "load_inputs",
    "nn",
    "oscillation_loss",
    "parameter_groups",
    "plan",
    "prepare",
    "ptq",
    "quantize_weights_once",
    "reestimate_batch_norm",
    "save",
    "sensitivity",
    "shrink_range",
    "summary",
    "verify_onnx",
]

# Imported at their first use: the exporter alone is a third of what importing qatkit would cost.
_LATER = {
    "BitAllocation": "analysis.bit_allocation",
    "BitSensitivity": "analysis.bit_sensitivity",
    "ImagePreprocess": "data.image_preprocess",
    "InputData": "data.input_data",
    "Sensitivity": "analysis.sensitivity_report",
    "allocate_bits": "analysis.bit_allocation",
    "bit_sensitivity": "analysis.bit_sensitivity",
    "load_inputs": "data.input_data",
    "sensitivity": "analysis.sensitivity",
    "ExportReport": "export",
    "Finding": "export",
    "VerifyReport": "export",
    "export_onnx": "export",
    "lint_onnx": "export",
    "verify_onnx": "export",
    "Distiller": "training.distillation",
    "NanGuard": "training.nan_guard",
    "OscillationTracker": "training.oscillation",
    "QATSchedule": "training.schedule",
    "oscillation_loss": "training.oscillation",
    "ptq": "ptq",
    "reestimate_batch_norm": "training.batch_norm",
}


def __getattr__(name: str) -> object:
    """Import what a name is in at its first use."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_LATER[name]}")
    return module if name == _LATER[name] else getattr(module, name)


def __dir__() -> list[str]:
    """Return all names, those imported later too."""
    return sorted({*globals(), *_LATER})
