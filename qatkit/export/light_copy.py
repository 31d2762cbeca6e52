"""A copy of a model that shares the weights."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from qatkit.copying import deepcopy
from qatkit.nn.weights import weights_of

_Model = TypeVar("_Model", bound=nn.Module)


def light_copy(model: _Model) -> _Model:
    """Return a copy in eval mode, float32, on the CPU, for forward passes without gradients.

    Its quantized weights lie in the memory of ``model`` where these are float32 on the CPU, until
    something writes to them: a forward may (``max_norm`` of an embedding). All else is its own.

    >>> from qatkit.nn import QuantLinear
    >>> net = nn.Sequential(QuantLinear(2, 2))
    >>> copied = light_copy(net)[0].weight.data.zero_()
    >>> bool(net[0].weight.any())
    True
    """
    memo: dict[int, Any] = {}
    for weight in weights_of(model):
        parameter = weight.owner._parameters.get(weight.name)
        if type(parameter) is nn.Parameter:
            memo[id(parameter)] = nn.Parameter(
                torch._lazy_clone(parameter.detach()), requires_grad=False
            )
    return deepcopy(model, memo).eval().float().cpu()
