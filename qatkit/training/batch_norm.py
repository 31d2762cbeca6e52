"""`reestimate_batch_norm`: the running statistics of batch norms anew, for the weights there are.

While weights train, running statistics lag behind, the more so the coarser the grid is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qatkit.errors import QatkitError
from qatkit.freeze import remember_weight_range
from qatkit.modes import quantizers, require_module, training_flags
from qatkit.nn.batchnorm import (
    batch_norms,
    freeze_statistics,
    statistics_are_frozen,
    thaw_statistics,
)
from qatkit.nn.weights import weights_of
from qatkit.running import check_data, require_batches, run_over, uncompiled

logger = logging.getLogger(__name__)

_VERB = "reestimate_batch_norm"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def reestimate_batch_norm(
    model: nn.Module, data: Iterable[Any], *, batches: int | None = None, progress: bool = True
) -> tuple[str, ...]:
    """Set the running statistics to mean and variance over all the data, with the weights of now.

    Every element counts alike, as if the data were one batch: the mean is that of all elements of a
    channel and the variance is the unbiased one around it. Meanwhile batch norms normalize with the
    statistics of each batch, as in training; everything else runs as in eval, quantized as it is
    switched, and no range changes. Frozen batch norms are estimated too and stay frozen. A frozen
    range of a weight with a batch norm folded in follows the new variance at the end.

    Flags, momentum and modes are afterwards as before. If anything goes wrong the statistics are as
    before too. In a distributed run the statistics are those of the data of all processes.

    Args:
        model: any model, prepared or not, or a wrapper around it.
        data: yields batches, as for `qatkit.calibrate`; those of the training, without augmentation
            if it was light.
        batches: use only so many; ``None`` for all.
        progress: show a progress bar if tqdm is installed and the output is a terminal.

    Returns:
        paths of the batch norms with new statistics, none for a model without batch norms. The log
        names those that no data reached; they keep theirs.

    Raises:
        QatkitError: the data is empty or has no input in it, the model does not run on it, or a
            batch norm gets NaN or Inf.

    Source: Wu and Johnson 2021 (arXiv:2105.07576), section 3 (precise batch norm); Nagel et al.
        2022 (arXiv:2203.11086), section 3 (after quantization-aware training).

    >>> net = nn.Sequential(nn.BatchNorm1d(1))
    >>> reestimate_batch_norm(net, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
    ('0',)
    >>> net[0].running_mean.item(), round(net[0].running_var.item(), 4)
    (4.0, 6.6667)
    """
    require_module(model, _VERB)
    check_data(data, batches, _VERB)
    norms = dict(batch_norms(model))
    if not norms:
        return ()
    moments = {path: _Moments(path) for path in norms}
    with ExitStack() as stack:
        stack.enter_context(_statistics_kept(norms.values()))
        stack.enter_context(training_flags(model.modules(), False))
        stack.enter_context(_ranges_kept(model))
        stack.enter_context(_with_batch_statistics(norms.values()))
        for path, norm in norms.items():
            handle = norm.register_forward_pre_hook(_adding_to(moments[path]))
            stack.callback(handle.remove)
        stack.enter_context(uncompiled())
        require_batches(run_over(model, data, batches, _VERB, progress=progress)[0], _VERB)
    _share_between_ranks(list(moments.values()))
    reached = tuple(path for path in norms if moments[path].count)
    if len(reached) < len(norms):
        missed = ", ".join(path for path in norms if path not in reached)
        logger.warning("%s: no data reached %s; their statistics are as before", _VERB, missed)
    for path in reached:
        _set_statistics(norms[path], moments[path])
    _follow(model, {id(norms[path]) for path in reached})
    return reached


class _Moments:
    """Count, mean and sum of squared deviations for each channel, float64 on the CPU.

    Source: Chan, Golub and LeVeque 1979, updating formulae for a pairwise algorithm.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.count = 0.0
        self.batches = 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Add (N, C, ...) elements."""
        count = x.numel() / x.shape[1]
        if not count:
            return
        axes = [axis for axis in range(x.dim()) if axis != 1]
        var, mean = torch.var_mean(x.detach().float(), axes, correction=0)
        both = torch.stack((mean, var)).cpu().double()
        if not bool(torch.isfinite(both).all()):
            raise QatkitError(
                f"{_VERB}: NaN or Inf in the input of {self.path!r} in batch {self.batches}; "
                "leave such batches out"
            )
        self.merge(count, both[0], both[1] * count)
        self.batches += 1

    def merge(self, count: float, mean: Tensor, squares: Tensor) -> None:
        """Add what was summed up elsewhere."""
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.squares = self.squares + squares + delta.square() * (self.count * count / total)
        self.count = total


def _adding_to(moments: _Moments) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        moments.add(args[0])

    return add


@contextmanager
def _statistics_kept(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Give the batch norms back the statistics that they had."""
    saved = [
        (buffer, buffer.clone())
        for norm in norms
        for name in _STATISTICS
        if (buffer := getattr(norm, name)) is not None
    ]
    try:
        yield
    finally:
        for buffer, before in saved:
            buffer.copy_(before)


@contextmanager
def _with_batch_statistics(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Let batch norms normalize with the statistics of the batch and leave their own alone."""
    saved = [(norm, norm.momentum, statistics_are_frozen(norm)) for norm in norms]
    try:
        for norm, _, _ in saved:
            thaw_statistics(norm)
            norm.training, norm.momentum = True, 0.0
        yield
    finally:
        for norm, momentum, frozen in saved:
            norm.momentum = momentum
            if frozen:
                freeze_statistics(norm)


@contextmanager
def _ranges_kept(model: nn.Module) -> Iterator[None]:
    """Let no quantizer observe, given that all are in eval."""
    always = [each for _, each in quantizers(model) if each.observe == "always"]
    try:
        for quantizer in always:
            quantizer.observe = "training"
        yield
    finally:
        for quantizer in always:
            quantizer.observe = "always"


def _share_between_ranks(moments: list[_Moments]) -> None:
    """Let all processes have the moments of all data."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    if distributed.get_world_size() == 1:
        return
    plain = [(each.path, each.count, each.mean, each.squares) for each in moments]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, plain)
    for index, each in enumerate(moments):
        own = _Moments(each.path)
        for rank in gathered:
            _, count, mean, squares = rank[index]
            if count:
                own.merge(count, mean, squares)
        each.count, each.mean, each.squares = own.count, own.mean, own.squares


def _set_statistics(norm: _BatchNorm, moments: _Moments) -> None:
    statistics: Mapping[str, Tensor | None] = norm._buffers
    mean, var = statistics["running_mean"], statistics["running_var"]
    assert mean is not None
    assert var is not None
    with torch.no_grad():
        mean.copy_(moments.mean)
        var.copy_(moments.squares / max(1.0, moments.count - 1))


def _follow(model: nn.Module, changed: set[int]) -> None:
    """Let the frozen ranges of folded weights be those of the weight as it is folded now."""
    for weight in weights_of(model):
        folded = weight.layer is not None and weight.layer.weight_fold_scale() is not None
        norm = None if weight.layer is None else weight.layer.batch_norm
        frozen = weight.quantizer.observe == "never" and weight.quantizer.spec.observer != "fixed"
        learned = any(True for _ in weight.quantizer.parameters())
        if folded and id(norm) in changed and frozen and not learned:
            remember_weight_range(weight)
