"""All or nothing: a model that an algorithm works on is as before if anything goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

from qatkit.freeze import saved_range
from qatkit.modes import quantizers, training_flags


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """Run in eval mode; undo every change of weights, ranges and switches on an exception.

    Training flags, ``requires_grad`` and the gradients are as before in any case.

    Args:
        model: a prepared model.
    """
    tensors = list(chain(model.parameters(), model.buffers()))
    values = [tensor.detach().clone() for tensor in tensors]
    gradients = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    children = [(module, dict(module._modules)) for module in model.modules()]
    states = [(q, saved_range(q), q.observe, q.quantize, q.spec) for _, q in quantizers(model)]
    try:
        with training_flags(model.modules(), False):
            yield
    except BaseException:
        with torch.no_grad():
            for module, modules in children:
                module._modules.clear()
                module._modules.update(modules)
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
            for quantizer, saved, observe, quantize, spec in states:
                quantizer.load_state_dict(saved)
                quantizer.observe, quantizer.quantize, quantizer.spec = observe, quantize, spec
        raise
    finally:
        for parameter, needed, gradient in gradients:
            parameter.requires_grad_(needed)
            parameter.grad = gradient
