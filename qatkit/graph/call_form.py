"""The form of a call: which tensors and numbers it takes, however they are spelled."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qatkit.graph.structure import Template, flatten, unflatten


@dataclass(frozen=True)
class _Slot:
    """Stands for the leaf number ``index`` of a call."""

    index: int


class CallForm:
    """Recognizes calls of a forward that differ from a given one in their tensors only.

    Positional and keyword arguments, and defaults left out or written, count as the same.

    Args:
        kind: the class whose forward is called.
        template: the form of the call, see `qatkit.graph.structure`.
        numbers: integers of the call are leaves of the template too, as the size of an image may
            be.

    >>> form = CallForm(nn.Linear, flatten(((Tensor(),), {}))[0])
    >>> form.leaves((), {"input": Tensor()})
    [tensor([])]
    >>> form.leaves(("no tensor",), {}) is None
    True
    """

    def __init__(self, kind: type[nn.Module], template: Template, *, numbers: bool = False) -> None:
        """Bind the call of the template to the parameters of the forward."""
        self._parameters = inspect.signature(kind.forward)
        self._template = template
        self._numbers = numbers
        args, kwargs = unflatten(template, (_Slot(i) for i in range(1_000_000)))
        self._arguments = self._bind(args, kwargs)
        found = dict(_slots(self._arguments, ()))
        self.paths = [found[i] for i in range(len(found))]
        """Where each leaf of the template goes: name of the parameter, then keys and indices."""

    def leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """Return the leaves of a call in the order of the template, ``None`` if it is another.

        Raises:
            TypeError: the forward cannot be called so.
        """
        given, leaves = flatten((args, kwargs), numbers=self._numbers)
        if given == self._template:
            return leaves
        found: dict[int, Any] = {}
        if not self._fits(self._arguments, self._bind(args, kwargs), found):
            return None
        return [found[i] for i in range(len(self.paths))]

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by the name of the parameter, defaults filled in."""
        bound = self._parameters.bind(None, *args, **kwargs)
        bound.apply_defaults()
        return dict(list(bound.arguments.items())[1:])

    def _fits(self, wanted: Any, given: Any, found: dict[int, Any]) -> bool:
        """Tell whether ``given`` has a leaf wherever ``wanted`` has a slot, and is equal else."""
        if isinstance(wanted, _Slot):
            found[wanted.index] = given
            return isinstance(given, Tensor) or (self._numbers and type(given) is int)
        if isinstance(wanted, dict) and isinstance(given, dict) and wanted.keys() == given.keys():
            return all(self._fits(item, given[key], found) for key, item in wanted.items())
        if type(wanted) in (tuple, list) and type(given) is type(wanted):
            pairs = zip(wanted, given, strict=False)
            return len(wanted) == len(given) and all(self._fits(a, b, found) for a, b in pairs)
        plain = type(wanted) is type(given) and (wanted is None or isinstance(wanted, _PLAIN))
        return plain and bool(wanted == given)


_PLAIN = (bool, int, float, str)


def _slots(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Yield the number and the path of each slot in a structure."""
    if isinstance(value, _Slot):
        yield value.index, path
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _slots(item, (*path, key))
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from _slots(item, (*path, i))
