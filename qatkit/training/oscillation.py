"""Weights that oscillate between two codes: a loss that damps them, a tracker that freezes them.

Source: Nagel et al. 2022 (arXiv:2203.11086), equations 4 to 7 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.modes import select_quantizers
from qatkit.nn.weights import Weight, weights_of
from qatkit.training.wrappers import unwrapped

_TENSORS = {
    "codes": torch.int32,
    "direction": torch.int8,
    "frequency": torch.float32,
    "average": torch.float32,
    "frozen": torch.bool,
}


def oscillation_loss(model: nn.Module) -> Tensor:
    """Return how far the weights are from the centers of their bins, to be added to the loss.

    ``sum (Q(w) - clamp(w, scale * quant_min, scale * quant_max)) ** 2`` over all quantized weights
    that train, with Q(w) and the scale without gradient. Weights whose quantizer is off count
    nothing, and so do weights that a forward computes out of parameters. No range changes.

    Args:
        model: a prepared model, or a wrapper around it.

    Returns:
        () float32, with a gradient for the weights.

    Raises:
        QatkitError: the model has no quantizers.

    Source: Nagel et al. 2022, equation 4.

    >>> from qatkit.nn import QuantLinear
    >>> from qatkit.spec import QuantSpec
    >>> layer = QuantLinear(2, 1, weight_spec=QuantSpec(num_bits=2, narrow_range=True))
    >>> with torch.no_grad():
    ...     _ = layer.weight.copy_(torch.tensor([[1.0, 0.4]]))
    >>> layer.weight_quantizer.set_range(-1.0, 1.0)
    >>> round(oscillation_loss(layer).item(), 4)
    0.16
    """
    select_quantizers(model, "*", "oscillation_loss")
    found = (_loss_of(weight) for weight in weights_of(model) if _trains(weight))
    terms = [term for term in found if term is not None]
    if not terms:
        return torch.zeros((), device=next((p.device for p in model.parameters()), None))
    device = terms[0].device
    return torch.stack([term.to(device) for term in terms]).sum()


class OscillationTracker:
    """Count how often each weight flips between codes, and freeze those that flip too often.

    Call `step` after each ``optimizer.step()``. A weight oscillates where its code changes in the
    direction opposite to its last change; f is the moving average of how often it does. Once f is
    above ``threshold``, the weight stays on the rounded average of its codes: after every step it
    is set to that code times the scale. Where the width of a quantizer changes its weights start
    anew.

    Args:
        model: a prepared model, or a wrapper around it.
        threshold: the largest frequency that is let be, in oscillations per step; the attribute of
            that name may change as the training goes by. ``math.inf`` only counts.
        momentum: weight of a step in the averages.

    Attributes:
        threshold: as given.
        momentum: as given.

    Raises:
        QatkitError: no prepared model, or a number is out of its range.

    Source: Nagel et al. 2022, equation 5 to 7 and algorithm 1.

    >>> from qatkit.nn import QuantLinear
    >>> layer = QuantLinear(2, 1)
    >>> tracker = OscillationTracker(layer)
    >>> tracker.step()
    >>> tracker.oscillating, tracker.frozen
    (0.0, 0.0)
    """

    def __init__(
        self, model: nn.Module, *, threshold: float = 0.02, momentum: float = 0.01
    ) -> None:
        """Start with no weight frozen."""
        select_quantizers(model, "*", "OscillationTracker")
        if not _is_number(threshold) or not threshold > 0:
            raise QatkitError(
                f"OscillationTracker(threshold={threshold!r}): give oscillations per step above 0"
            )
        if not _is_number(momentum) or not 0 < momentum <= 1:
            raise QatkitError(f"OscillationTracker(momentum={momentum!r}): give 0 < momentum <= 1")
        self.threshold = float(threshold)
        self.momentum = float(momentum)
        self._model = unwrapped(model)
        self._states: dict[str, dict[str, Any]] = {}

    @property
    def oscillating(self) -> float:
        """The share of the weights whose frequency is above 0.005, as in the paper's tables."""
        return self._share("frequency", 0.005)

    @property
    def frozen(self) -> float:
        """The share of the weights that are frozen."""
        return self._share("frozen", 0.5)

    @torch.no_grad()
    def step(self) -> None:
        """Look at the weights after an optimizer step; put the frozen ones back on their codes."""
        for weight in weights_of(self._model):
            if not _trains(weight):
                continue
            grid = _grid(weight)
            if grid is None:
                continue
            codes = _codes(weight, grid)
            state = self._states.get(weight.path)
            if state is None or state["num_bits"] != weight.quantizer.spec.num_bits:
                self._states[weight.path] = _fresh(codes, weight.quantizer.spec.num_bits)
                continue
            self._count(state, codes)
            _put_back(weight, state, grid)

    def state_dict(self) -> dict[str, Any]:
        """Return settings and the counts of all weights, copied."""
        return {
            "threshold": self.threshold,
            "momentum": self.momentum,
            "weights": {
                path: {name: _copied(value) for name, value in state.items()}
                for path, state in self._states.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            QatkitError: the state is not one of an `OscillationTracker` of this model; nothing has
                changed then.
        """
        where = "OscillationTracker.load_state_dict"
        if not isinstance(state, Mapping) or set(state) != {"threshold", "momentum", "weights"}:
            raise QatkitError(f"{where}: give what OscillationTracker.state_dict() returned")
        parameters = {
            weight.path: getattr(weight.owner, weight.name) for weight in weights_of(self._model)
        }
        loaded: dict[str, dict[str, Any]] = {}
        for path, saved in state["weights"].items():
            parameter = parameters.get(path)
            if parameter is None or not _fits(saved, parameter):
                raise QatkitError(
                    f"{where}: {path!r} does not fit {type(self._model).__name__}; "
                    "give the state of the same model"
                )
            loaded[path] = {
                name: value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
                for name, value in saved.items()
            }
        self.threshold, self.momentum = float(state["threshold"]), float(state["momentum"])
        self._states = loaded

    def _count(self, state: dict[str, Any], codes: Tensor) -> None:
        """Take the codes of one more step into account, and freeze what flips too often."""
        codes = torch.where(state["frozen"], state["codes"], codes)
        change = (codes - state["codes"]).sign().to(torch.int8)
        flipped = (change != 0) & (change == -state["direction"])
        state["frequency"].lerp_(flipped.to(torch.float32), self.momentum)
        state["direction"] = torch.where(change != 0, change, state["direction"])
        state["average"].lerp_(codes.to(torch.float32), self.momentum)
        new = (state["frequency"] > self.threshold) & ~state["frozen"]
        state["codes"] = torch.where(new, state["average"].round().to(torch.int32), codes)
        state["frozen"] |= new

    def _share(self, name: str, above: float) -> float:
        found: list[Tensor] = [state[name] > above for state in self._states.values()]
        return sum(int(each.sum()) for each in found) / max(1, sum(each.numel() for each in found))


def _trains(weight: Weight) -> bool:
    parameter: Tensor = getattr(weight.owner, weight.name)
    return weight.quantizer.quantize and parameter.requires_grad


@dataclass(frozen=True, eq=False)
class _Grid:
    """The grid of a weight: ``code = round(w * fold / scale) + zero_point``.

    Attributes:
        scale: shaped for the weight.
        zero_point: shaped for the weight, int32.
        fold: what a batch norm multiplies the weight with, ``None`` for 1.
    """

    scale: Tensor
    zero_point: Tensor
    fold: Tensor | None


def _grid(weight: Weight) -> _Grid | None:
    """Return the grid of a weight, ``None`` where there is no range yet."""
    seen = weight.seen.detach()
    found = weight.quantizer.grid_for(seen)
    if found is None:
        return None
    axis = weight.quantizer.spec.axis
    shape = [-1 if d == axis else 1 for d in range(seen.dim())]
    scale, zero_point = (each.detach().reshape(shape) for each in found)
    return _Grid(
        scale, zero_point, None if weight.layer is None else weight.layer.weight_fold_scale()
    )


def _codes(weight: Weight, grid: _Grid) -> Tensor:
    """Return the codes of a weight, int32."""
    spec = weight.quantizer.spec
    codes = (weight.seen.detach().float() / grid.scale).round() + grid.zero_point
    return codes.clamp(spec.quant_min, spec.quant_max).to(torch.int32)


def _loss_of(weight: Weight) -> Tensor | None:
    """Return the squared distance from the bin centers of one weight."""
    grid, spec = _grid(weight), weight.quantizer.spec
    if grid is None:
        return None
    low, high = ((code - grid.zero_point) * grid.scale for code in (spec.quant_min, spec.quant_max))
    center = (_codes(weight, grid) - grid.zero_point) * grid.scale
    return (center - weight.seen.float().clamp(low, high)).square().sum()


def _fresh(codes: Tensor, num_bits: int) -> dict[str, Any]:
    average = codes.to(torch.float32)
    return {
        "codes": codes,
        "direction": torch.zeros_like(codes, dtype=torch.int8),
        "frequency": torch.zeros_like(average),
        "average": average,
        "frozen": torch.zeros_like(codes, dtype=torch.bool),
        "num_bits": num_bits,
    }


def _put_back(weight: Weight, state: Mapping[str, Any], grid: _Grid) -> None:
    """Set the frozen weights to their codes."""
    parameter: Tensor = getattr(weight.owner, weight.name)
    wanted = (state["codes"] - grid.zero_point) * grid.scale
    if grid.fold is not None:
        wanted = wanted / grid.fold
    parameter.copy_(torch.where(state["frozen"], wanted.to(parameter.dtype), parameter))


def _fits(saved: object, parameter: Tensor) -> bool:
    if not isinstance(saved, Mapping) or set(saved) != {*_TENSORS, "num_bits"}:
        return False
    return isinstance(saved["num_bits"], int) and all(
        isinstance(saved[name], Tensor)
        and saved[name].shape == parameter.shape
        and saved[name].dtype == dtype
        for name, dtype in _TENSORS.items()
    )


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and value == value  # not NaN
