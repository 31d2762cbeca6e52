"""Which part of a batch is the input of a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from qatkit.errors import QatkitTypeError
from qatkit.graph.level import float_class
from qatkit.graph.rewrite import RewrittenBlock
from qatkit.graph.structure import map_tensors, tensors
from qatkit.prepare import plan_of

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class BatchReader:
    """Takes the input of a model out of what a data loader yields.

    ==================  ==========================================================================
    batch               input
    ==================  ==========================================================================
    tensor              the tensor
    tuple or list       its first n items, n being the number of arguments that forward requires
                        (1 if its signature does not tell), or more if the example inputs of
                        `qatkit.prepare` were more; the rest are targets
    dict                the items whose keys are names of forward's arguments
    ==================  ==========================================================================

    Args:
        model: the model.

    >>> reader = BatchReader(nn.Linear(2, 3))
    >>> reader.arguments((torch.zeros(1, 2), torch.ones(1)), 0)
    ((tensor([[0., 0.]]),), {})
    """

    def __init__(self, model: nn.Module) -> None:
        """Look at the signature of the forward."""
        self._name = type(model).__name__
        parameters = _parameters(model)
        positional = [p for p in parameters if p.kind in _POSITIONAL]
        self._arity = max(1, sum(p.default is p.empty for p in positional))
        plan = plan_of(model)
        self._most = max(self._arity, 0 if plan is None else plan.arguments)
        self._names = [p.name for p in parameters if p.kind in _NAMED]
        self._order = [p.name for p in positional]
        self._positional = _form(model)
        self._required = [p.name for p in parameters if p.default is p.empty and p.kind in _NAMED]

    def arguments(self, batch: Any, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the ``(args, kwargs)`` of the model for one batch.

        Args:
            batch: what the data yielded.
            index: its position, for messages.

        Raises:
            QatkitTypeError: there is no input in it.
        """
        args, kwargs = self._in_form(*self._select(batch, index))
        if not tensors((args, kwargs)):
            raise QatkitTypeError(
                f"batch {index} is a {_describe(batch)} without a tensor as input; "
                "yield tensors, (input, target) tuples or dicts of tensors"
            )
        return args, kwargs

    def _select(self, batch: Any, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(batch, Mapping):
            return (), self._by_name(batch, index)
        if not isinstance(batch, tuple | list):
            return (batch,), {}
        if len(batch) < self._arity:
            raise QatkitTypeError(
                f"batch {index} is a {_describe(batch)}, {self._name}.forward takes "
                f"{self._arity} ({', '.join(self._required)}); yield tuples with all of them"
            )
        return tuple(batch[: self._most]), {}

    def _in_form(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pass arguments by position or by name as the example inputs of the model were."""
        if self._positional is None or len(args) > len(self._order):
            return args, kwargs
        named = dict(zip(self._order, args, strict=False)) | kwargs
        first = [name for name in self._order[: self._positional] if name in named]
        return tuple(named.pop(name) for name in first), named

    def _by_name(self, batch: Mapping[Any, Any], index: int) -> dict[str, Any]:
        found = {name: batch[name] for name in self._names if name in batch}
        missing = [name for name in self._required if name not in found]
        if found and not missing:
            return found
        keys = ", ".join(map(repr, batch))
        lacks = f" and requires {', '.join(missing)}" if missing else ""
        raise QatkitTypeError(
            f"batch {index} is a dict with the keys {keys}, {self._name}.forward takes "
            f"{', '.join(self._names) or 'no named arguments'}{lacks}; "
            "yield the input itself or rename the keys"
        )


def to_device(value: Any, device: torch.device | None) -> Any:
    """Return ``value`` with the tensors in its tuples, lists and dicts on ``device``."""
    if device is None:
        return value
    return map_tensors(value, lambda tensor: tensor.to(device))


def device_of(model: nn.Module) -> torch.device | None:
    """Return where the first parameter or buffer of a model is, ``None`` if it has neither."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return None if first is None else first.device


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    """Return the parameters of the forward that the model had before it was prepared."""
    own = model.__dict__.get("forward")
    try:
        if own is not None:
            return list(inspect.signature(own).parameters.values())
        forward = float_class(type(model)).forward
        return list(inspect.signature(forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return []


def _form(model: nn.Module) -> int | None:
    """Return how many positional arguments a rewritten model takes, ``None`` for any other."""
    if not isinstance(model, RewrittenBlock):
        return None
    args = model.block_plan.template[1]
    return len(args) - 1


def _describe(batch: Any) -> str:
    kind = type(batch).__name__
    return f"{kind} of {len(batch)}" if isinstance(batch, tuple | list | Mapping) else kind
