"""`absorb_high_bias`: move what is always there from an activation into the next bias."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.nn.quantized import QuantizedWeight
from qatkit.ptq.neighbours import find_pairs, on_inputs
from qatkit.ptq.norms import norms_of
from qatkit.ptq.report import Change, PtqReport
from qatkit.ptq.restoring import restoring
from qatkit.ptq.runs import Runs
from qatkit.ptq.shifting import shift_output


def absorb_high_bias(
    model: nn.Module, data: Iterable[Any], *, sigmas: float = 3.0, batches: int | None = None
) -> PtqReport:
    """Take ``c = max(0, beta - sigmas * |gamma|)`` off a batch norm and add ``W c`` behind it.

    Where the result of a batch norm hardly ever falls below c, a ReLU passes ``x - c`` as it
    passes x; the activation then has a smaller range. Equalization can leave such channels. Only
    through ReLU, and into layers without padding, at whose borders c would be missing. The ranges
    of the tensors between are forgotten: run `qatkit.calibrate` afterwards.

    Args:
        model: a prepared model.
        data: batches as for `qatkit.calibrate`; the first shows which layer reads which.
        sigmas: standard deviations between the mean and what counts as always there.
        batches: read only so many; ``None`` for all.

    Returns:
        for each pair with anything to absorb the largest mean of a channel before and after.

    Raises:
        QatkitError: no quantizers, no data, or ``sigmas`` is negative.

    Source: Nagel et al. 2019 (arXiv:1906.04721), section 4.1.3.
    """
    if isinstance(sigmas, bool) or not isinstance(sigmas, int | float) or not sigmas >= 0:
        raise QatkitError(f"absorb_high_bias(sigmas={sigmas!r}): give a number of 0 or more")
    runs = Runs.read(model, data, batches, "absorb_high_bias")
    changes = []
    with restoring(model), torch.no_grad():
        norms = norms_of(model)
        for pair in find_pairs(runs):
            first, second = (model.get_submodule(p) for p in (pair.first, pair.second))
            assert isinstance(first, QuantizedWeight)
            assert isinstance(second, QuantizedWeight)
            norm: Any = norms.get(first)
            if norm is None or norm.bias is None or set(pair.activations) != {"relu"}:
                continue
            high = (norm.bias - sigmas * norm.weight.abs()).clamp(min=0.0).float()
            if not bool((high > 0).any()):
                continue
            before = after = float(norm.bias.abs().max())
            note = f"{int((high > 0).sum())} channels"
            if _pads(second):
                note = "left: the second layer pads"
            elif _add_behind(second, norms.get(second), high):
                norm.bias.sub_(high.to(norm.bias.dtype))
                after = float(norm.bias.abs().max())
                for path in pair.quantizers:
                    model.get_submodule(path).reset_range()  # type: ignore[operator]
            else:
                note = "left: the second layer has no bias"
            changes.append(Change(str(pair), before, after, note))
    return PtqReport(
        "absorb_high_bias", "largest mean of a channel of the batch norm", tuple(changes)
    )


def _add_behind(layer: QuantizedWeight, norm: Any, high: Tensor) -> bool:
    return shift_output(layer, norm, on_inputs(layer, layer.weight.float(), high))


def _pads(layer: nn.Module) -> bool:
    """Tell whether zeros stand at the borders of the input of a layer."""
    padding: Any = getattr(layer, "padding", 0)
    transposed = bool(getattr(layer, "transposed", False))
    if transposed:
        return True  # each border has another part of the kernel
    if isinstance(padding, str):
        kernel: Any = getattr(layer, "kernel_size", ())
        return padding != "valid" and any(size > 1 for size in kernel)
    sizes = padding if isinstance(padding, tuple) else (padding,)
    return any(size > 0 for size in sizes) and getattr(layer, "padding_mode", "zeros") == "zeros"


def mean_behind_relu(mean: Tensor, deviation: Tensor) -> Tensor:
    """Return the mean of ``relu(x)``, x normal: ``m * cdf(m / s) + s * pdf(m / s)``.

    >>> mean_behind_relu(torch.zeros(1), torch.ones(1))
    tensor([0.3989])
    """
    deviation = deviation.abs()
    z = mean / deviation.clamp(min=1e-12)
    cdf = 0.5 * (1.0 + torch.erf(z * 0.5**0.5))
    pdf = torch.exp(-0.5 * z.square()) * (0.5 / torch.pi) ** 0.5
    return torch.where(deviation > 0, mean * cdf + deviation * pdf, mean.clamp(min=0.0))
