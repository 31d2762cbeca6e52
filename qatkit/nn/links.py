"""An activation and the quantizer that alone reads its result, in one pass over memory.

``ReLU`` reads the result of a batch norm and writes over it; the quantizer behind reads that and
writes a copy for the convolution: three passes, and one more tensor to keep. Together they are one
pass, which writes over the result of the batch norm what the convolution reads.

That is only the same while nobody else sees the tensors in between. So it is left to forwards that
qatkit has written itself (`qatkit.nn.sequential`, `qatkit.graph.rewrite`): they know that the
result of the one goes to the other and nowhere else. The rest is looked at in each forward: a hook
on a module, a forward that was replaced on an object, a tracer or a mode that wants to see each
operator, and the modules are called one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as module_internals

from qatkit.kernels.cpu import Clip
from qatkit.nn.quantized import QuantizedWeight
from qatkit.quantizer import TensorQuantizer

_PRODUCERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_RELU, _RELU6 = Clip(0.0), Clip(0.0, 6.0)
_torch_c: Any = torch._C
_count_function_modes = _torch_c._len_torch_function_stack
_has_global_hook: Any = module_internals._has_any_global_hook


def clip_of(activation: Any) -> Clip | None:
    """Return what an activation, a module or a function, cuts; ``None`` where it does more.

    >>> clip_of(nn.ReLU6())
    Clip(floor=0.0, ceiling=6.0)
    >>> clip_of(nn.SiLU()) is None
    True
    """
    kind = type(activation)
    if kind is nn.ReLU:
        return _RELU
    if kind is nn.ReLU6 or kind is nn.Hardtanh:
        return Clip(activation.min_val, activation.max_val)
    if activation is functional.relu6:
        return _RELU6
    return _RELU if activation is functional.relu or activation is torch.relu else None


def makes_new(producer: Any) -> bool:
    """Tell whether a module returns a tensor that nobody else has, itself included."""
    return type(producer) in _PRODUCERS or isinstance(producer, QuantizedWeight)


def reads_through(reader: Any) -> TensorQuantizer | None:
    """Return the quantizer that does all that a module does with its argument."""
    if isinstance(reader, QuantizedWeight):
        reader = None if reader.input_is_quantized else reader._modules.get("input_quantizer")
    return reader if isinstance(reader, TensorQuantizer) else None


def activated(producer: Any, activation: Any, reader: Any, x: Any, **how: Any) -> Any:
    """Return ``activation(x)`` for ``reader``, on the grid of its quantizer where that is free.

    Args:
        producer: the module that has just returned ``x``, if one has.
        activation: a module or function.
        reader: the module that alone is going to read the result, if one is.
        x: nobody else reads it.
        **how: further arguments of the activation, which do not change its result.
    """
    if not torch.compiler.is_compiling() and type(x) is Tensor:
        y = _on_grid_of(reader, producer, activation, x)
        if y is not None:
            return y
    return activation(x, **how)


def activated_by_relu(producer: Any, reader: Any, x: Any, inplace: bool = False) -> Any:
    """Return ``torch.nn.functional.relu(x)``; see `activated`."""
    return activated(producer, functional.relu, reader, x, inplace=inplace)


def activated_by_relu6(producer: Any, reader: Any, x: Any, inplace: bool = False) -> Any:
    """Return ``torch.nn.functional.relu6(x)``; see `activated`."""
    return activated(producer, functional.relu6, reader, x, inplace=inplace)


BY_FUNCTION = {
    functional.relu: activated_by_relu,
    torch.relu: activated_by_relu,
    functional.relu6: activated_by_relu6,
}
"""The same for an activation that is a function, which a graph cannot hold as an argument."""


def is_link(producer: Any, activation: Any, reader: Any) -> bool:
    """Tell whether `activated` can be one pass for these three."""
    clips = clip_of(activation) is not None
    return clips and makes_new(producer) and reads_through(reader) is not None


def _on_grid_of(reader: Any, producer: Any, activation: Any, x: Tensor) -> Tensor | None:
    clip = clip_of(activation)
    if clip is None or not makes_new(producer):
        return None
    quantizer = reads_through(reader)
    if quantizer is None or _somebody_watches():
        return None
    if is_quiet(producer) and is_quiet(activation) and is_quiet(reader) and is_quiet(quantizer):
        return quantizer.activated(x, clip)
    return None


def is_quiet(module: Any) -> bool:
    """Tell whether calling a module is nothing but its class's forward; a function is quiet."""
    if not isinstance(module, nn.Module):
        return True
    state = module.__dict__
    hooks = (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )
    return not hooks and "forward" not in state and state.get("_compiled_call_impl") is None


def _somebody_watches() -> bool:
    return bool(_count_function_modes() or _has_global_hook())
