"""Batch norms whose statistics are frozen, also while the model trains."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class FrozenStatistics(nn.Module):
    """Base of the classes that `freeze_statistics` makes, one for each class of batch norm.

    The layer normalizes with its running mean and variance and leaves them alone, whatever its
    ``training`` flag says; weight and bias train on. The forward is that of `float_class` in eval
    mode, so that a subclass with a forward of its own freezes as well.

    Attributes:
        float_class: the class of the batch norm before.
    """

    float_class: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Normalize as in eval mode."""
        training = self.training
        self.training = False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.training = training

    def extra_repr(self) -> str:
        """Say that the statistics are frozen."""
        return f"{super().extra_repr()}, frozen"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the class before and the state: this class is made anew."""
        reduced: Any = super().__reduce_ex__(protocol)
        return _blank, (self.float_class,), *reduced[2:]


def batch_norms(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """Return ``(path, module)`` of every batch norm that has running statistics.

    >>> [path for path, _ in batch_norms(nn.Sequential(nn.BatchNorm1d(2), nn.InstanceNorm1d(2)))]
    ['0']
    """
    return [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_var is not None
    ]


def freeze_statistics(norm: nn.Module) -> None:
    """Freeze the running statistics in place: same object, keys, hooks, flags and base class.

    >>> norm = nn.BatchNorm2d(3)
    >>> freeze_statistics(norm)
    >>> statistics_are_frozen(norm), isinstance(norm, nn.BatchNorm2d)
    (True, True)
    """
    if not statistics_are_frozen(norm):
        norm.__class__ = _frozen_class(type(norm))


def thaw_statistics(norm: nn.Module) -> None:
    """Undo `freeze_statistics`; nothing happens to a batch norm that is not frozen."""
    if isinstance(norm, FrozenStatistics):
        kind: Any = norm.float_class
        norm.__class__ = kind


def statistics_are_frozen(norm: nn.Module) -> bool:
    """Tell whether `freeze_statistics` was called."""
    return isinstance(norm, FrozenStatistics)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _frozen_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the frozen class of a class of batch norm; it is made once."""
    if kind not in _CLASSES:
        members = {
            "float_class": kind,
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
            "__doc__": kind.__doc__,
        }
        bases: tuple[type[nn.Module], ...] = (FrozenStatistics, kind)
        _CLASSES[kind] = type(kind.__name__, bases, members)
    return _CLASSES[kind]


def _blank(kind: type[nn.Module]) -> nn.Module:
    """Return an object of the frozen class, without state."""
    frozen = _frozen_class(kind)
    return frozen.__new__(frozen)
