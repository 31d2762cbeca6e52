"""The arguments of a call: a flat list of tensors, and a template that tells where each belongs.

A template is made of tuples, strings and numbers, so that it is hashable and survives JSON:

- ``("tensor",)``: a tensor, takes the next leaf;
- ``("const", v)``: a plain number, string, bool or ``None``;
- ``("tuple", t...)`` and ``("list", t...)``: templates of the items;
- ``("dict", (k, t)...)``: keys and templates of the values;
- ``("opaque", name, t...)``: anything else, by the name of its class, with the items of a named
  tuple or a dataclass.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

Template = tuple[Any, ...]

TENSOR: Template = ("tensor",)


def flatten(
    value: Any, is_leaf: type | tuple[type, ...] = Tensor, *, numbers: bool = False
) -> tuple[Template, list[Any]]:
    """Split ``value`` into a template and the leaves in order.

    Args:
        value: a structure.
        is_leaf: the classes of the leaves.
        numbers: count integers as leaves.

    >>> import torch
    >>> template, leaves = flatten(((torch.zeros(2), 3), {"mask": None}))
    >>> template
    ('tuple', ('tuple', ('tensor',), ('const', 3)), ('dict', ('mask', ('const', None))))
    >>> len(leaves)
    1
    """
    leaves: list[Any] = []
    return _template(value, is_leaf, numbers, leaves), leaves


def unflatten(template: Template, leaves: Iterator[Any]) -> Any:
    """Rebuild the value of a template, taking leaves in order; an opaque one as a list of items.

    >>> unflatten(("tuple", ("tensor",), ("const", 3)), iter(["a tensor"]))
    ('a tensor', 3)
    """
    kind, rest = template[0], template[1:]
    if kind == "tensor":
        return next(leaves)
    if kind == "const":
        return rest[0]
    if kind == "dict":
        return {key: unflatten(item, leaves) for key, item in rest}
    items = [unflatten(item, leaves) for item in (rest[1:] if kind == "opaque" else rest)]
    return tuple(items) if kind == "tuple" else items


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors inside ``value``, its tuples, lists, dicts and dataclasses, in order."""
    return flatten(value)[1]


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return ``value`` with each tensor in tuples, lists, dicts and dataclasses changed.

    >>> import torch
    >>> map_tensors({"a": (torch.ones(2), 3)}, torch.Tensor.sum)
    {'a': (tensor(2.), 3)}
    """
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(map_tensors(item, change) for item in value)
    if type(value) is dict:
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, dict):
        copied = copy.copy(value)
        for key, item in value.items():
            copied[key] = map_tensors(item, change)
        return copied
    if isinstance(value, tuple):
        make = getattr(type(value), "_make", type(value))
        return make(map_tensors(item, change) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        twin: Any = copy.copy(value)
        for key, item in vars(value).items():
            twin.__dict__[key] = map_tensors(item, change)
        return twin
    return value


def rebuildable(template: Template) -> bool:
    """Tell whether `unflatten` gives back the value: nothing in it is opaque."""
    if template[0] == "opaque":
        return False
    children = [item[1] for item in template[1:]] if template[0] == "dict" else template[1:]
    return template[0] in ("tensor", "const") or all(rebuildable(child) for child in children)


def from_json(value: Any) -> Any:
    """Turn the lists that JSON made of a template back into tuples."""
    return tuple(from_json(item) for item in value) if isinstance(value, list) else value


def _template(
    value: Any, is_leaf: type | tuple[type, ...], numbers: bool, leaves: list[Any]
) -> Template:
    if isinstance(value, is_leaf) or (numbers and type(value) is int):
        leaves.append(value)
        return TENSOR
    if value is None or type(value) in (bool, int, float, str):
        return ("const", value)

    def inside(item: Any) -> Template:
        return _template(item, is_leaf, numbers, leaves)

    if type(value) in (tuple, list):
        return (type(value).__name__, *map(inside, value))
    if isinstance(value, dict) and all(isinstance(key, (str, int)) for key in value):
        return ("dict", *((key, inside(item)) for key, item in value.items()))
    return ("opaque", type(value).__name__, *map(inside, opaque_items(value)))


def opaque_items(value: Any) -> list[Any]:
    """Return what is inside a container that a template cannot rebuild.

    That is a named tuple, a dataclass, or a dict whose keys are no strings or integers.

    >>> import torch
    >>> opaque_items(torch.tensor([3.0, 5.0]).max(dim=0))
    [tensor(5.), tensor(1)]
    """
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (tuple, list)):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return list(vars(value).values())
    return []
