"""Other tools for quantization-aware training; each is left out, with its reason, if it fails."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from benchmarks.machine import version_of

Make = Callable[[nn.Module, Tensor], nn.Module]


def modelopt(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a model of NVIDIA ModelOpt: ranges are those of one batch and stay."""
    import modelopt.torch.quantization as mtq

    return mtq.quantize(model.eval(), mtq.INT8_DEFAULT_CFG, lambda each: each(x))


def brevitas(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a model of Brevitas with its default quantizers."""
    from brevitas.graph.quantize import preprocess_for_quantize, quantize

    return quantize(preprocess_for_quantize(model.eval()))


def torch_fx(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a model of ``torch.ao`` FX QAT with the default of x86."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    return prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping("x86"), (x[:1],))


def torch_fx_symmetric(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a model of ``torch.ao`` FX QAT with one symmetric int8 scale for each tensor."""
    from torch.ao.quantization import (
        FusedMovingAvgObsFakeQuantize,
        MovingAverageMinMaxObserver,
        QConfig,
        QConfigMapping,
    )
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    symmetric = FusedMovingAvgObsFakeQuantize.with_args(
        observer=MovingAverageMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_tensor_symmetric,
    )
    mapping = QConfigMapping().set_global(QConfig(symmetric, symmetric))
    return prepare_qat_fx(model.train(), mapping, (x[:1],))


def nncf(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a model of NNCF; it compiles its own kernels at the first step."""
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "900")
    import nncf as package

    return package.quantize(model.eval(), package.Dataset([x]), subset_size=1)


PEERS: dict[str, tuple[str, Make]] = {
    "modelopt, ranges frozen": ("nvidia-modelopt", modelopt),
    "torch.ao FX, default": ("torch", torch_fx),
    "torch.ao FX, symmetric": ("torch", torch_fx_symmetric),
    "brevitas": ("brevitas", brevitas),
    "NNCF": ("nncf", nncf),
}
"""The package and what makes a model, by label."""


def build(
    model: nn.Module, x: Tensor, names: Iterable[str] = PEERS, trial: Callable[..., object] = print
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the models of the peers, and the reason for each that is missing.

    Args:
        model: the float model; it is copied.
        x: a batch.
        names: which peers.
        trial: runs a model once; one that fails in it is left out.
    """
    models: dict[str, nn.Module] = {}
    reasons: dict[str, str] = {}
    for name in names:
        package, make = PEERS[name]
        if not version_of(package):
            reasons[name] = f"{package} is not installed"
            continue
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                made = make(copy.deepcopy(model), x).train()
                trial(made)
        except BaseException as error:  # whatever another tool raises, SystemExit too
            if isinstance(error, KeyboardInterrupt):
                raise
            text = " ".join(str(error).split())[:120]
            reasons[name] = f"{package} fails: {type(error).__name__}: {text}"
            continue
        models[name] = made
    return models, reasons
