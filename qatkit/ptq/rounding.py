"""Weights that choose between the two grid points beside them, and weights put on a grid point."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qatkit.nn.weights import Weight
from qatkit.ptq.weight_ranges import grid_of_weight

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1
"""The sigmoid is stretched to these and cut at 0 and 1, so that both are reached."""


_CELL = 0.45
"""How far from its grid point a weight may stay, in steps, and still be sure to round to it."""


class SoftRounding(nn.Module):
    """Stands in for the quantizer of a weight while the rounding is learned.

    Returns ``scale * (clamp(floor(w / scale) + h(v), quant_min, quant_max) - zero_point)`` with
    ``h(v) = clamp(1.2 * sigmoid(v) - 0.1, 0, 1)``; at first that is the weight itself.

    Args:
        weight: the weight; its range is frozen.

    Attributes:
        v: in the shape of the weight, what is learned.
        spec: that of the quantizer.

    Source: Nagel et al. 2020 (arXiv:2004.10568), equations 22 to 24.
    """

    def __init__(self, weight: Weight) -> None:
        """Start at the weight as it is."""
        super().__init__()
        self.spec = weight.quantizer.spec
        self.scale, self.zero_point = grid_of_weight(weight)
        steps = weight.seen.detach().float() / self.scale + self.zero_point
        self.floor = steps.floor()
        share = (steps - self.floor).clamp(0.001, 0.999)
        stretched = (share - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW)
        self.v = torch.logit(stretched).requires_grad_()
        top = self.spec.quant_max
        self.decided = (self.floor < self.spec.quant_min) | (self.floor >= top)

    def up(self) -> Tensor:
        """Return how far each weight goes towards the upper grid point, 0..1."""
        return (torch.sigmoid(self.v) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0.0, 1.0)

    def undecided(self, power: float) -> Tensor:
        """Return the mean of ``1 - |2 h - 1|^power`` over the weights that have a choice."""
        distance = 1.0 - (2.0 * self.up() - 1.0).abs().pow(power)
        return distance.masked_fill(self.decided, 0.0).mean()

    def aim(self) -> None:
        """Return nothing: a weight ends on its grid point."""
        return

    def codes(self) -> Tensor:
        """Return the chosen integers, float32."""
        return self._clamped(self.floor + (self.up() >= 0.5).float()).detach()

    def forward(self, x: Tensor) -> Tensor:
        """Return the weight between its grid points; ``x`` only says which dtype."""
        codes = self._clamped(self.floor + self.up())
        return ((codes - self.zero_point) * self.scale).to(x.dtype)

    def _clamped(self, codes: Tensor) -> Tensor:
        return codes.clamp(self.spec.quant_min, self.spec.quant_max)


class StraightRounding(nn.Module):
    """Stands in for the quantizer of a weight while the weight is trained.

    Returns ``scale * (clamp(round(v), quant_min, quant_max) - zero_point)``; the gradient passes
    the rounding. Unlike with `SoftRounding` a code can move by several steps.

    Args:
        weight: the weight; its range is frozen.

    Attributes:
        v: in the shape of the weight, ``w / scale + zero_point``, what is learned.
        spec: that of the quantizer.

    Source: Hubara et al. 2020 (arXiv:2006.10518), AdaQuant.
    """

    def __init__(self, weight: Weight) -> None:
        """Start at the weight as it is."""
        super().__init__()
        self.spec = weight.quantizer.spec
        self.scale, self.zero_point = grid_of_weight(weight)
        self.v = (weight.seen.detach().float() / self.scale + self.zero_point).requires_grad_()

    def undecided(self, power: float) -> Tensor:
        """Return 0: a rounded weight has decided."""
        return torch.zeros((), device=self.v.device)

    def aim(self) -> Tensor:
        """Return the trained weight in steps of the grid."""
        return self.v.detach()

    def codes(self) -> Tensor:
        """Return the chosen integers, float32."""
        return self.v.detach().round().clamp(self.spec.quant_min, self.spec.quant_max)

    def forward(self, x: Tensor) -> Tensor:
        """Return the weight on its grid; ``x`` only says which dtype."""
        inside = self.v.clamp(self.spec.quant_min, self.spec.quant_max)
        codes = inside + (inside.detach().round() - inside.detach())
        return ((codes - self.zero_point) * self.scale).to(x.dtype)


def codes_of(weight: Weight) -> Tensor:
    """Return the integers that a quantizer makes of its weight, float32, in its shape."""
    scale, zero_point = grid_of_weight(weight)
    on_grid: Tensor = weight.quantizer(weight.seen.detach())
    return (on_grid.float() / scale + zero_point).round()


def write_codes(weight: Weight, codes: Tensor, aim: Tensor | None = None) -> int:
    """Put a weight where round to nearest gives ``codes``: on the grid points, or beside them.

    The range must be frozen. Where a batch norm is folded in, the weight is divided by its factor.

    Args:
        weight: the weight.
        codes: in its shape, on the grid.
        aim: where between the grid points the weight wants to be, in steps like the codes; as far
            as its code allows it gets there, so that learning can go on. ``None`` for the points.

    Returns:
        the number of codes that changed.
    """
    before = codes_of(weight)
    parameter: Tensor = getattr(weight.owner, weight.name)
    scale, zero_point = grid_of_weight(weight)
    steps = codes if aim is None else aim.clamp(codes - _CELL, codes + _CELL)
    values = (steps - zero_point) * scale
    fold = None if weight.layer is None else weight.layer.weight_fold_scale()
    with torch.no_grad():
        parameter.copy_(values if fold is None else values / fold)
    assert torch.equal(codes_of(weight), codes), "a grid point rounds to itself"
    return int((before != codes).sum())
