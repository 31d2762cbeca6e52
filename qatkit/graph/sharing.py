"""One quantizer for one tensor (rule F17).

Readers of the same value share it, and the block around them runs it once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx, nn

from qatkit.graph.capture import Call, Value
from qatkit.graph.level import Level, LevelError, match, signature
from qatkit.graph.plan import BlockPlan, QuantizerPlan, Site, Skip
from qatkit.graph.readers import Reader


@dataclass(eq=False)
class Sharing:
    """Where the quantizers of the readers are registered and called.

    Attributes:
        quantizers: one for each tensor.
        values: what each of them reads, by path.
        blocks: blocks whose forward calls one.
        relieved: layers whose input arrives quantized.
        skipped: readers that could not be served, and why.
    """

    quantizers: list[QuantizerPlan] = field(default_factory=list)
    values: dict[str, tuple[Value, ...]] = field(default_factory=dict)
    blocks: list[BlockPlan] = field(default_factory=list)
    relieved: set[str] = field(default_factory=set)
    skipped: list[Skip] = field(default_factory=list)


def share(readers: Iterable[Reader], calls_of_blocks: dict[str, list[Call]]) -> Sharing:
    """Give the readers of one tensor one quantizer.

    Args:
        readers: in order of execution.
        calls_of_blocks: the recorded calls of every block by path.
    """
    return _Sharer(calls_of_blocks).run(readers)


class _Sharer:
    def __init__(self, calls_of_blocks: dict[str, list[Call]]) -> None:
        self._calls_of_blocks = calls_of_blocks
        self._levels: dict[str, Level | LevelError] = {}
        self._sites: dict[str, list[Site]] = {}
        self._result = Sharing()

    def run(self, readers: Iterable[Reader]) -> Sharing:
        groups: dict[object, list[Reader]] = {}
        for reader in readers:
            groups.setdefault((reader.spec, reader.values), []).append(reader)
        for group in groups.values():
            self._group(group)
        for path, sites in self._sites.items():
            level = self._levels[path]
            assert isinstance(level, Level)
            call = self._calls_of_blocks[path][0]
            plan = BlockPlan(path, call.template, signature(level.graph), tuple(sites))
            self._result.blocks.append(plan)
        return self._result

    def _group(self, group: list[Reader]) -> None:
        """Serve the readers of one tensor: in the block around all, else each where it stands."""
        layers = [reader for reader in group if reader.is_layer]
        owner = layers[0] if layers else group[0]
        served: list[Reader] = []
        if len(group) > 1 and len(group[0].values) == 1:
            served = self._serve(group, _common_block(group), owner.quantizer)
        paths = [reader.quantizer for reader in layers]
        for reader in group:
            if reader in served or reader in layers:
                continue
            if self._serve([reader], reader.calls[0].parent, reader.quantizer):
                served.append(reader)
                paths.append(reader.quantizer)
        if owner not in layers and owner in served and owner.quantizer not in paths:
            paths.insert(0, owner.quantizer)
        if paths:
            self._add(paths, group, served)

    def _add(self, paths: list[str], group: list[Reader], served: list[Reader]) -> None:
        reasons = dict.fromkeys(
            reader.reason for reader in group if reader in served or reader.quantizer in paths
        )
        plan = QuantizerPlan(
            paths[0], tuple(paths[1:]), "activation", group[0].spec, "; ".join(reasons)
        )
        self._result.quantizers.append(plan)
        self._result.values[plan.path] = group[0].values

    def _serve(self, group: list[Reader], block: Call | None, quantizer: str) -> list[Reader]:
        """Call ``quantizer`` in ``block`` for the readers of ``group``; return those it serves."""
        functions = [reader for reader in group if not reader.is_layer]
        level = self._level(block)
        if block is None or isinstance(level, LevelError):
            if len(group) == 1:
                reason = f"{group[0].reason}; but {_name(block)} cannot be rewritten: {level}"
                self._result.skipped.append(Skip(quantizer, reason))
            return []
        value = group[0].values[0]
        uses, served = _uses(level, value, group)
        if not uses or (len(served) < 2 and not any(reader in functions for reader in served)):
            return []
        nodes = {node: i for i, node in enumerate(level.graph.nodes)}
        source = next(node for node in nodes if level.values.get(node) is value)
        pairs = tuple((nodes[use], nodes[argument]) for use, argument in uses)
        prefix = f"{block.name}." if block.name else ""
        site = Site(quantizer.removeprefix(prefix), nodes[source], pairs)
        self._sites.setdefault(block.name, []).append(site)
        self._result.relieved.update(reader.path for reader in served if reader not in functions)
        return served

    def _level(self, block: Call | None) -> Level | LevelError:
        if block is None or block.module is None:
            return LevelError("it has no block around it")
        if block.name not in self._levels:
            self._levels[block.name] = self._traced(block)
        return self._levels[block.name]

    def _traced(self, block: Call) -> Level | LevelError:
        if len(self._calls_of_blocks[block.name]) > 1:
            return LevelError("it is called more than once")
        assert block.module is not None
        if _writes_argument(block) and not self._argument_is_its_own(block):
            return LevelError("it writes to its argument, which the code around it can see")
        try:
            return match(block.module, block)
        except LevelError as error:
            return error

    def _argument_is_its_own(self, block: Call) -> bool:
        """Tell whether nothing outside reads the argument of a block after the call."""
        parent = block.parent
        if parent is None:
            return False
        return type(parent.module) is nn.Sequential or isinstance(self._level(parent), Level)


def _uses(
    level: Level, value: Value, group: list[Reader]
) -> tuple[list[tuple[fx.Node, fx.Node]], list[Reader]]:
    """Return the reads of ``value`` in a block that want it quantized, and their readers."""
    reader_of = {call: reader for reader in group for call in reader.calls}
    uses: list[tuple[fx.Node, fx.Node]] = []
    served: list[Reader] = []
    for node in level.graph.nodes:
        arguments = [arg for arg in node.all_input_nodes if level.values.get(arg) is value]
        call = level.calls.get(node)
        if not arguments or call is None:
            continue
        readers = _readers_behind(call, value, reader_of)
        if readers:
            uses.extend((node, argument) for argument in arguments)
            served.extend(readers)
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


def _writes_argument(block: Call) -> bool:
    """Tell whether an operation of a block's own forward, as in ``x += y``, changes its input."""
    own = [call for call in block.children if call.module is None]
    return any(value in call.writes for call in own for value in block.inputs)


def _common_block(group: list[Reader]) -> Call | None:
    """Return the innermost block around all readers."""
    chains = [list(reader.calls[0].ancestors()) for reader in group]
    return next((block for block in chains[0] if all(block in chain for chain in chains[1:])), None)


def _name(block: Call | None) -> str:
    if block is None or not block.name:
        return "the model's own forward"
    return f"the forward of {block.name!r}"
