"""A ``torch.nn.Sequential`` whose activations and the quantizers behind them run in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn

from qatkit.nn.links import activated, clip_of, is_link, is_quiet


class Sequential(nn.Sequential):
    """Computes what ``torch.nn.Sequential`` computes, with the same modules.

    Sequentials inside it are walked through, so that an activation at the end of one has its
    reader at the beginning of the next.

    >>> from qatkit.nn import QuantConv2d
    >>> import torch
    >>> net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), QuantConv2d(3, 4, 1))
    >>> link(net)
    >>> net(torch.zeros(1, 3, 2, 2)).shape
    torch.Size([1, 4, 2, 2])
    """

    float_class: ClassVar[type] = nn.Sequential

    def forward(self, input: Any) -> Any:
        """Call the modules in turn."""
        before: nn.Module | None = None
        steps = list(_steps(self))
        for step, after in zip(steps, [*steps[1:], None], strict=True):
            clips = clip_of(step) is not None
            input = activated(before, step, after, input) if clips else step(input)
            before = step
        return input


def link(module: nn.Module) -> None:
    """Let a plain ``Sequential`` that holds a link be one of ours; leave other modules alone."""
    if type(module) is not nn.Sequential:
        return
    steps = list(_steps(module))
    if any(map(is_link, steps, steps[1:], steps[2:])):
        module.__class__ = Sequential


def _steps(chain: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of a Sequential, those of Sequentials inside it in their place."""
    modules: Any = chain._modules.values()
    for module in modules:
        own = getattr(type(module), "forward", None)
        if own in (nn.Sequential.forward, Sequential.forward) and is_quiet(module):
            yield from _steps(module)
        else:
            yield module
