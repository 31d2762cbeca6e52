"""Switch quantization on and off: context managers that restore exactly what they found."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType

from torch import nn

from qatkit.config import matches, require_match
from qatkit.errors import QatkitError, QatkitTypeError
from qatkit.quantizer import TensorQuantizer

Undo = Callable[[], None]


@contextmanager
def training_flags(modules: Iterable[nn.Module], training: bool) -> Iterator[None]:
    """Put modules in a mode by their flags alone: a ``train()`` of the user's is not called.

    >>> net = nn.Dropout()
    >>> with training_flags([net], False):
    ...     net.training
    False
    >>> net.training
    True
    """
    saved = [(module, module.training) for module in modules]
    try:
        for module, _ in saved:
            module.training = training
        yield
    finally:
        for module, before in saved:
            module.training = before


class Mode:
    """A change of some modules' state: a context manager, or with `apply` for good.

    The change happens on entering the context. On leaving it, also by an exception, each module
    gets back the state that it had; contexts nest, and one object can be entered again.

    Args:
        change: makes the change, all of it or none, and returns what restores the state before.

    >>> state = ["before"]
    >>> def change():
    ...     old = state[:]
    ...     state[:] = ["within"]
    ...     return lambda: state.__setitem__(slice(None), old)
    >>> with Mode(change):
    ...     print(*state)
    within
    >>> print(*state)
    before
    """

    def __init__(self, change: Callable[[], Undo]) -> None:
        """Remember what to change; nothing is changed yet."""
        self._change = change
        self._undo: list[Undo] = []

    def apply(self) -> None:
        """Make the change for good."""
        self._change()

    def __enter__(self) -> None:
        """Make the change."""
        self._undo.append(self._change())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore each module's own state."""
        self._undo.pop()()


def disable_quantization(model: nn.Module, pattern: str = "*") -> Mode:
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


def enable_quantization(model: nn.Module, pattern: str = "*") -> Mode:
    """Quantize tensors: the counterpart of `disable_quantization`, with its uses and errors."""
    return _switch(model, pattern, on=True)


def quantizers(model: nn.Module, pattern: str = "*") -> Iterator[tuple[str, TensorQuantizer]]:
    """Yield ``(path, quantizer)`` of each one that ``pattern`` matches under any path, once."""
    seen: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if (
            isinstance(module, TensorQuantizer)
            and id(module) not in seen
            and matches(pattern, path)
        ):
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
        raise QatkitError(
            f"{where}: {type(model).__name__} has no quantizers, "
            "call qatkit.prepare(model, example_inputs) first"
        )
    require_match(pattern, paths, f"{where}, pattern {pattern!r}")
    hit = next(path for path in paths if fnmatch.fnmatchcase(path, pattern))
    raise QatkitError(
        f"{where}: {hit!r} has no quantizer inside; qatkit.summary(model) lists those there are"
    )


def require_module(model: object, where: str) -> None:
    """Raise a `QatkitTypeError` unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise QatkitTypeError(
            f"{where}: model is a {kind}, not a torch.nn.Module; pass the model object itself"
        )


def _switch(model: nn.Module, pattern: str, *, on: bool) -> Mode:
    where = "enable_quantization" if on else "disable_quantization"
    selected = select_quantizers(model, pattern, where)

    def restore(states: list[bool]) -> None:
        for quantizer, state in zip(selected, states, strict=True):
            quantizer.quantize = state

    def change() -> Undo:
        states = [quantizer.quantize for quantizer in selected]
        restore([on] * len(selected))
        return lambda: restore(states)

    return Mode(change)
