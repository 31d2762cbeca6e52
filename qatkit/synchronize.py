"""Ranges that are the same on all ranks, with one collective for each forward of a model.

In a ``torch.distributed`` run every rank sees a part of the batch. While a prepared model trains,
its quantizers estimate the ranges of what they see and queue them; when the forward of the model
ends, one small ``all_reduce`` carries the queues of all quantizers, and every rank lets the same
range join its memory.

Until then a quantizer uses the memory of the forward before: at every moment all ranks are on the
same grids, and the ranges follow the data one forward later than in one process. Only while there
is no memory at all, in the first forward of a model that was not calibrated, does it use the range
of its own part; and with ``memory="batch"`` always, which is what that asks for.

The collective does not depend on what a rank has seen. A rank that skips a layer, or whose tensor
is empty or NaN, takes part in it and adds nothing. Frozen ranges, eval mode, and weights, which are
the same on all ranks anyway, cost none. ``DistributedDataParallel`` may broadcast the buffers: they
are equal, and the queues are not among them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qatkit.quantizer import TensorQuantizer
from qatkit.ranks import range_of_parts, stacked_over_ranks, world_size
from qatkit.recompute import is_recomputing


class RangeSynchronizer:
    """Opens the queues of some quantizers when a model's forward starts, empties them at its end.

    It hangs on the model as hooks: it goes where the model goes, also by pickle and deepcopy, and
    does nothing in a run of one process. A forward that calls the model again (a wrapper does) is
    one forward. A part of the model that is called by itself is no forward of the model: there each
    quantizer asks the other ranks at once.

    Args:
        model: its calls are the forwards.
        quantizers: those of activations; the order has to be the same on all ranks.
    """

    def __init__(self, model: nn.Module, quantizers: list[TensorQuantizer]) -> None:
        """Hang on the model."""
        self._quantizers = quantizers
        self._depth = 0
        # Kept because a pickled hook without its handle may lose its number to another hook.
        self._handles = (
            model.register_forward_pre_hook(self._open),
            model.register_forward_hook(self._synchronize),
            model.register_forward_hook(self._close, always_call=True),
        )

    def _open(self, *_: Any) -> None:
        if self._depth == 0 and not self._is_due():
            return
        self._depth += 1
        if self._depth == 1:
            for quantizer in self._quantizers:
                quantizer.queue = []

    def _is_due(self) -> bool:
        if world_size() == 1 or is_recomputing():
            return False
        return any(each.training and each.observing for each in self._quantizers)

    def _synchronize(self, *_: Any) -> None:
        if self._depth == 1:
            _join_memory(self._quantizers)

    def _close(self, *_: Any) -> None:
        """End the forward; after an exception what was queued is dropped."""
        if self._depth == 0:
            return
        self._depth -= 1
        if self._depth == 0:
            for quantizer in self._quantizers:
                quantizer.queue = None


@torch.no_grad()
def _join_memory(quantizers: list[TensorQuantizer]) -> None:
    """Let what all ranks have queued join the memory of each quantizer, as one batch."""
    device = quantizers[0].num_batches.device
    mine = torch.cat([_summary(each).flatten().to(device) for each in quantizers])
    parts, start = stacked_over_ranks(mine), 0
    for quantizer in quantizers:
        end, size = quantizer.range[0], 3 * quantizer.range[0].numel()
        own = parts[:, start : start + size].to(end.device)
        start += size
        lows, highs, calls = own.reshape(len(parts), 3, *end.shape).unbind(1)
        quantizer.remember(*range_of_parts(lows, highs, quantizer.spec), calls.sum() > 0)


def _summary(quantizer: TensorQuantizer) -> Tensor:
    """Return ``(low, high, calls)`` of what was queued, (3, ...) float32."""
    queue = quantizer.queue
    if not queue:
        end = quantizer.range[0]
        return torch.zeros_like(end).expand(3, *end.shape)
    lows, highs = (torch.stack(ends) for ends in zip(*queue, strict=True))
    low, high = range_of_parts(lows, highs, quantizer.spec)
    return torch.stack((low, high, torch.full_like(low, float(len(queue)))))
