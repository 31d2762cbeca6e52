"""Where a quantized layer has its quantizers, known from the float layer before it is swapped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor, nn

SUFFIX = "_quantizer"


def quantizer_of(parameter: str) -> str:
    """Return the name of the quantizer beside a parameter, or of a tensor of that name.

    >>> quantizer_of("weight"), quantizer_of("weight_ih_l0")
    ('weight_quantizer', 'weight_ih_l0_quantizer')
    """
    return parameter + SUFFIX


def parameter_of(owner: nn.Module, quantizer: str) -> Tensor | None:
    """Return the parameter of ``owner`` that a quantizer of this name reads, ``None`` for none.

    >>> parameter_of(nn.Linear(2, 3), "weight_quantizer").shape
    torch.Size([3, 2])
    >>> parameter_of(nn.Linear(2, 3), "input_quantizer") is None
    True
    """
    name = quantizer.removesuffix(SUFFIX)
    found = None if name == quantizer else getattr(owner, name, None)
    return found if isinstance(found, Tensor) else None


@dataclass(frozen=True)
class Slots:
    """The quantizers of one layer, by the names that they have in it.

    Attributes:
        inputs: the argument of ``forward`` that each input quantizer reads.
        parameters: parameters with a quantizer of their own (`quantizer_of`), output channels
            first; without them the layer is not swapped.
        inner: quantizers of tensors that only exist inside the forward, those of the operands of
            one operator together, its weight too: they are on or off together (rule B1).
        layers: child layers that the forward calls, which are swapped as well.
    """

    inputs: Mapping[str, str] = field(
        default_factory=lambda: MappingProxyType({"input_quantizer": "input"})
    )
    parameters: tuple[str, ...] = ()
    inner: tuple[tuple[str, ...], ...] = ()
    layers: tuple[str, ...] = ()
