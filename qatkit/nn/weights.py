"""All quantized weights of a model, whatever layer or block holds them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from qatkit.nn.quantized import QuantizedWeight
from qatkit.nn.slots import SUFFIX, parameter_of
from qatkit.quantizer import TensorQuantizer
from qatkit.ranks import whole


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter with a quantizer beside it: ``weight_quantizer`` stands next to ``weight``.

    Attributes:
        path: path of the quantizer.
        quantizer: the quantizer.
        owner: the module that both are in.
        name: name of the parameter.
    """

    path: str
    quantizer: TensorQuantizer
    owner: nn.Module
    name: str

    @property
    def layer(self) -> QuantizedWeight | None:
        """The owner if it is a layer that may have a batch norm folded in."""
        plain = isinstance(self.owner, QuantizedWeight) and self.name == "weight"
        return self.owner if plain and isinstance(self.owner, QuantizedWeight) else None

    @property
    def seen(self) -> Tensor:
        """The tensor that the quantizer reads: the parameter, folded where the layer folds it."""
        parameter: Tensor = whole(getattr(self.owner, self.name))
        scale = None if self.layer is None else self.layer.weight_fold_scale()
        return parameter if scale is None else parameter.float() * scale


def weights_of(model: nn.Module) -> Iterator[Weight]:
    """Yield each quantized weight once, in the order of the modules.

    >>> from qatkit.nn import QuantLinear
    >>> [weight.path for weight in weights_of(nn.Sequential(QuantLinear(2, 2)))]
    ['0.weight_quantizer']
    """
    seen: set[int] = set()
    for path, module in model.named_modules():
        for child_name, child in module._modules.items():
            if (
                isinstance(child, TensorQuantizer)
                and parameter_of(module, child_name) is not None
                and id(child) not in seen
            ):
                seen.add(id(child))
                name = child_name.removesuffix(SUFFIX)
                yield Weight(f"{path}.{child_name}".lstrip("."), child, module, name)
