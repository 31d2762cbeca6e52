"""`gptq`: round the weights so that the errors of one are made up for by the others."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit.errors import QatkitError
from qatkit.kernels.portable import along
from qatkit.nn import QuantConv1d, QuantConv2d, QuantLinear
from qatkit.nn.quantized import QuantizedWeight
from qatkit.ptq.report import Change, PtqReport
from qatkit.ptq.restoring import restoring
from qatkit.ptq.runs import Runs

_POSITIONS = 64
"""So many places of an image tell what a convolution reads."""

_CELL = 0.45
"""In steps: how far from the middle of its cell a weight may stay, so that it rounds as decided."""


def gptq(
    model: nn.Module,
    data: Iterable[Any],
    *,
    batches: int | None = None,
    bits_below: int = 8,
    damping: float = 0.01,
) -> PtqReport:
    r"""Choose the codes of the weights by what they do to the outputs of their layers.

    Layer by layer, in the order of their calls, each reading what the layers before it, already
    rounded, give: with the inputs ``X`` of a layer, ``H = X X^T + damping * mean(diag(X X^T))``,
    the columns of the weight are rounded one after the other, and the error of each,
    ``e_j = (w_j - q_j) / U_jj`` with ``U^T U = H^{-1}`` (U upper triangular), is taken off the
    columns that are still to come, ``w_k -= e_j U_jk``.

    Weights move no further than needed to round to their new codes, so that training may go on from
    there. Their ranges stay: those that follow the weights are frozen. Convolutions over one and
    two dimensions and linear layers of fewer than ``bits_below`` bits take part; batch norms,
    biases and activations are left alone. Calibrate before.

    Args:
        model: a prepared and calibrated model.
        data: yields batches, as for `qatkit.calibrate`; it is gone through once for each layer, so
            that it is kept in memory. A thousand samples do.
        batches: use only so many; ``None`` for all.
        bits_below: leave weights of so many bits, or more, alone.
        damping: what is added to the diagonal, as a share of its mean.

    Returns:
        for each layer the error of its output relative to the output (root of the squares): of
        rounding each weight to the nearest code, and of the codes that were chosen.

    Raises:
        QatkitError: the model has no quantizers, the data has no batches or is not finite, or
            ``damping`` is not positive; the model is then as before.

    Source: Frantar et al. 2022 (arXiv:2210.17323).

    >>> from qatkit import QuantConfig, calibrate, prepare
    >>> from qatkit.config import WEIGHT
    >>> net, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(64, 8)
    >>> net = prepare(net, x, QuantConfig(weight=WEIGHT.replace(num_bits=3)))
    >>> _ = calibrate(net, [x], progress=False)
    >>> report = gptq(net, [x])
    >>> report.changes[0].after <= report.changes[0].before
    True
    """
    runs = Runs.read(model, data, batches, "gptq")
    if not damping > 0:
        raise QatkitError(f"gptq(damping={damping!r}): give a positive share, such as 0.01")
    with restoring(model), torch.no_grad():
        changes = [
            Change(path, *_round(layer, _hessian(runs, path, layer, calls), damping))
            for path, layer, calls in _in_order(runs, bits_below)
        ]
    return PtqReport("gptq", "error of the output relative to the output", tuple(changes))


def _in_order(runs: Runs, bits_below: int) -> list[tuple[str, QuantizedWeight, int]]:
    """Return path, layer and number of calls of what to round, in the order of the first calls."""
    calls: dict[tuple[str, QuantizedWeight], int] = {}
    with ExitStack() as stack:
        for path, layer in runs.model.named_modules():
            if not isinstance(layer, QuantConv1d | QuantConv2d | QuantLinear):
                continue
            quantizer = layer.weight_quantizer
            if not quantizer.quantize or quantizer.spec.num_bits >= bits_below:
                continue

            def note(called: nn.Module, given: Any, path: str = path) -> None:
                assert isinstance(called, QuantizedWeight)
                calls[path, called] = calls.get((path, called), 0) + 1

            stack.callback(layer.register_forward_pre_hook(note).remove)
        runs.run(0)
    return [(path, layer, count) for (path, layer), count in calls.items()]


def _hessian(runs: Runs, path: str, layer: QuantizedWeight, calls: int) -> Tensor:
    """Return ``X X^T`` of what a layer reads: (groups, K, K) float64."""
    total: list[Tensor] = []

    def add(called: nn.Module, given: tuple[Tensor, ...]) -> None:
        x_GKN = _columns(layer, layer.quantized_input(given[0]).float())
        product = torch.bmm(x_GKN, x_GKN.transpose(1, 2)).double()
        total[:] = [product if not total else total[0] + product]

    handle = layer.register_forward_pre_hook(add)
    try:
        runs.until(layer, calls)
    finally:
        handle.remove()
    if not torch.isfinite(total[0]).all():
        raise QatkitError(f"gptq: {path} reads NaN or infinity; give finite data")
    return total[0]


def _columns(layer: QuantizedWeight, x: Tensor) -> Tensor:
    """Return what the rows of the weight are multiplied with: (groups, K, N)."""
    if isinstance(layer, QuantLinear):
        return x.reshape(1, -1, x.shape[-1]).transpose(1, 2)
    assert isinstance(layer, QuantConv1d | QuantConv2d)
    lengths = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, lengths, mode=mode)
    size, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if isinstance(layer, QuantConv1d):
        x = x.reshape(-1, *x.shape[-2:]).unsqueeze(2)
        size, stride, dilation = (1, *size), (1, *stride), (1, *dilation)
    x_NKL = F.unfold(x, size, dilation=dilation, stride=stride)
    if x_NKL.dim() == 2:
        x_NKL = x_NKL[None]
    step = max(1, x_NKL.shape[2] // _POSITIONS)
    x_NKL = x_NKL[:, :, :: step | 1]  # odd, so that all columns of an image take part
    return x_NKL.permute(1, 0, 2).reshape(layer.groups, x_NKL.shape[1] // layer.groups, -1)


def _round(layer: QuantizedWeight, h_GKK: Tensor, damping: float) -> tuple[float, float]:
    """Choose the codes of a layer and move its weight there; return the errors."""
    quantizer = layer.weight_quantizer
    spec = quantizer.spec
    fold = layer.weight_fold_scale()
    raw = layer.weight.float() if fold is None else layer.weight.float() * fold
    grid = quantizer.grid_for(raw)
    assert grid is not None, "a weight always has a range"
    if quantizer.observe != "never" and not spec.learned:
        _freeze(quantizer, grid[0])
    groups, inputs = h_GKK.shape[:2]
    wide = torch.as_tensor(along(grid[0].double(), raw, spec.axis)).expand_as(raw)
    w_GOK, scale_GOK = (each.double().reshape(groups, -1, inputs) for each in (raw, wide))
    ends = spec.quant_min, spec.quant_max
    nearest = torch.round(w_GOK / scale_GOK).clamp(*ends)
    codes = _codes(w_GOK, scale_GOK, h_GKK, damping, ends)
    errors = [_energy(w_GOK - each * scale_GOK, h_GKK) for each in (nearest, codes)]
    better = errors[1] <= errors[0]  # clipping, or few samples, may make it worse
    codes = torch.where(better[:, :, None], codes, nearest)
    low, high = ((codes + side * _CELL) * scale_GOK for side in (-1, 1))
    moved = torch.minimum(torch.maximum(w_GOK, low), high).reshape(raw.shape)
    if fold is not None:
        moved = moved / fold
    stays = (codes == nearest).reshape(raw.shape)
    layer.weight.copy_(torch.where(stays, layer.weight, moved.to(layer.weight.dtype)))
    whole = float(_energy(w_GOK, h_GKK).sum())
    found = (errors[0], torch.minimum(*errors))
    before, after = ((float(each.sum()) / whole) ** 0.5 if whole > 0 else 0.0 for each in found)
    return before, after


def _freeze(quantizer: Any, scale: Tensor) -> None:
    """Let a range that follows the weight stay as it is."""
    amax = scale * quantizer.spec.quant_max
    quantizer.set_range(-amax, amax)
    quantizer.observe = "never"


def _codes(
    w_GOK: Tensor, scale_GOK: Tensor, h_GKK: Tensor, damping: float, ends: tuple[int, int]
) -> Tensor:
    """Return the codes, (groups, O, K) float64; inputs that carry most are rounded first."""
    diagonal = torch.diagonal(h_GKK, dim1=1, dim2=2)
    order_GK = diagonal.argsort(dim=1, descending=True)
    mean = diagonal.mean(1).clamp(min=torch.finfo(torch.float64).tiny)
    damped = h_GKK + torch.diag_embed((damping * mean)[:, None].expand_as(diagonal))
    inputs = h_GKK.shape[1]
    rows = order_GK[:, :, None].expand(-1, -1, inputs)
    damped = damped.gather(1, rows).gather(2, order_GK[:, None].expand(-1, inputs, -1))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    u_GKK = torch.linalg.cholesky(inverse, upper=True)
    columns = order_GK[:, None].expand_as(w_GOK)
    w, scale = w_GOK.gather(2, columns), scale_GOK.gather(2, columns)
    codes = torch.empty_like(w)
    for j in range(inputs):
        codes[:, :, j] = torch.round(w[:, :, j] / scale[:, :, j]).clamp(*ends)
        error = (w[:, :, j] - codes[:, :, j] * scale[:, :, j]) / u_GKK[:, None, j, j]
        w[:, :, j + 1 :] -= error[:, :, None] * u_GKK[:, None, j, j + 1 :]
    return torch.empty_like(codes).scatter(2, columns, codes)


def _energy(v_GOK: Tensor, h_GKK: Tensor) -> Tensor:
    """Return the squares that rows give, summed over the inputs: (groups, O) float64."""
    return (torch.bmm(v_GOK, h_GKK) * v_GOK).sum(2).clamp(min=0.0)
