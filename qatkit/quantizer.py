"""`TensorQuantizer`: the module that fake-quantizes one tensor and remembers its range."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.functional import (
    fake_quantize,
    fake_quantize_learned,
    fake_quantize_unclipped,
    qparams,
)
from qatkit.kernels import is_eager_cpu, is_gpu
from qatkit.kernels.cpu import (
    ActivationNumbers,
    Clip,
    GridNumbers,
    fake_quantize_activated,
    fake_quantize_on_grid,
    may_overwrite,
    remembered_grid,
)
from qatkit.kernels.cpu import observe as observe_in_loops
from qatkit.kernels.cpu.state import State
from qatkit.observers import (
    OBSERVERS,
    Grid,
    Range,
    gradient_of,
    holds_range,
    observe,
    saw_nothing,
    translated,
    update,
)
from qatkit.once import Once
from qatkit.plain_numbers import knows_activation, knows_weight, quantize_weight
from qatkit.ranks import range_of_parts, stacked_over_ranks, world_size
from qatkit.recompute import UsedRanges, is_recomputing, may_be_recomputed
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

    With a learned observer (`qatkit.spec.LEARNED`) it is a `LearnedQuantizer`.

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
        queue: where the ranges of this forward wait for those of the other ranks; ``None`` where
            they join the memory at once.

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

    once: Once | None = None
    """Keeps what became of a weight, within `qatkit.quantize_weights_once`."""
    _DONE: ClassVar[str] = "_quantized_by"
    """Names the attribute of a tensor that says which quantizer has been there already."""
    _trained: ClassVar[type[TensorQuantizer]]
    """The class that trains its range."""

    def __init_subclass__(cls, *, trained: bool = False, **more: Any) -> None:
        """Take note of the class that trains its range."""
        super().__init_subclass__(**more)
        if trained:
            TensorQuantizer._trained = cls

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
        if spec.learned and type(self) is TensorQuantizer:
            self.__class__ = TensorQuantizer._trained
        shape = () if channels is None else (channels,)
        self.spec = spec
        self.name = ""
        self.quantize = True
        self.observe: Observe = "training"
        self._has_range = spec.observer == "fixed"
        self._peers: tuple[TensorQuantizer, ...] = ()
        self.queue: list[Range] | None = None
        self._used = UsedRanges()
        bounds = spec.fixed_range or (0.0, 0.0)
        self._make_range(
            *(torch.full(shape, end, dtype=torch.float32, device=device) for end in bounds)
        )
        count = torch.tensor(int(self._has_range), dtype=torch.int64, device=device)
        self.register_buffer("num_batches", count)

    def _make_range(self, low: Tensor, high: Tensor) -> None:
        """Register what holds the range."""
        self.register_buffer("min_val", low)
        self.register_buffer("max_val", high)

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
        low, high = self._with_peers(*self._own_range())
        return low.detach(), high.detach()

    @property
    def own_range(self) -> tuple[Tensor, Tensor]:
        """The remembered range without those of the peers, learned or observed; 0, 0 for none."""
        low, high = self._own_range()
        return low.detach(), high.detach()

    @property
    def scale(self) -> Tensor:
        """The step of the grid: () or (channels,) float32."""
        return self._grid().scale.detach()

    @property
    def zero_point(self) -> Tensor:
        """The code of 0.0: () or (channels,) int32."""
        return self._grid().zero_point

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
        if part is None and not torch.compiler.is_compiling():
            if getattr(x, self._DONE, None) is self:
                return x
            quantized = self._in_plain_numbers(x)
            if quantized is not None:
                return quantized
        wanted = x if part is None else part
        if not self.quantize:
            if self.observing and not is_recomputing():
                self._observe(x)
            return wanted
        if self._fused_on_gpu(x) and part is None:
            return self._rows_on_gpu(x)
        grid = self._current_grid(x)
        if grid is None:  # while observing: nothing but empty or NaN tensors so far
            if not self.observing:
                warnings.warn(NO_RANGE, stacklevel=2)
            return wanted
        if at is not None and self.spec.axis == 0:
            grid = grid.at(at)
        return self._on_grid(wanted, grid)

    def _is_plain(self, x: Tensor) -> bool:
        return (
            self.quantize
            and type(self) is TensorQuantizer
            and is_eager_cpu(x)
            and x.dtype is torch.float32
            and x.numel() > 0
            and not self._peers
            and self.queue is None
        )

    def _in_plain_numbers(self, x: Tensor) -> Tensor | None:
        """Do the same the short way where nothing is out of the ordinary, else return ``None``."""
        numbers = knows_activation(self.spec)
        if numbers is not None:
            return self._plain_activation(x, numbers) if self._is_plain(x) else None
        if not (knows_weight(self.spec) and self._is_plain(x)):
            return None
        frozen = self.observe == "never"
        if frozen and not self.calibrated:
            return None
        observing = self.observing and not is_recomputing()
        if self.once is not None:
            again = self.once.find(x, self.min_val, self.spec, self.observe)
            if again is not None:
                if observing:
                    self.num_batches.add_(1)
                return again
        quantized = quantize_weight(x, self._state, self.spec, own=not frozen, remember=observing)
        if self.once is not None and quantized is not None:
            self.once.keep(quantized, x, self.min_val, self.spec, self.observe)
        if observing and quantized is not None and not self._has_range:
            self._has_range = True  # an assignment to a module costs more than to ask
        return quantized

    def _plain_activation(self, x: Tensor, numbers: ActivationNumbers) -> Tensor | None:
        grid = self._plain_grid(x, numbers, Clip())
        return None if grid is None else fake_quantize_on_grid(x, numbers, grid)

    def _plain_grid(self, x: Tensor, numbers: ActivationNumbers, clip: Clip) -> GridNumbers | None:
        """Return the grid for ``clip(x)``, whose range is estimated where due."""
        if not self.observing:
            return remembered_grid(self._state, numbers) if self.calibrated else None
        if is_recomputing() or may_be_recomputed() or self._asks_other_ranks:
            return None
        if observe_in_loops(x, self._state, numbers.observing, clip) is None:
            return None
        if not self._has_range:
            self._has_range = True
        return remembered_grid(self._state, numbers)

    def activated(self, x: Tensor, clip: Clip) -> Tensor | None:
        """Return what `forward` returns for ``clip(x)``, in the memory of ``x``.

        A call with the result returns it as it is. So an activation and the quantizer behind it
        take one pass over memory, where nothing else reads ``x`` nor ``clip(x)``.

        Args:
            x: the tensor in front of the activation.
            clip: the activation.

        Returns:
            The result, ``None`` where one pass does not do; nothing has happened then.
        """
        numbers = knows_activation(self.spec)
        if numbers is None or not self._is_plain(x) or not may_overwrite(x):
            return None
        grid = self._plain_grid(x, numbers, clip)
        if grid is None:
            return None
        y = fake_quantize_activated(x, numbers, grid, clip)
        setattr(y, self._DONE, self)
        return y

    def unobserved(self, x: Tensor) -> Tensor:
        """Return ``x`` on the grid that there is, or as it is while there is none.

        For a part of what the quantizer is going to observe as a whole.
        """
        grid = self._grid_for(x) if self.quantize else None
        return x if grid is None else self._on_grid(x, grid)

    def _on_grid(self, x: Tensor, grid: Grid) -> Tensor:
        spec, scale = self.spec, grid.scale
        if self._covers_all:
            return fake_quantize_unclipped(x, scale, spec.axis)
        center = 0 if spec.symmetric else grid.zero_point
        codes = spec.quant_min, spec.quant_max
        if spec.gradient == "ste" and not scale.requires_grad:
            return fake_quantize(x, scale, center, *codes, spec.axis)
        rule = gradient_of(spec)
        return fake_quantize_learned(
            x, scale, center, *codes, spec.axis, offset=grid.offset, rule=rule
        )

    def _fused_on_gpu(self, x: Tensor) -> bool:
        """Whether range, scale and rounding are one kernel."""
        if not is_gpu(x) or not self._covers_all or type(self) is not TensorQuantizer:
            return False
        from qatkit.kernels import gpu

        return self.queue is None and gpu.fits(x, self.spec.axis)

    def _rows_on_gpu(self, x: Tensor) -> Tensor:
        from qatkit.kernels import gpu

        observing = self.observing and not is_recomputing()
        state = self._state if observing else None
        self._has_range = self._has_range or observing
        return gpu.quantize_rows(x, self.spec.axis, self.spec.quant_max, state)

    @property
    def _covers_all(self) -> bool:
        """Whether the range is that of the tensor itself, so that nothing is clipped."""
        spec = self.spec
        own_range = (
            spec.memory == "latest" and self.observe != "never" and spec.observer == "minmax"
        )
        plain = spec.symmetric and spec.signed and not spec.power_of_two
        return own_range and plain and spec.gradient == "ste"

    def grid_for(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the ``(scale, zero_point)`` for ``x`` in eval; ``None`` without a range."""
        grid = self._grid_for(x)
        return None if grid is None else (grid.scale.detach(), grid.zero_point)

    def set_range(self, low: Tensor | float, high: Tensor | float) -> None:
        """Set the remembered range by hand.

        Args:
            low: lower end, a number or a tensor of the shape of `scale`.
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
            self._write(*(end.to(self.num_batches.device) for end in ends))
            self.num_batches.fill_(1)
        self._has_range = True

    @torch.no_grad()
    def remember(self, low: Tensor, high: Tensor, called: Tensor) -> None:
        """Let the range that all ranks agreed on join the memory, as that of one batch.

        Args:
            low: lower end, float32 of the shape of `min_val`.
            high: upper end.
            called: () bool, whether any rank saw a tensor; nothing changes else.
        """
        state = self._state
        before, had_range = [buffer.clone() for buffer in state], self._has_range
        self._remember(low, high)
        for buffer, old in zip(state, before, strict=True):
            buffer.copy_(torch.where(called, buffer, old))
        self._has_range = had_range or bool(self.queue)  # `calibrated` finds out what others saw

    def reset_range(self) -> None:
        """Forget the range."""
        with torch.no_grad():
            self._write(*2 * (torch.zeros((), device=self.num_batches.device),))
            self.num_batches.zero_()
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

    @property
    def _written_by(self) -> QuantSpec:
        """The spec by which the tensors hold the range."""
        return self.spec

    def _own_range(self) -> Range:
        """Return the remembered range without the peers, with its gradients."""
        return self.min_val, self.max_val

    def _with_peers(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Unite a range with those that the peers remember."""
        for peer in self._peers:
            other = peer._own_range()
            low, high = torch.minimum(low, other[0]), torch.maximum(high, other[1])
        return low, high

    def _write(self, low: Tensor, high: Tensor) -> None:
        """Make a range the remembered one."""
        self.min_val.copy_(low.expand_as(self.min_val))
        self.max_val.copy_(high.expand_as(self.max_val))

    def _grid(self) -> Grid:
        """Return the grid of the remembered range, united with those of the peers."""
        return Grid(*qparams(*self.range, self.spec))

    def _current_grid(self, x: Tensor) -> Grid | None:
        """Return the grid to quantize ``x`` with in a forward; estimate the range where due."""
        if not self.observing:
            return self._grid_for(x)
        if is_recomputing():
            with torch.no_grad():
                batch = self._estimate(x)
            used = self._used.find(batch) or self._range_for(x, batch)
        else:
            batch = self._observe(x)
            used = self._range_for(x, batch)
            if used is not None and may_be_recomputed():
                self._used.add(batch, used)
        return None if used is None else Grid(*qparams(*used, self.spec))

    def _grid_for(self, x: Tensor) -> Grid | None:
        """Return the grid to quantize ``x`` with when nothing is estimated."""
        used = self._range_for(x, None)
        return None if used is None else Grid(*qparams(*used, self.spec))

    def _range_for(self, x: Tensor, batch: Range | None) -> Range | None:
        """Return the range to quantize ``x`` with; ``batch`` is the estimate of this forward."""
        if self.spec.memory == "latest" and self.observe != "never":
            return self._estimate(x) if batch is None else batch
        if batch is not None and (
            (self.queue and not self.has_range)
            or (self.spec.memory == "batch" and self.training and self.has_range)
        ):
            return self._with_peers(*batch)
        return self.range if self.has_range else None

    def _estimate(self, x: Tensor) -> Range:
        return OBSERVERS[self.spec.observer].estimate(x.detach(), self.spec)

    def _observe(self, x: Tensor) -> Range:
        """Estimate the range of ``x`` and remember it; return the estimate."""
        with torch.no_grad():
            if self._observes_at_once(x) and self.queue is None and not self._asks_other_ranks:
                low, high = observe(x.detach(), self._state, self.spec)
                if x.numel() and not self._has_range:
                    self._has_range = True
                return low, high
            low, high = self._estimate(x)
            alone = self.queue is not None or not self._asks_other_ranks
            if alone and saw_nothing(x, high):  # no rank may stay away from a collective
                return low, high
            if self.queue is not None:
                self.queue.append((low, high))
                return low, high
            if not alone:
                ends = stacked_over_ranks(torch.stack((low, high)))
                low, high = range_of_parts(ends[:, 0], ends[:, 1], self.spec)
            self._remember(low, high)
        return low, high

    def _observes_at_once(self, x: Tensor) -> bool:
        """Whether it is one call to estimate and to remember."""
        pays = torch.compiler.is_dynamo_compiling() or is_gpu(x)
        return pays and type(self) is TensorQuantizer

    @property
    def _state(self) -> State:
        buffers: Any = self._buffers  # an attribute is looked for in three places
        return buffers["min_val"], buffers["max_val"], buffers["num_batches"]

    @property
    def _asks_other_ranks(self) -> bool:
        return self.spec.memory != "latest" and self.training and world_size() > 1

    def _remember(self, low: Tensor, high: Tensor) -> None:
        """Let a range join the remembered one."""
        if self.spec.memory == "latest":
            self._write(low, high)
            self.num_batches.add_(1)
        else:
            self._join(OBSERVERS[self.spec.observer].remember, low, high)
        if not self._has_range:  # an assignment is more than a compiled checkpoint can take
            self._has_range = True

    def _join(self, rule: Any, low: Tensor, high: Tensor) -> None:
        state = (self.min_val, self.max_val, self.num_batches)
        update(rule, state, (low, high), self.spec)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TensorQuantizer:
        """Move the tensors and keep their types: ``model.half()`` must not round the ranges."""
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
        """Load the range; a checkpoint of the float model lacks it and is complete too.

        A range that was observed becomes learned, or the other way round, where the spec says so.
        """
        if not holds_range(state_dict, prefix):
            return
        state_dict = translated(state_dict, prefix, self._written_by)
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
