"""One quantizer for one tensor (rule F17).

Readers of the same value share it, and the block around them runs it once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import fx

from qatkit.graph.block_plan import BlockPlan, InterceptionPlan, Replacement, Site
from qatkit.graph.capture import Call, Value
from qatkit.graph.interception_planner import InterceptionPlanner
from qatkit.graph.level import LevelError, signature
from qatkit.graph.levels import name_of
from qatkit.graph.matching import Level
from qatkit.graph.plan import QuantizerPlan, Skip, relative
from qatkit.graph.readers import Reader, Reading
from qatkit.nn.slots import quantizer_of


@dataclass(eq=False)
class Sharing:
    """Where the quantizers of the readers are registered and called.

    Attributes:
        quantizers: one for each tensor.
        values: what each of them reads, by path.
        blocks: blocks whose forward calls one.
        interceptions: blocks that run as they are, with quantized operands.
        relieved: layers whose input arrives quantized.
        skipped: readers that could not be served, and why.
    """

    quantizers: list[QuantizerPlan] = field(default_factory=list)
    values: dict[str, tuple[Value, ...]] = field(default_factory=dict)
    blocks: list[BlockPlan] = field(default_factory=list)
    interceptions: list[InterceptionPlan] = field(default_factory=list)
    relieved: set[str] = field(default_factory=set)
    skipped: list[Skip] = field(default_factory=list)


def share(reading: Reading) -> Sharing:
    """Give the readers of one tensor one quantizer, and put the functions' modules in place."""
    return _Sharer(reading).run()


class _Sharer:
    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._levels = reading.levels
        self._sites: dict[str, list[Site]] = {}
        self._replacements: dict[str, list[Replacement]] = {}
        self._interceptions = InterceptionPlanner(reading)
        self._result = Sharing()

    def run(self) -> Sharing:
        groups: dict[object, list[Reader]] = {}
        for reader in self._reading.readers:
            groups.setdefault((reader.spec, reader.values), []).append(reader)
        for group in groups.values():
            self._group(group)
        for path, calls in self._reading.replaced.items():
            self._replace(path, calls)
        for path in dict.fromkeys([*self._sites, *self._replacements]):
            level = self._levels.of(self._levels.calls[path][0])[0]
            plan = BlockPlan(
                path,
                level.template,
                signature(level.graph),
                tuple(self._sites.get(path, ())),
                tuple(self._replacements.get(path, ())),
                level.returns,
                level.numbers,
            )
            self._result.blocks.append(plan)
        self._result.interceptions = self._interceptions.plans()
        return self._result

    def _group(self, group: list[Reader]) -> None:
        """Serve the readers of one tensor: in the block around all, else each where it stands."""
        layers = [reader for reader in group if reader.is_layer]
        owner = layers[0] if layers else group[0]
        served: list[Reader] = []
        if len({reader.calls for reader in group}) > 1:
            served = self._serve(group, _common_block(group), owner.quantizer)
        paths = [reader.quantizer for reader in group if reader.is_layer or reader.relieves]
        for reader in group:
            if reader in served or reader in layers:
                continue
            if self._serve([reader], reader.calls[0].parent, reader.quantizer):
                served.append(reader)
                paths.append(reader.quantizer)
        if owner not in layers and owner in served:
            paths.insert(0, owner.quantizer)
        if paths:
            self._add(list(dict.fromkeys(paths)), group, served)

    def _add(self, paths: list[str], group: list[Reader], served: list[Reader]) -> None:
        reasons = dict.fromkeys(
            reader.reason for reader in group if reader in served or reader.quantizer in paths
        )
        first = group[0]
        axis, value = first.spec.axis, first.values[0]
        beside = paths[0] == quantizer_of(value.name)
        channels = None if axis is None or beside else value.shape[axis]
        plan = QuantizerPlan(
            paths[0], tuple(paths[1:]), first.role, first.spec, "; ".join(reasons), channels
        )
        self._result.quantizers.append(plan)
        tied = any(not reader.alone for reader in group) and first.role == "activation"
        self._result.values[plan.path] = first.values if tied else ()

    def _serve(self, group: list[Reader], block: Call | None, quantizer: str) -> list[Reader]:
        """Call ``quantizer`` in ``block`` for the readers of ``group``; return those it serves."""
        try:
            levels = self._levels.of(block)
        except LevelError as error:
            if self._interceptions.quantize(group, block, quantizer):
                return group
            if len(group) == 1:
                reason = f"{group[0].reason}; but {name_of(block)} cannot be rewritten: {error}"
                self._result.skipped.append(Skip(quantizer, reason))
            return []
        assert block is not None
        calls = self._levels.calls[block.name]
        if not all(set(calls) & set(one.ancestors()) for reader in group for one in reader.calls):
            return []
        found = [_site(*each, group) for each in zip(levels, calls, strict=True)]
        if found[0] is None or any(other != found[0] for other in found):
            return []
        source, pairs, served = found[0]
        functions = [reader for reader in served if not reader.is_layer]
        if len({reader.calls for reader in served}) < 2 and not functions:
            return []
        site = Site(relative(block.name, quantizer), source, pairs)
        self._sites.setdefault(block.name, []).append(site)
        self._result.relieved.update(reader.path for reader in served if reader.relieves)
        return list(served)

    def _replace(self, path: str, calls: list[Call]) -> None:
        """Put a module in the place of a function that a block calls."""
        block = calls[0].parent
        assert block is not None
        if self._levels.why_not(block):
            self._interceptions.replace(calls[0], path)
            return
        levels = self._levels.of(block)
        for node, call in levels[0].calls.items():
            if call is calls[0]:
                index = list(levels[0].graph.nodes).index(node)
                replaced = Replacement(index, relative(block.name, path), call.name)
                self._replacements.setdefault(block.name, []).append(replaced)


_Found = tuple[int, tuple[tuple[int, int], ...], tuple[Reader, ...]]


def _site(level: Level, block: Call, group: list[Reader]) -> _Found | None:
    """Return where one call of a block has to quantize the tensor of ``group``, and for whom.

    That is the index of the node that holds it, the reads that want it quantized, and the readers.
    """
    inside = {
        value
        for reader in group
        for call, value in zip(reader.calls, reader.values, strict=True)
        if block in call.ancestors()
    }
    if len(inside) != 1:
        return None
    (value,) = inside
    uses, served = _uses(level, value, group)
    source = next((node for node, held in level.values.items() if held is value), None)
    times = Counter(reader for reader in group for c in set(reader.calls) if block in c.ancestors())
    if not uses or source is None or any(times[reader] != n for reader, n in served.items()):
        return None
    index = {node: i for i, node in enumerate(level.graph.nodes)}
    pairs = tuple((index[use], index[argument]) for use, argument in uses)
    return index[source], pairs, tuple(served)


def _uses(
    level: Level, value: Value, group: list[Reader]
) -> tuple[list[tuple[fx.Node, fx.Node]], Counter[Reader]]:
    """Return the reads of ``value`` in a block that want it quantized, and how often each reads."""
    reader_of: dict[Call, Reader] = {}
    for reader in group:
        if not reader.is_layer or reader.relieves:
            reader_of |= dict.fromkeys(reader.calls, reader)
    uses: list[tuple[fx.Node, fx.Node]] = []
    served: Counter[Reader] = Counter()
    for node in level.graph.nodes:
        arguments = [arg for arg in node.all_input_nodes if level.values.get(arg) is value]
        call = level.calls.get(node)
        if not arguments or call is None:
            continue
        readers = _readers_behind(call, value, reader_of)
        if readers:
            uses.extend((node, argument) for argument in arguments)
            served.update(readers)
    return uses, served


def _readers_behind(call: Call, value: Value, reader_of: dict[Call, Reader]) -> list[Reader]:
    """Return the readers that get ``value`` through ``call``; none if it goes elsewhere too."""
    if call in reader_of:
        return [reader_of[call]]
    inside = [
        consumer
        for consumer in value.consumers
        if any(outer is call for outer in consumer.ancestors())
    ]
    readers = [reader_of[consumer] for consumer in inside if consumer in reader_of]
    returned = any(result is value for result in call.results)
    return readers if len(readers) == len(inside) and not returned else []


def _common_block(group: list[Reader]) -> Call | None:
    """Return the innermost block around all readers."""
    chains = [list(reader.calls[0].ancestors()) for reader in group]
    return next((block for block in chains[0] if all(block in chain for chain in chains[1:])), None)
