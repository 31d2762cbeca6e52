"""Which quantized class belongs to a float class, and the swap of one for the other in place."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

from torch import nn

Layer = TypeVar("Layer", bound=type[nn.Module])

_QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {}
QUANTIZED: Mapping[type[nn.Module], type[nn.Module]] = MappingProxyType(_QUANTIZED)
"""The quantized class of each float class that has one of its own."""

_BY_NAME: dict[str, type[nn.Module]] = {}
_DERIVED: dict[type[nn.Module], type[nn.Module]] = {}

_HARMLESS = frozenset({"__init__", "__new__", "extra_repr", "reset_parameters"})
"""What a subclass may define without computing something else."""
_PARAMETERS = re.compile(r"(weight|bias)(_[ih][hr]\w*)?")
"""Names of parameters: a class attribute of such a name computes one."""


def quantizes(float_class: type[nn.Module] | str) -> Callable[[Layer], Layer]:
    """Declare the decorated class to be the quantized form of ``float_class``.

    It shows the constructor arguments of ``float_class``, then its own keyword-only ones. A class
    of a package that is not imported is given by its full name; the decorated class then does not
    inherit from it, `quantized_class` joins the two.
    """

    def register(layer: Layer) -> Layer:
        if isinstance(float_class, str):
            _BY_NAME[float_class] = layer
            return layer
        _QUANTIZED[float_class] = layer
        floats = inspect.signature(float_class)
        own = inspect.signature(layer.__init__).parameters.values()
        extra = [parameter for parameter in own if parameter.kind is parameter.KEYWORD_ONLY]
        every = [*floats.parameters.values(), *extra]
        parameters = sorted(every, key=lambda parameter: parameter.kind)  # **kwargs comes last
        shown: Any = layer
        shown.__signature__ = floats.replace(parameters=parameters)
        return layer

    return register


def quantized_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Return the quantized form of a float class, ``None`` if it has none.

    A subclass that inherits all that it computes gets a class that is both: its own methods stay.

    >>> class Named(nn.Conv2d):
    ...     label = "stem"
    >>> quantized_class(Named).__mro__[2].__name__, quantized_class(Named).label
    ('QuantConv2d', 'stem')
    >>> class Scaled(nn.Conv2d):
    ...     def forward(self, input): return 2 * super().forward(input)
    >>> quantized_class(Scaled) is None
    True
    """
    if kind in _QUANTIZED:
        return _QUANTIZED[kind]
    if kind not in _DERIVED:
        base = _BY_NAME.get(f"{kind.__module__}.{kind.__qualname__}") or _inherited(kind)
        if base is None:
            return None
        members = {
            "float_class": kind,
            "__module__": kind.__module__,
            "__qualname__": f"Quant{kind.__qualname__}",
            "__doc__": kind.__doc__,
        }
        _DERIVED[kind] = type(f"Quant{kind.__name__}", (_Derived, base, kind), members)
    return _DERIVED[kind]


def swappable(module: nn.Module) -> bool:
    """Tell whether `swap` knows the class of ``module``."""
    return quantized_class(type(module)) is not None


def swap(module: nn.Module) -> None:
    """Turn a float layer into its quantized class: same object, parameters, hooks and keys.

    The caller attaches the quantizers. A subclass with a forward of its own has no quantized class.
    """
    quantized = quantized_class(type(module))
    assert quantized is not None, "see swappable"
    module.__class__ = quantized


class _Derived(nn.Module):
    """Base of the classes that `quantized_class` makes; they pickle as the float class."""

    float_class: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return _blank, (self.float_class,), *reduced[2:]


def _blank(kind: type[nn.Module]) -> nn.Module:
    """Return an object of the quantized class, without state."""
    quantized = quantized_class(kind)
    assert quantized is not None
    return quantized.__new__(quantized)


def _inherited(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Return the quantized class of the ancestor whose computation ``kind`` inherits unchanged."""
    own: set[str] = set()
    for ancestor in kind.__mro__:
        if ancestor in _QUANTIZED:
            changed = {
                name for name in own if hasattr(ancestor, name) or _PARAMETERS.fullmatch(name)
            }
            return None if changed else _QUANTIZED[ancestor]
        own |= {name for name, value in vars(ancestor).items() if _computes(name, value)}
    return None


def _computes(name: str, value: Any) -> bool:
    if name in _HARMLESS or (name.startswith("__") and name not in ("__call__", "__getattr__")):
        return False
    computes = callable(value) or hasattr(value, "__get__")
    return computes or _PARAMETERS.fullmatch(name) is not None
