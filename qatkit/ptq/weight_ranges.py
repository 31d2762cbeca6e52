"""Ranges of weights: with the least squared error, and held fast."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qatkit.freeze import remember_weight_range
from qatkit.kernels.portable import along
from qatkit.modes import select_quantizers
from qatkit.nn.weights import Weight, weights_of
from qatkit.observers.starts import least_squares
from qatkit.ptq.report import Change, PtqReport
from qatkit.ptq.restoring import restoring
from qatkit.quantizer import TensorQuantizer


def fit_weight_ranges(model: nn.Module, *, bits_below: int = 17) -> PtqReport:
    """Give each quantized weight the range with the least squared error, and freeze it.

    With few bits it pays to clip the largest weights: the steps get finer for all others. Symmetric
    grids only; another one is frozen at the range of the weight.

    Args:
        model: a prepared model.
        bits_below: leave weights of so many bits, or more, alone.

    Returns:
        the squared error of each weight over its energy.

    Raises:
        QatkitError: the model has no quantizers.

    >>> from qatkit import QuantSpec
    >>> from qatkit.nn import QuantLinear
    >>> layer = QuantLinear(64, 2, weight_spec=QuantSpec(num_bits=3, axis=0))
    >>> change = fit_weight_ranges(layer).changes[0]
    >>> change.after < change.before, layer.weight_quantizer.observe
    (True, 'never')
    """
    select_quantizers(model, "*", "fit_weight_ranges")
    changes = []
    with restoring(model), torch.no_grad():
        for weight in weights_of(model):
            if weight.quantizer.spec.num_bits >= bits_below or not weight.quantizer.quantize:
                continue
            before = relative_error(quantized(weight), weight.seen)
            spec, note = weight.quantizer.spec, ""
            if spec.observer == "fixed" or not spec.symmetric:
                pin_range(weight)
                note = "kept: fixed range" if spec.observer == "fixed" else "kept: asymmetric"
            else:
                weight.quantizer.set_range(*least_squares(weight.seen, spec))
                _hold(weight.quantizer)
            after = relative_error(quantized(weight), weight.seen)
            changes.append(Change(weight.path, before, after, note))
    return PtqReport(
        "fit_weight_ranges", "squared error of the weight over its energy", tuple(changes)
    )


def pin_range(weight: Weight) -> None:
    """Freeze the range of a weight as it is now, so that it does not follow the weight."""
    quantizer = weight.quantizer
    if quantizer.calibrated and (quantizer.observe == "never" or quantizer.spec.learned):
        return
    remember_weight_range(weight)
    _hold(quantizer)


def _hold(quantizer: TensorQuantizer) -> None:
    """Let the range stay; a learned one stays anyway until it is trained, and can be then."""
    if not quantizer.spec.learned:
        quantizer.observe = "never"


def quantized(weight: Weight) -> Tensor:
    """Return a weight, folded where its quantizer sees the fold, on its grid."""
    result: Tensor = weight.quantizer(weight.seen.detach())
    return result


def grid_of_weight(weight: Weight) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of a weight, shaped for it, float32."""
    seen = weight.seen.detach().float()
    grid = weight.quantizer.grid_for(seen)
    assert grid is not None, "a weight always has a range"
    axis = weight.quantizer.spec.axis
    scale, zero_point = (torch.as_tensor(along(each.float(), seen, axis)) for each in grid)
    return scale, zero_point


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return ``|found - wanted|^2 / |wanted|^2``; with nothing wanted, ``|found|^2``."""
    wanted = wanted.detach().float()
    error = (found.detach().float() - wanted).square().sum(dtype=torch.float64)
    energy = wanted.square().sum(dtype=torch.float64)
    return float(error / energy) if energy > 0 else float(error)
