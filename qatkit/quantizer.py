"""`TensorQuantizer`: the module that fake-quantizes one tensor and remembers its range."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.functional import fake_quantize, fake_quantize_unclipped, qparams
from qatkit.kernels import is_eager_cpu
from qatkit.observers import OBSERVERS, is_empty, update
from qatkit.spec import QuantSpec

Observe = Literal["training", "always", "never"]

NO_RANGE = (
    "a quantizer without a range passes its input through unquantized; "
    "run qatkit.calibrate(model, data) first, qatkit.summary(model) lists them"
)


class TensorQuantizer(nn.Module):
    """Fake-quantize a tensor: ``y = dequantize(quantize(x))`` with a straight-through gradient.

    Two switches, as in ``torch.ao``: `quantize` turns the fake quantization on or off, `observe`
    says when the range is estimated anew: in training mode, always (calibration) or never (frozen).
    In eval, and when frozen, no buffer ever changes. A quantizer that has no range yet passes its
    input through and warns once.

    Quantizers whose tensors are copies of each other (two sides of a max-pool, parts of a
    concatenation) share one scale: each remembers its own tensor, and all quantize with the union
    of their ranges (`share_range`).

    Args:
        spec: the integer grid and the observer.
        channels: length of ``spec.axis``; needed when there is one, so that the buffers have their
            final shape.
        device: where the buffers live.

    Attributes:
        spec: as given.
        name: path in the model, for messages.
        min_val: () or (channels,) float32, lower end of the remembered range.
        max_val: the upper end.
        num_batches: () int64, how many tensors the range has seen; 0 means no range.

    Raises:
        QatkitError: ``channels`` is missing or there is no axis for it.

    >>> quantizer = TensorQuantizer(QuantSpec(observer="minmax"))
    >>> quantizer(torch.tensor([-1.0, 0.3, 1.0]))
    tensor([-1.0000,  0.2992,  1.0000])
    >>> round(quantizer.scale.item(), 6)
    0.007874
    """

    min_val: Tensor
    max_val: Tensor
    num_batches: Tensor

    def __init__(
        self, spec: QuantSpec, channels: int | None = None, *, device: torch.device | None = None
    ) -> None:
        """Make a quantizer with no range."""
        super().__init__()
        if spec.per_channel != (channels is not None):
            raise QatkitError(
                f"TensorQuantizer(axis={spec.axis}, channels={channels}): "
                "give the number of channels exactly when the spec has an axis"
            )
        shape = () if channels is None else (channels,)
        self.spec = spec
        self.name = ""
        self.quantize = True
        self.observe: Observe = "training"
        self._has_range = spec.observer == "fixed"
        self._peers: tuple[TensorQuantizer, ...] = ()
        low, high = spec.fixed_range or (0.0, 0.0)
        self.register_buffer("min_val", torch.full(shape, low, device=device))
        self.register_buffer("max_val", torch.full(shape, high, device=device))
        count = torch.tensor(int(self._has_range), dtype=torch.int64, device=device)
        self.register_buffer("num_batches", count)

    @property
    def calibrated(self) -> bool:
        """Whether it has seen data itself; reads the device once, until it has."""
        if not self._has_range and not torch.compiler.is_compiling():
            self._has_range = bool(self.num_batches > 0)
        return self._has_range

    @property
    def has_range(self) -> bool:
        """Whether there is a range to quantize with: its own, or one of the peers'."""
        return self.calibrated or any(peer.calibrated for peer in self._peers)

    @property
    def observing(self) -> bool:
        """Whether the next forward estimates the range anew."""
        return self.observe == "always" or (self.observe == "training" and self.training)

    @property
    def peers(self) -> tuple[TensorQuantizer, ...]:
        """The other quantizers with the same scale."""
        return self._peers

    @property
    def range(self) -> tuple[Tensor, Tensor]:
        """The range to quantize with: the remembered one, united with those of the peers."""
        return self._with_peers(self.min_val, self.max_val)

    @property
    def scale(self) -> Tensor:
        """The step of the grid: () or (channels,) float32."""
        return qparams(*self.range, self.spec)[0]

    @property
    def zero_point(self) -> Tensor:
        """The code of 0.0: () or (channels,) int32."""
        return qparams(*self.range, self.spec)[1]

    @property
    def amax(self) -> Tensor:
        """The largest magnitude in the range: () or (channels,) float32."""
        low, high = self.range
        return torch.maximum(low.abs(), high.abs())

    def forward(self, x: Tensor, part: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """Return ``x`` on the grid: same shape, dtype and memory format.

        Args:
            x: the tensor.
            part: (n, *x.shape[1:]) rows of ``x``: they are returned in its place, on its grid.
            at: (n,) their indices.
        """
        batch = self._observe(x) if self.observing else None
        wanted = x if part is None else part
        if not self.quantize:
            return wanted
        chosen = self._range_for(x, batch)
        if chosen is None:  # while observing: nothing but empty or NaN tensors so far
            if not self.observing:
                warnings.warn(NO_RANGE, stacklevel=2)
            return wanted
        if at is not None and self.spec.axis == 0:
            chosen = chosen[0][at], chosen[1][at]
        return self._on_grid(wanted, chosen)

    def unobserved(self, x: Tensor) -> Tensor:
        """Return ``x`` on the grid that there is, or as it is while there is none.

        For a part of what the quantizer is going to observe as a whole.
        """
        chosen = self._range_for(x, None) if self.quantize else None
        return x if chosen is None else self._on_grid(x, chosen)

    def _on_grid(self, x: Tensor, chosen: tuple[Tensor, Tensor]) -> Tensor:
        spec = self.spec
        scale, zero_point = qparams(*chosen, spec)
        if self._covers_all:
            return fake_quantize_unclipped(x, scale, spec.axis)
        center = 0 if spec.symmetric else zero_point
        return fake_quantize(x, scale, center, spec.quant_min, spec.quant_max, spec.axis)

    @property
    def _covers_all(self) -> bool:
        """Whether the range is that of the tensor itself, so that nothing is clipped."""
        spec = self.spec
        own_range = (
            spec.memory == "latest" and self.observe != "never" and spec.observer == "minmax"
        )
        return own_range and spec.symmetric and spec.signed and not spec.power_of_two

    def grid_for(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the ``(scale, zero_point)`` for ``x`` in eval; ``None`` without a range."""
        chosen = self._range_for(x, None)
        return None if chosen is None else qparams(*chosen, self.spec)

    def set_range(self, low: Tensor | float, high: Tensor | float) -> None:
        """Set the remembered range by hand.

        Args:
            low: lower end, a number or a tensor of the shape of `min_val`.
            high: upper end.

        Raises:
            QatkitError: not finite, or low > high.
        """
        ends = [torch.as_tensor(end, dtype=torch.float32).detach() for end in (low, high)]
        if not all(bool(torch.isfinite(end).all()) for end in ends) or bool(
            (ends[0] > ends[1]).any()
        ):
            where = self.name or "TensorQuantizer"
            raise QatkitError(
                f"{where}: range {low} .. {high}: give finite numbers with low <= high"
            )
        with torch.no_grad():
            self.min_val.copy_(ends[0].expand_as(self.min_val))
            self.max_val.copy_(ends[1].expand_as(self.max_val))
            self.num_batches.fill_(1)
        self._has_range = True

    def reset_range(self) -> None:
        """Forget the range."""
        with torch.no_grad():
            for buffer in (self.min_val, self.max_val, self.num_batches):
                buffer.zero_()
        self._has_range = False
        if self.spec.fixed_range is not None:
            self.set_range(*self.spec.fixed_range)

    def extra_repr(self) -> str:
        """Show the grid and the state."""
        spec = self.spec
        axis = "" if spec.axis is None else f", axis={spec.axis}"
        state = "" if self.quantize else ", off"
        frozen = ", frozen" if self.observe == "never" else ""
        return f"{spec.num_bits} bit, {spec.observer}{axis}{state}{frozen}"

    def _range_for(
        self, x: Tensor, batch: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor] | None:
        """Return the range to quantize ``x`` with; ``batch`` is the estimate of this forward."""
        if self.spec.memory == "latest" and self.observe != "never":
            return self._estimate(x) if batch is None else batch
        if not self.has_range:
            return None
        if self.spec.memory == "batch" and batch is not None and self.training:
            return self._with_peers(*batch)
        return self.range

    def _with_peers(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Unite a range with those that the peers remember."""
        for peer in self._peers:
            low, high = torch.minimum(low, peer.min_val), torch.maximum(high, peer.max_val)
        return low, high

    def _estimate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return OBSERVERS[self.spec.observer].estimate(x.detach(), self.spec)

    def _observe(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Estimate the range of ``x`` and remember it; return the estimate."""
        with torch.no_grad():
            low, high = self._estimate(x)
            alone = self.spec.memory == "latest" or not self.training or _world_size() == 1
            if alone and _saw_nothing(x, high):  # no rank may stay away from a collective
                return low, high
            if not alone:
                low, high = _mean_over_ranks(low, high)
            if self.spec.memory == "latest":
                self.min_val.copy_(low)
                self.max_val.copy_(high)
                self.num_batches.add_(1)
            else:
                state = (self.min_val, self.max_val, self.num_batches)
                update(OBSERVERS[self.spec.observer].remember, state, (low, high), self.spec)
        self._has_range = True
        return low, high

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TensorQuantizer:
        """Move the buffers and keep their types: ``model.half()`` must not round the ranges."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load the buffers; a checkpoint of the float model lacks them and is complete too."""
        if not any(prefix + name in state_dict for name in self._buffers):
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._has_range = bool(self.num_batches > 0)


def share_range(quantizers: list[TensorQuantizer]) -> None:
    """Let ``quantizers`` quantize with the union of their ranges, so that they have one scale.

    Raises:
        QatkitError: their specs have different grids.
    """
    grids = {quantizer.spec.grid for quantizer in quantizers}
    if len(grids) > 1:
        names = ", ".join(q.name for q in quantizers)
        raise QatkitError(
            f"{names}: one scale for different grids {grids}; give them one QuantSpec"
        )
    for quantizer in quantizers:
        quantizer._peers = tuple(peer for peer in quantizers if peer is not quantizer)


def _saw_nothing(x: Tensor, high: Tensor) -> bool:
    """Tell whether ``x`` has no finite element; where that would cost a host sync, no element."""
    if x.numel() == 0:
        return True
    if not is_eager_cpu(x) or high.dim() or high != 0:
        return False
    return not bool(torch.isfinite(x).any())


def _world_size() -> int:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def _mean_over_ranks(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the range averaged over the ranks that saw data, so that all hold the same one."""
    seen = torch.logical_not(is_empty(low, high)).to(low.dtype)
    total = torch.stack((low, high, seen))
    torch.distributed.all_reduce(total)
    count = total[2].clamp(min=1.0)
    return total[0] / count, total[1] / count
