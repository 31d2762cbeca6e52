"""The parts of a model that are reconstructed one by one: blocks, and the layers outside."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from qatkit.errors import QatkitError, QatkitTypeError
from qatkit.graph.level import float_class
from qatkit.graph.plan import join_path
from qatkit.graph.structure import tensors
from qatkit.modes import quantizers
from qatkit.nn.quantized import QuantizedComposite
from qatkit.nn.weights import Weight, weights_of
from qatkit.prepare import plan_of, weight_quantizers
from qatkit.ptq.norms import norms_of
from qatkit.ptq.runs import Runs, Stop
from qatkit.quantizer import TensorQuantizer
from qatkit.spec import suggest

Granularity = Literal["auto", "layers"]
_MOST_LAYERS = 16
"""A block with more than these learns nothing that smaller parts would not learn faster."""


@dataclass(frozen=True, eq=False)
class Unit:
    """A part of a model that runs alone: one module, or a layer and the batch norm behind it.

    Attributes:
        path: where it is.
        chain: the modules; the first takes the arguments, each further one the result before.
        weights: the quantized weights inside.
        activations: the quantizers of activations inside.
        names: paths of the modules of the chain.
        calls: how often a forward of the model runs it.
        follows: it is the only thing that reads the result of the unit before it, unchanged, and
            reads nothing else.
    """

    path: str
    chain: tuple[nn.Module, ...]
    weights: tuple[Weight, ...]
    activations: tuple[TensorQuantizer, ...]
    names: tuple[str, ...]
    calls: int = 1
    follows: bool = False

    @property
    def entry(self) -> nn.Module:
        """The module that takes the arguments."""
        return self.chain[0]

    @property
    def exit(self) -> nn.Module:
        """The module that returns the result."""
        return self.chain[-1]

    def of(self, twin: nn.Module) -> Unit:
        """Return the same unit of another model, without its quantizers."""
        modules = dict(twin.named_modules())
        return Unit(
            self.path, tuple(modules[path] for path in self.names), (), (), self.names, self.calls
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        value = self.chain[0](*args, **kwargs)
        for module in self.chain[1:]:
            value = module(value)
        return value


def find_units(runs: Runs, blocks: Granularity | Sequence[str]) -> list[Unit]:
    """Return the units of a model in the order in which they run.

    Args:
        runs: the model and data, of which the first batch is run.
        blocks: ``"auto"``: the blocks around residual joins and their siblings of the same class,
            then all layers outside of them; ``"layers"``: each layer alone; or the paths of
            blocks, with all layers outside of them alone.

    Raises:
        QatkitError: a path is no module, has no quantized weight inside, or lies inside another.
    """
    paths = _paths(runs, blocks)
    modules = dict(runs.model.named_modules())
    weights = {id(each) for each in weight_quantizers(runs.model).values()}
    owners = _units_of_layers(runs.model, paths)
    chains = {path: (modules[path],) for path in paths} | owners
    names = {module: path for path, module in modules.items()}
    units = [_unit(path, chain, weights, names) for path, chain in chains.items()]
    return _in_order(runs, units)


def _paths(runs: Runs, blocks: Granularity | Sequence[str]) -> list[str]:
    if blocks == "layers":
        return []
    if blocks == "auto":
        return _blocks_around_joins(runs.model)
    if isinstance(blocks, str) or not isinstance(blocks, Sequence):
        raise QatkitTypeError(
            f"{runs.where}(blocks={blocks!r}): give 'auto', 'layers' or a list of module paths"
        )
    modules = dict(runs.model.named_modules())
    for path in blocks:
        if path not in modules:
            raise QatkitError(
                f"{runs.where}(blocks): no module {path!r}; "
                f"{suggest(str(path), tuple(modules)[1:])}"
            )
        if not any(True for _ in weights_of(modules[path])):
            raise QatkitError(
                f"{runs.where}(blocks): {path!r} has no quantized weight; name the block around it"
            )
        for other in blocks:
            if other != path and _inside(path, other):
                raise QatkitError(
                    f"{runs.where}(blocks): {path!r} is inside {other!r}; give one of them"
                )
    return list(dict.fromkeys(blocks))


def _blocks_around_joins(model: nn.Module) -> list[str]:
    """Return the blocks that hold a residual join, and all other modules of their classes."""
    plan = plan_of(model)
    if plan is None:
        return []
    modules = dict(model.named_modules())
    joins = {q for e in plan.quantizers if "F6" in e.reason for q in (e.path, *e.aliases)}
    owners = {
        block.path
        for block in plan.blocks
        if block.path and any(join_path(block.path, s.quantizer) in joins for s in block.sites)
    }
    kinds = {float_class(type(modules[path])) for path in owners}
    found = [
        path
        for path, module in modules.items()
        if path
        and float_class(type(module)) in kinds
        and 0 < sum(1 for _ in weights_of(module)) <= _MOST_LAYERS
    ]
    return [path for path in found if not any(_inside(o, path) for o in found if o != path)]


def _units_of_layers(model: nn.Module, paths: list[str]) -> dict[str, tuple[nn.Module, ...]]:
    """Return the layers outside of the blocks by path, each with the batch norm folded into it."""
    modules = dict(model.named_modules())
    composites = [p for p, m in modules.items() if isinstance(m, QuantizedComposite)]
    norms = norms_of(model)
    found: dict[str, tuple[nn.Module, ...]] = {}
    for weight in weights_of(model):
        path = weight.path.rpartition(".")[0]
        if any(_inside(path, block) for block in paths):
            continue
        path = next((c for c in composites if _inside(path, c)), path)
        layer = modules[path]
        norm = norms.get(layer)
        found[path] = (layer,) if norm is None else (layer, norm)
    return found


def _unit(
    path: str, chain: tuple[nn.Module, ...], weights: set[int], names: dict[nn.Module, str]
) -> Unit:
    inside = [
        Weight(join_path(path, weight.path), weight.quantizer, weight.owner, weight.name)
        for weight in weights_of(chain[0])
    ]
    own = [each for _, each in quantizers(chain[0]) if id(each) not in weights]
    return Unit(path, chain, tuple(inside), tuple(own), tuple(names[m] for m in chain))


def _in_order(runs: Runs, units: list[Unit]) -> list[Unit]:
    """Return the units that run, in order, with the number of their calls."""
    entered: list[int] = []
    chained: set[int] = set()
    last: list[tuple[int, Tensor, int]] = []

    def enter(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = tensors((args, kwargs))
            if last and len(given) == 1 and given[0] is last[0][1]:
                same = given[0]._version == last[0][2]
                if same and entered and entered[-1] == last[0][0]:
                    chained.add(index)
            entered.append(index)

        return hook

    def leave(index: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            last[:] = [(index, output, output._version)] if isinstance(output, Tensor) else []

        return hook

    with ExitStack() as stack:
        for index, unit in enumerate(units):
            first = unit.entry.register_forward_pre_hook(enter(index), with_kwargs=True)
            stack.callback(first.remove)
            stack.callback(unit.exit.register_forward_hook(leave(index)).remove)
        try:
            runs.run(0)
        except Stop:  # pragma: no cover
            raise
    order = list(dict.fromkeys(entered))
    found = []
    for position, index in enumerate(order):
        unit, calls = units[index], entered.count(index)
        before = position > 0 and entered.count(order[position - 1]) == 1
        follows = index in chained and calls == 1 and before
        found.append(
            Unit(unit.path, unit.chain, unit.weights, unit.activations, unit.names, calls, follows)
        )
    return found


def _inside(path: str, block: str) -> bool:
    return path == block or path.startswith(f"{block}.") or block == ""
