"""The form of a call: which tensors it takes, however they are spelled."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qatkit.graph.structure import Template, flatten, unflatten


@dataclass(frozen=True)
class _Slot:
    """Stands for the tensor number ``index`` of a call."""

    index: int


class CallForm:
    """Recognizes calls of a forward that differ from a given one in their tensors only.

    Positional and keyword arguments, and defaults left out or written, count as the same.

    Args:
        kind: the class whose forward is called.
        template: the form of the call, see `qatkit.graph.structure`.

    >>> form = CallForm(nn.Linear, flatten(((Tensor(),), {}))[0])
    >>> form.tensors((), {"input": Tensor()})
    [tensor([])]
    >>> form.tensors(("no tensor",), {}) is None
    True
    """

    def __init__(self, kind: type[nn.Module], template: Template) -> None:
        """Bind the call of the template to the parameters of the forward."""
        self._parameters = inspect.signature(kind.forward)
        self._template = template
        args, kwargs = unflatten(template, (_Slot(i) for i in range(1_000_000)))
        self._bound, self._slots = self._bind(args, kwargs)

    @property
    def paths(self) -> list[tuple[Any, ...]]:
        """Where each tensor of the template goes: name of the parameter, then keys and indices."""
        args, kwargs = unflatten(self._template, (_Slot(i) for i in range(1_000_000)))
        bound = self._parameters.bind(None, *args, **kwargs)
        found = dict(_leaves(bound.arguments, ()))
        return [found[i] for i in range(len(self._slots))]

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
        """Return the tensors of a call in the order of the template, ``None`` if it is another.

        Raises:
            TypeError: the forward cannot be called so.
        """
        given, leaves = flatten((args, kwargs))
        if given == self._template:
            return leaves
        bound, leaves = self._bind(args, kwargs)
        if bound != self._bound:
            return None
        places = sorted(range(len(leaves)), key=lambda i: self._slots[i].index)
        return [leaves[i] for i in places]

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Template, list[Any]]:
        """Return the form and the leaves of the arguments in the order of the parameters."""
        bound = self._parameters.bind(None, *args, **kwargs)
        bound.apply_defaults()
        return flatten((bound.args[1:], bound.kwargs), (Tensor, _Slot))


def _leaves(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Yield the number and the path of each slot in a structure."""
    if isinstance(value, _Slot):
        yield value.index, path
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from _leaves(item, (*path, i))
