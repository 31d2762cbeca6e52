"""Freeze ranges and batch norm statistics, for a while or for good."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.modes import Mode, Undo, quantizers, require_module, select_quantizers
from qatkit.nn.batchnorm import (
    batch_norms,
    freeze_statistics,
    statistics_are_frozen,
    thaw_statistics,
)
from qatkit.nn.weights import Weight, weights_of
from qatkit.prepare import weight_quantizers
from qatkit.quantizer import TensorQuantizer

logger = logging.getLogger(__name__)


def freeze_ranges(model: nn.Module) -> Mode:
    """Quantize with the ranges as they are now: no forward changes them any more, also in training.

    The range of a weight, which follows the weight otherwise, stays the one of the weight at this
    moment. Quantizers that are frozen already keep their range.

    Args:
        model: a prepared model.

    Returns:
        a context manager, which restores each quantizer; call its ``apply()`` to make the change
        stick.

    Raises:
        QatkitError: the model has no quantizers; or, when the change is made, a quantizer that is
            switched on has no range yet. Nothing is frozen then.

    >>> from qatkit.nn import QuantLinear
    >>> layer = QuantLinear(2, 2).train()
    >>> with freeze_ranges(layer):
    ...     pass
    Traceback (most recent call last):
    qatkit.errors.QatkitError: freeze_ranges: 'input_quantizer' has no range; run ...
    >>> _ = layer(torch.ones(1, 2))
    >>> freeze_ranges(layer).apply()
    >>> layer.input_quantizer.observe
    'never'
    """
    select_quantizers(model, "*", "freeze_ranges")

    def change() -> Undo:
        missing = _without_range(model)
        if missing:
            more = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
            raise QatkitError(
                f"freeze_ranges: {missing[0]!r}{more} has no range; run "
                "qatkit.calibrate(model, data) or train first, "
                f"or qatkit.disable_quantization(model, {missing[0]!r}).apply()"
            )
        return _freeze(list(_freezable(model).values()), list(weights_of(model)))

    return Mode(change)


def freeze_known_ranges(model: nn.Module) -> None:
    """Freeze the ranges there are, for good, and name the quantizers without one in the log.

    Args:
        model: a prepared model.
    """
    missing = set(_without_range(model, switched_off=True))
    if missing:
        logger.warning(
            "not frozen, because they have seen no data: %s; qatkit.calibrate(model, data) gives "
            "them a range",
            ", ".join(sorted(missing)),
        )
    freezable = _freezable(model).items()
    _freeze([each for path, each in freezable if path not in missing], list(weights_of(model)))


def freeze_batch_norm(model: nn.Module) -> Mode:
    """Let batch norms use their running statistics and leave them alone, also in training.

    Weight and bias still train, ``training`` flags are not touched, and ``model.train()`` changes
    nothing about it. Batch norms without running statistics cannot be frozen and stay as they are.

    Args:
        model: any model, prepared or not.

    Returns:
        a context manager, which thaws those that were not frozen before; call its ``apply()`` to
        make the change stick.

    Raises:
        QatkitError: the model is not a ``torch.nn.Module``.

    >>> net = nn.Sequential(nn.BatchNorm1d(2)).train()
    >>> with freeze_batch_norm(net):
    ...     _ = net(torch.ones(3, 2))
    >>> net[0].running_mean
    tensor([0., 0.])
    """
    require_module(model, "freeze_batch_norm")

    def change() -> Undo:
        thawed = [norm for _, norm in batch_norms(model) if not statistics_are_frozen(norm)]
        for norm in thawed:
            freeze_statistics(norm)

        def undo() -> None:
            for norm in thawed:
                thaw_statistics(norm)

        return undo

    return Mode(change)


def _freezable(model: nn.Module) -> dict[str, TensorQuantizer]:
    """Return the quantizers by path, but those of weights that a forward computes.

    Their range is that of the weight at hand, which only the next forward knows.
    """
    parameters = {id(weight.quantizer) for weight in weights_of(model)}
    weights = weight_quantizers(model)
    computed = {path for path, each in weights.items() if id(each) not in parameters}
    return {path: each for path, each in quantizers(model) if path not in computed}


def _without_range(model: nn.Module, *, switched_off: bool = False) -> list[str]:
    """Return the paths of the quantizers that would need a range and have none."""
    follows = {id(weight.quantizer) for weight in weights_of(model)}
    return [
        path
        for path, quantizer in quantizers(model)
        if (quantizer.quantize or switched_off)
        and id(quantizer) not in follows
        and not quantizer.has_range
    ]


def _freeze(frozen: list[TensorQuantizer], weights: list[Weight]) -> Undo:
    """Freeze quantizers, those of ``weights`` with the range of the weight at hand."""
    followers = [
        weight
        for weight in weights
        if weight.quantizer.observe != "never" or not weight.quantizer.calibrated
    ]
    modes = [(quantizer, quantizer.observe) for quantizer in frozen]
    ranges = [(weight.quantizer, saved_range(weight.quantizer)) for weight in followers]

    def undo() -> None:
        for quantizer, mode in modes:
            quantizer.observe = mode
        for quantizer, state in ranges:
            quantizer.load_state_dict(state)

    try:
        for weight in followers:
            remember_weight_range(weight)
    except BaseException:
        undo()
        raise
    for quantizer in frozen:
        quantizer.observe = "never"
    return undo


def saved_range(quantizer: TensorQuantizer) -> dict[str, Tensor]:
    """Return a copy of the remembered range, for ``quantizer.load_state_dict``."""
    return {name: buffer.clone() for name, buffer in quantizer.state_dict().items()}


def remember_weight_range(weight: Weight) -> None:
    """Let the weight quantizer remember the range of the weight as it sees it."""
    quantizer = weight.quantizer
    before = quantizer.observe, quantizer.quantize
    quantizer.observe, quantizer.quantize = "always", False
    try:
        with torch.no_grad():
            quantizer(weight.seen)
    finally:
        quantizer.observe, quantizer.quantize = before
