"""The batch norm behind each quantized layer, whether its weight quantizer sees it or not."""

from __future__ import annotations

from typing import Any

from torch import nn

from qatkit.nn.quantized import QuantizedWeight
from qatkit.prepare import plan_of


def norms_of(model: nn.Module) -> dict[nn.Module, Any]:
    """Return the batch norm that export folds into a layer, for each layer that has one.

    >>> import torch, qatkit
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    >>> config = qatkit.QuantConfig(fold_batch_norm=False)
    >>> _ = qatkit.prepare(net, torch.zeros(1, 3, 2, 2), config)
    >>> norms_of(net)[net[0]] is net[1], net[0].batch_norm
    (True, None)
    """
    modules = dict(model.named_modules())
    found: dict[nn.Module, Any] = {
        module: module.batch_norm
        for module in modules.values()
        if isinstance(module, QuantizedWeight) and module.batch_norm is not None
    }
    plan = plan_of(model)
    for layer in plan.layers if plan is not None else ():
        if layer.batch_norm is not None and layer.path in modules:
            found.setdefault(modules[layer.path], modules[layer.batch_norm])
    return found
