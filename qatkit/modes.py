"""Switch quantization on and off: context managers that restore exactly what they found."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

from torch import nn

from qatkit.config import matches, require_match
from qatkit.errors import QatkitError, QatkitTypeError
from qatkit.quantizer import TensorQuantizer

State = TypeVar("State")


class Mode(Generic[State]):
    """A change of some modules' state: a context manager, or with `apply` for good.

    The change happens on entering the context. On leaving it, also by an exception, each module gets back the state
    that it had; contexts nest.

    Args:
        modules: what is changed.
        read: reads the state of a module.
        write: sets the state of a module.
        change: the new state of a module, given the old one.
    """

    def __init__(
        self,
        modules: list[nn.Module],
        read: Callable[[nn.Module], State],
        write: Callable[[nn.Module, State], None],
        change: Callable[[nn.Module], State],
    ) -> None:
        """Remember what to change; nothing is changed yet."""
        self._modules = modules
        self._read = read
        self._write = write
        self._change = change
        self._saved: list[list[tuple[nn.Module, State]]] = []

    def apply(self) -> None:
        """Make the change for good."""
        for module in self._modules:
            self._write(module, self._change(module))

    def __enter__(self) -> None:
        """Make the change."""
        self._saved.append([(module, self._read(module)) for module in self._modules])
        self.apply()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore each module's own state."""
        for module, state in self._saved.pop():
            self._write(module, state)


def disable_quantization(model: nn.Module, pattern: str = "*") -> Mode[bool]:
    """Let tensors pass unquantized; ranges are still estimated as before.

    Args:
        model: a prepared model.
        pattern: glob over whole paths of modules (with all that is inside) or of quantizers.

    Returns:
        a context manager; call its ``apply()`` to make the change stick.

    Raises:
        QatkitError: the pattern matches no quantizer.

    >>> from qatkit.nn import QuantLinear
    >>> layer = QuantLinear(2, 2)
    >>> with disable_quantization(layer):
    ...     layer.weight_quantizer.quantize
    False
    >>> layer.weight_quantizer.quantize
    True
    """
    return _switch(model, pattern, on=False)


def enable_quantization(model: nn.Module, pattern: str = "*") -> Mode[bool]:
    """Quantize tensors; the counterpart of `disable_quantization`, with the same uses and errors."""
    return _switch(model, pattern, on=True)


def quantizers(model: nn.Module, pattern: str = "*") -> Iterator[tuple[str, TensorQuantizer]]:
    """Yield ``(path, quantizer)``, each quantizer once, those that ``pattern`` matches under any of their paths."""
    seen: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, TensorQuantizer) and id(module) not in seen and matches(pattern, path):
            seen.add(id(module))
            yield path, module


def select_quantizers(model: nn.Module, pattern: str, where: str) -> list[TensorQuantizer]:
    """Return the quantizers that ``pattern`` matches.

    Raises:
        QatkitError: none is matched; the message starts with ``where``.
    """
    require_module(model, where)
    found = [quantizer for _, quantizer in quantizers(model, pattern)]
    if found:
        return found
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    if not any(True for _ in quantizers(model)):
        raise QatkitError(f"{where}: the model has no quantizers, call qatkit.prepare(model, example_inputs) first")
    require_match(pattern, paths, f"{where}, pattern {pattern!r}")
    hit = next(path for path in paths if fnmatch.fnmatchcase(path, pattern))
    raise QatkitError(f"{where}: {hit!r} has no quantizer inside; see qatkit.summary(model) for those there are")


def require_module(model: object, where: str) -> None:
    """Raise a `QatkitTypeError` unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise QatkitTypeError(f"{where}: model is a {kind}, not a torch.nn.Module; pass the model object itself")


def _switch(model: nn.Module, pattern: str, *, on: bool) -> Mode[bool]:
    where = "enable_quantization" if on else "disable_quantization"
    modules: list[nn.Module] = list(select_quantizers(model, pattern, where))
    return Mode(modules, _is_on, _set_on, lambda _: on)


def _is_on(module: nn.Module) -> bool:
    assert isinstance(module, TensorQuantizer)
    return module.quantize


def _set_on(module: nn.Module, state: bool) -> None:
    assert isinstance(module, TensorQuantizer)
    module.quantize = state
