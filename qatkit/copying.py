"""Copy a model, also one whose forward has left a computed tensor on ``self``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_Model = TypeVar("_Model", bound=nn.Module)


def deepcopy(model: _Model, memo: dict[int, Any] | None = None) -> _Model:
    """Return ``copy.deepcopy(model, memo)``, with computed tensors detached instead of refused.

    PyTorch copies leaves of the gradient graph only. Attention maps that a forward keeps, feature
    pyramids, or the weight that ``weight_norm`` computes are none after a training step.

    >>> import torch
    >>> net = nn.Linear(2, 2)
    >>> net.seen = net(torch.ones(1, 2))
    >>> deepcopy(net).seen.grad_fn is None
    True
    """
    with _DetachedCopies():
        return copy.deepcopy(model, memo)


class _DetachedCopies(TorchFunctionMode):
    """Answers ``Tensor.__deepcopy__`` of tensors with a history."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Return a copy without history, or let PyTorch do it."""
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return func(*args, **(kwargs or {}))
        source, memo = args
        if id(source) not in memo:
            memo[id(source)] = source.detach().clone()
        return memo[id(source)]
