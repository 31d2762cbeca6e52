"""Parameters of a prepared model in groups for an optimizer."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from qatkit.errors import QatkitError
from qatkit.modes import quantizers, require_module


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    range_lr: float | None = None,
    decay_vectors: bool = False,
) -> list[dict[str, Any]]:
    """Return groups for a ``torch.optim`` optimizer: weights, vectors and learned ranges.

    Every parameter is in exactly one group, learned ranges always without weight decay, which would
    pull a range towards zero, or its log2 towards a threshold of 1. Groups without a parameter are
    left out. Each group has a ``name``: ``"weights"``, ``"vectors"`` or ``"ranges"``.

    Args:
        model: any model; only a prepared one with learned observers has ranges.
        lr: learning rate of weights and vectors.
        weight_decay: of the weights.
        range_lr: learning rate of the learned ranges, ``None`` for ``lr``.
        decay_vectors: also decay what has one axis or none: biases, and the weights of norms.

    Raises:
        QatkitError: a number is negative or not finite, or ``model`` is no module.

    >>> from qatkit.nn import QuantLinear
    >>> from qatkit.spec import QuantSpec
    >>> layer = QuantLinear(2, 2, input_spec=QuantSpec(observer="lsq"))
    >>> groups = parameter_groups(layer, lr=0.1, weight_decay=1e-4, range_lr=0.01)
    >>> [(group["name"], len(group["params"]), group["weight_decay"]) for group in groups]
    [('weights', 1, 0.0001), ('vectors', 1, 0.0), ('ranges', 1, 0.0)]
    """
    require_module(model, "parameter_groups")
    range_lr = lr if range_lr is None else range_lr
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("range_lr", range_lr)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and 0 <= value < math.inf):
            raise QatkitError(f"parameter_groups({name}={value!r}): give a number, 0 or more")
    learned = {id(each) for _, quantizer in quantizers(model) for each in quantizer.parameters()}
    ranges = [each for each in model.parameters() if id(each) in learned]
    others = [each for each in model.parameters() if id(each) not in learned]
    vector_decay = weight_decay if decay_vectors else 0.0
    groups: list[dict[str, Any]] = [
        _group("weights", [each for each in others if each.dim() > 1], lr, weight_decay),
        _group("vectors", [each for each in others if each.dim() <= 1], lr, vector_decay),
        _group("ranges", ranges, range_lr, 0.0),
    ]
    return [group for group in groups if group["params"]]


def _group(
    name: str, parameters: list[nn.Parameter], lr: float, weight_decay: float
) -> dict[str, Any]:
    return {"name": name, "params": parameters, "lr": lr, "weight_decay": weight_decay}
