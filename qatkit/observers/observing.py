"""One forward of an observer: estimate the range of a tensor and let it join the memory."""

from __future__ import annotations

import torch
from torch import Tensor

from qatkit.kernels.cpu.state import State
from qatkit.observers import eager
from qatkit.observers.observer import Range
from qatkit.spec import QuantSpec


def observe(x: Tensor, state: State, spec: QuantSpec) -> Range:
    """Return the range of ``x``, which joins the remembered one in place.

    In a graph that ``torch.compile`` records it is one operator, which does the same.

    Args:
        x: any shape and float dtype; where it has no finite element, nothing changes.
        state: buffers ``(min, max, count)``: () or (C,) float32 twice, () int64.
        spec: the spec of the quantizer.

    >>> state = torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0)
    >>> observe(torch.tensor([-1.0, 2.0]), state, QuantSpec(observer="minmax"))
    (tensor(-1.), tensor(2.))
    >>> state
    (tensor(-1.), tensor(2.), tensor(1))
    """
    if torch.compiler.is_dynamo_compiling():
        from qatkit.observers import operators

        return operators.observe(x, state, spec)
    return eager.observe(x, state, spec)
