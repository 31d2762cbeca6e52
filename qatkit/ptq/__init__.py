"""Post-training quantization: algorithms over a prepared model, from a look at data, no labels."""

from __future__ import annotations

from qatkit.ptq.absorb import absorb_high_bias
from qatkit.ptq.bias_correction import correct_bias
from qatkit.ptq.equalize import equalize
from qatkit.ptq.gptq import gptq
from qatkit.ptq.migrate import migrate_scales
from qatkit.ptq.pipeline import quantize
from qatkit.ptq.reconstruction import reconstruct
from qatkit.ptq.report import Change, PtqReport
from qatkit.ptq.tune import tune
from qatkit.ptq.weight_ranges import fit_weight_ranges

__all__ = [
    "Change",
    "PtqReport",
    "absorb_high_bias",
    "correct_bias",
    "equalize",
    "fit_weight_ranges",
    "gptq",
    "migrate_scales",
    "quantize",
    "reconstruct",
    "tune",
]
