"""`LearnedQuantizer`: a quantizer whose range is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.functional import qparams
from qatkit.observers import (
    Grid,
    Range,
    grid_of,
    grid_of_range,
    is_empty,
    names_of,
    range_of,
    start,
    to_parameters,
    update,
)
from qatkit.quantizer import TensorQuantizer
from qatkit.spec import QuantSpec


class LearnedQuantizer(TensorQuantizer, trained=True):
    """A `TensorQuantizer` with a learned observer (`qatkit.spec.LEARNED`).

    Parameters stand in the place of ``min_val`` and ``max_val``. They start from
    `qatkit.calibrate`, else from the first training batch; after that only gradients change them.
    Frozen or switched off it leaves them without a gradient, which ``DistributedDataParallel``
    accepts with ``find_unused_parameters=True``. Of a shared range the gradient goes to the
    quantizer that attains it. Leave them without weight decay (`qatkit.parameter_groups`).

    Attributes:
        step, offset, threshold, log2_threshold: () or (channels,) float32 parameters, those of the
            observer (`qatkit.observers.learned`).

    >>> quantizer = TensorQuantizer(QuantSpec(observer="lsq"))
    >>> quantizer.set_range(-1.27, 1.27)
    >>> quantizer.step
    Parameter containing:
    tensor(0.0100, requires_grad=True)
    """

    def _make_range(self, low: Tensor, high: Tensor) -> None:
        """Register the parameters."""
        self._learned = self.spec.observer
        self._watched: Range | None = None
        self._waits = False
        values = to_parameters(low, high, self.spec)
        for name, value in zip(names_of(self.spec), values, strict=True):
            self.register_parameter(name, nn.Parameter(value))

    @property
    def observing(self) -> bool:
        """Whether the next forward estimates the range: once trained, only to calibrate anew."""
        due = self.observe == "always" and self.spec.memory != "latest"
        return super().observing and (due or self._waits or not self.calibrated)

    def set_range(self, low: Tensor | float, high: Tensor | float) -> None:
        """Set the range by hand; as in `TensorQuantizer.set_range`."""
        super().set_range(low, high)
        self._watched, self._waits = None, False

    def reset_range(self) -> None:
        """Forget the range: the next training forward starts anew."""
        super().reset_range()
        self._watched, self._waits = None, False

    @property
    def _written_by(self) -> QuantSpec:
        """The spec that the parameters are written by, whatever calibrates them."""
        spec = self.spec
        return spec if spec.observer == self._learned else spec.replace(observer=self._learned)

    @property
    def _parameters_of_range(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in names_of(self._written_by))

    def _own_range(self) -> Range:
        """Return the range with its gradients, and 0 before there is one."""
        low, high = range_of(self._parameters_of_range, self._written_by)
        return (low, high) if self.calibrated else (low.detach() * 0.0, high.detach() * 0.0)

    def _write(self, low: Tensor, high: Tensor) -> None:
        targets = self._parameters_of_range
        ends = low.expand_as(targets[0]), high.expand_as(targets[0])
        for target, value in zip(targets, to_parameters(*ends, self._written_by), strict=True):
            target.copy_(value)

    def _grid(self) -> Grid:
        if not self.has_range:
            return Grid(*qparams(*self.range, self.spec))
        if self._peers:
            return grid_of_range(*self._with_peers(*self._own_range()), self._written_by)
        return grid_of(self._parameters_of_range, self._written_by)

    def _current_grid(self, x: Tensor) -> Grid | None:
        batch = self._observe(x) if self.observing else None
        if batch is not None and self.queue and not self.has_range:
            return Grid(*qparams(*self._with_peers(*batch), self.spec))
        return self._grid_for(x)

    def _grid_for(self, x: Tensor) -> Grid | None:
        if self.has_range:
            still = self.observe == "never" or self._waits  # its parameters may be written yet
            return self._grid().detach() if still else self._grid()
        if self.spec.memory != "latest":
            return None
        return grid_of(to_parameters(*self._estimate(x), self._written_by), self._written_by)

    def _estimate(self, x: Tensor) -> Range:
        return start(x.detach(), self.spec)

    def _remember(self, low: Tensor, high: Tensor) -> None:
        """Start from a range, or let one of many join those before.

        A tensor of zeros is a start only as long as no other comes.
        """
        if self._waits:
            self.reset_range()
        calibrating = self.observe == "always" and self.spec.memory != "latest"
        self._waits = not calibrating and _all_empty(low, high)
        super()._remember(low, high)

    def _join(self, rule: Any, low: Tensor, high: Tensor) -> None:
        # Parameters hold a rounded range, so that one of many batches is kept beside them.
        ends = self._watched or tuple(end.detach().clone() for end in self._own_range())
        update(rule, (ends[0], ends[1], self.num_batches), (low, high), self.spec)
        self._write(*ends)
        self._watched = (ends[0], ends[1]) if self.observe == "always" else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedQuantizer:
        """Move the tensors and keep their types: ``model.half()`` must not round the ranges."""
        trained = {name: each.data for name, each in self._parameters.items() if each is not None}
        self._watched = None
        super()._apply(fn, recurse)
        for name, value in trained.items():
            parameter = self._parameters[name]
            if parameter is not None and parameter.dtype != value.dtype:
                parameter.data = value.to(parameter.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._watched = None


def _all_empty(low: Tensor, high: Tensor) -> bool:
    """Tell whether nothing was seen; not while compiling, which cannot know."""
    return not torch.compiler.is_compiling() and bool(is_empty(low, high).all())
