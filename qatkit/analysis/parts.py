"""The parts of a prepared model that are quantized, or left in float, as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from qatkit.config import Rule
from qatkit.graph.plan import Plan, join_path
from qatkit.modes import quantizers, select_quantizers
from qatkit.nn.functions import FUNCTIONS
from qatkit.nn.quantized import QuantizedComposite, QuantizedInput
from qatkit.prepare import plan_of, weight_quantizers
from qatkit.quantizer import TensorQuantizer

Kind = Literal["layer", "input", "function", "tensor"]


_OPERAND = re.compile(r"(.+)_input_\d+_quantizer")


@dataclass(frozen=True)
class Part:
    """Quantizers that belong together.

    Attributes:
        name: path of a layer, or of the first quantizer of a function; no two parts have the same.
        kind: ``"layer"``: a layer with its weights and inputs; ``"input"``: a module without
            weights, such as a pool; ``"function"``: the operands of one function, such as an
            addition or a matrix product; ``"tensor"``: a quantizer that nothing else is known of.
        quantizers: their paths. A quantizer that several parts read stands in each of them.
        weights: those of them that quantize weights.
        shared: those of them that a layer owns, for a function that reads the same tensor.
    """

    name: str
    kind: Kind
    quantizers: tuple[str, ...]
    weights: tuple[str, ...]
    shared: tuple[str, ...] = ()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """What keeps it in float, in the config of a fresh float model."""
        return tuple(Rule(pattern, enabled=False) for pattern in self.patterns)

    @property
    def patterns(self) -> tuple[str, ...]:
        """Globs that match it and nothing else.

        Where a function shares a quantizer with a layer, they match the names of its operands: the
        layer keeps the quantizer.
        """
        if self.kind in ("layer", "input") and self.name:
            return (literal(self.name),)
        found = [literal(path) for path in self.quantizers if path not in self.shared]
        if self.shared:
            stems = (_OPERAND.fullmatch(path) for path in self.quantizers)
            found += [f"{literal(stem[1])}_input_[0-9]_quantizer" for stem in stems if stem]
        return tuple(dict.fromkeys(found))


def literal(path: str) -> str:
    """Return the glob that matches ``path`` alone.

    >>> literal("layer1.0.conv1"), literal("odd[0]")
    ('layer1.0.conv1', 'odd[[]0]')
    """
    return re.sub(r"([*?[])", r"[\1]", path)


def parts_of(model: nn.Module, where: str) -> tuple[Part, ...]:
    """Return the parts of a prepared model in the order of its modules.

    Only quantizers that are switched on count: what is float anyway is no part.

    Args:
        model: a prepared model.
        where: who asks, for messages.

    Raises:
        QatkitError: the model has no quantizers.

    >>> from qatkit.nn import QuantLinear
    >>> parts_of(nn.Sequential(QuantLinear(2, 2)), "sensitivity")[0].name
    '0'
    """
    select_quantizers(model, "*", where)
    paths = {id(each): path for path, each in quantizers(model) if each.quantize}
    weights = frozenset(weight_quantizers(model))
    owned = {
        name: tuple(dict.fromkeys(paths[id(each)] for each in found if id(each) in paths))
        for name, found in _of_modules(model).items()
    }
    owned = {name: found for name, found in owned.items() if found}
    of_layers = frozenset(path for found in owned.values() for path in found)
    taken = set(of_layers)
    parts = [_part(name, found, weights, "input") for name, found in owned.items()]
    on = frozenset(paths.values())
    for found in _of_functions(plan_of(model), model):
        own = [path for path in found if path in on and path not in taken]
        if own:
            taken.update(own)
            operands = tuple(path for path in found if path in on)
            shared = tuple(path for path in operands if path in of_layers)
            parts.append(Part(own[0], "function", operands, _among(operands, weights), shared))
    parts += [_part(path, (path,), weights, "tensor") for path in on if path not in taken]
    order = {path: position for position, (path, _) in enumerate(model.named_modules())}
    return tuple(sorted(parts, key=lambda part: order.get(part.name, 0)))


def _part(name: str, found: tuple[str, ...], weights: frozenset[str], otherwise: Kind) -> Part:
    mine = _among(found, weights)
    return Part(name, "layer" if mine and otherwise == "input" else otherwise, found, mine)


def _among(found: Iterable[str], weights: frozenset[str]) -> tuple[str, ...]:
    return tuple(path for path in found if path in weights)


def _of_modules(model: nn.Module) -> Mapping[str, list[TensorQuantizer]]:
    """Return the quantizers of each layer, those of a composite layer with all that is inside."""
    owners: dict[nn.Module, str] = {}
    composite: tuple[type[nn.Module], ...] = (QuantizedComposite, *FUNCTIONS.values())
    layers: tuple[type[nn.Module], ...] = (QuantizedInput, *composite)
    inside: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{around}.") or not around for around in inside):
            continue
        if isinstance(module, composite):
            inside.append(path)
        if isinstance(module, layers):
            owners[module] = path
    return {
        path: [each for each in owner.modules() if isinstance(each, TensorQuantizer)]
        for owner, path in owners.items()
    }


def _of_functions(plan: Plan | None, model: nn.Module) -> Iterator[tuple[str, ...]]:
    """Yield the paths of the quantizers that each function of a rewritten block reads."""
    if plan is None:
        return
    registered = dict(model.named_modules(remove_duplicate=False))
    first = {id(each): path for path, each in quantizers(model)}

    def path_of(block: str, relative: str) -> str:
        return first.get(id(registered.get(join_path(block, relative))), "")

    for block in plan.blocks:
        reads: dict[int, list[str]] = {}
        for site in block.sites:
            for use, _ in site.uses:
                if not block.signature[use].startswith("call_module "):
                    reads.setdefault(use, []).append(path_of(block.path, site.quantizer))
        yield from (tuple(dict.fromkeys(reads[use])) for use in sorted(reads))
    for interception in plan.interceptions:
        operands: dict[tuple[str, int], list[str]] = {}
        for operand in interception.operands:
            path = path_of(interception.path, operand.quantizer)
            operands.setdefault((operand.function, operand.number), []).append(path)
        yield from (tuple(dict.fromkeys(found)) for found in operands.values())
