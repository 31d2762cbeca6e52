"""Which operators read a quantized tensor, and which stay float.

The rules of the backend are applied to a recorded run: `qatkit.graph.layers` to its layers,
`qatkit.graph.products` to functions that multiply, `qatkit.graph.joins` to what joins and pools.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import nn

from qatkit.backend import Backend, get_backend
from qatkit.config import QuantConfig, Role
from qatkit.graph.capture import Call, Capture, Value
from qatkit.graph.levels import Levels
from qatkit.graph.plan import QuantizerPlan, Skip, join_path
from qatkit.nn.registry import swappable
from qatkit.spec import QuantSpec

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, eq=False)
class Reader:
    """An operator that reads one tensor through a quantizer, or several if it is called often.

    Attributes:
        path: path of the layer, or of the block around a function.
        quantizer: path that the quantizer has if this reader owns it.
        calls: the recorded calls.
        values: what they read, in order.
        spec: how it is quantized.
        reason: the rule that asks for it.
        is_layer: whether it is a layer that is swapped, and can run its quantizer itself.
        role: whether the tensor is a weight or an activation.
        alone: never shares a scale with what the tensor was copied from (rule F13).
    """

    path: str
    quantizer: str
    calls: tuple[Call, ...]
    values: tuple[Value, ...]
    spec: QuantSpec
    reason: str
    is_layer: bool = False
    role: Role = "activation"
    alone: bool = False

    @property
    def relieves(self) -> bool:
        """Whether the input quantizer of the layer `path` is the one, wherever it is called."""
        return self.quantizer == join_path(self.path, "input_quantizer")


@dataclass(eq=False)
class Reading:
    """What is decided about a recorded run; the rules write it.

    Attributes:
        capture: the recorded run.
        config: what was asked for.
        levels: the forwards of the blocks.
        layers: kind of each layer to swap by path.
        owned: quantizers of weights and of tensors inside a layer, by path of the layer.
        replaced: function calls whose place a module takes, by path of the module.
        quantized: calls whose operands are quantized.
        skipped: what stays float and why.
        asked: the paths that a rule can name: those that a spec was asked for.
    """

    capture: Capture
    config: QuantConfig
    levels: Levels
    layers: dict[str, str] = field(default_factory=dict)
    owned: dict[str, list[QuantizerPlan]] = field(default_factory=dict)
    replaced: dict[str, list[Call]] = field(default_factory=dict)
    quantized: set[Call] = field(default_factory=set)
    skipped: list[Skip] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)
    _readers: dict[tuple[str, str], Reader] = field(default_factory=dict)

    @cached_property
    def backend(self) -> Backend:
        """The engine that the model is prepared for, with the policies of the config."""
        backend = get_backend(self.config.backend)
        return replace(
            backend,
            residual=self.config.residual or backend.residual,
            transformer_residual=self.config.transformer_residual or backend.transformer_residual,
        )

    def spec(self, path: str, role: Role, *, bits: int | None = None) -> QuantSpec | None:
        """Return the spec of the quantizer at ``path``, ``None`` where a rule disables it."""
        self.asked.add(path)
        return self.config.spec(path, role, bits=bits)

    @property
    def readers(self) -> list[Reader]:
        """All readers in order of execution."""
        return sorted(self._readers.values(), key=lambda reader: reader.calls[0].index)

    def read(self, reader: Reader) -> None:
        """Add a reader, or further calls of one."""
        call = reader.calls[0]
        key = (reader.quantizer, function_path(call))
        known = self._readers.get(key)
        if known is not None:
            reader = replace(
                known,
                calls=(*known.calls, *reader.calls),
                values=(*known.values, *reader.values),
            )
        self._readers[key] = reader

    def read_by_function(self, call: Call, value: Value, reason: str, path: str = "") -> None:
        """Let a function read one of its inputs through an activation quantizer at ``path``."""
        path = path or self._free_path(call, value)
        spec = self.spec(path, "activation")
        if spec is None:
            self.skip(path, "disabled by a rule")
        else:
            block = call.parent.name if call.parent is not None else ""
            self.read(Reader(block, path, (call,), (value,), spec, reason))

    def read_by_call(self, call: Call, value: Value, reason: str) -> None:
        """Let a call read an input through the quantizer of its layer, else of the block around.

        Where the layer writes to its input, only the block can see who else reads what it wrote.
        """
        module = call.module
        own = module is not None and swappable(module) and value not in call.writes
        if not own or len(self.levels.calls[call.name]) > 1:
            self.read_by_function(call, value, reason)
            return
        path = join_path(call.name, "input_quantizer")
        spec = self.spec(path, "activation")
        if spec is None:
            self.skip(call.name, "disabled by a rule")
            return
        self.layers[call.name] = type(module).__name__
        self.read(Reader(call.name, path, (call,), (value,), spec, reason, is_layer=True))

    @property
    def reads(self) -> set[tuple[Call, Value]]:
        """Which call reads which value through a quantizer."""
        return {
            pair
            for reader in self._readers.values()
            for pair in zip(reader.calls, reader.values, strict=True)
        }

    def operand_names(self) -> set[str]:
        """Return the paths of the quantizers that operators might have.

        Whether they have them depends on what else is quantized: a rule that leaves such a
        quantizer out is right even if another one has left it out already.
        """
        found = set()
        for call in self.capture.operators:
            stem = function_path(call)
            found.add(f"{stem}_quantizer")
            for index, value in enumerate(call.inputs):
                found |= {f"{stem}_input_{index}_quantizer", quantizer_path(call, value)}
        return found

    def _free_path(self, call: Call, value: Value) -> str:
        """Return a path for a quantizer of ``call`` that no other operand in its block has."""
        first = quantizer_path(call, value)
        stem = first.removesuffix("_quantizer")
        operand = f"{stem}_input_{call.inputs.index(value)}_quantizer"
        numbered = (f"{stem}_{n}_quantizer" for n in itertools.count(1))
        here = {
            reader.quantizer
            for reader in self._readers.values()
            if any(other.parent is call.parent for other in reader.calls)
        }
        several = () if call.module is not None else (operand,)
        return next(
            path for path in itertools.chain((first,), several, numbered) if path not in here
        )

    def is_read(self, value: Value) -> bool:
        """Tell whether a quantizer reads ``value``, at once or behind operators that only copy."""
        reads = self.reads
        todo, seen = [value], set()
        while todo:
            current = todo.pop()
            seen.add(current)
            for call in current.consumers:
                if (call, current) in reads:
                    return True
                if call.kind in self.backend.copies:
                    todo.extend(result for result in call.results if result not in seen)
        return False

    def skip(self, path: str, reason: str) -> None:
        """Leave something in float."""
        skip = Skip(path, reason)
        if skip not in self.skipped:
            self.skipped.append(skip)


def function_path(call: Call) -> str:
    """Return the path of a module's call, or the block of a function and its name.

    The second use of a function in a block has a number.
    """
    parent = call.parent
    if parent is None or call.module is not None:
        return call.name
    number = call_number(call)
    name = f"{call.name}_{number}" if number else call.name
    return join_path(parent.name, name)


def call_number(call: Call) -> int:
    """Return how many calls of the same function its block has made before."""
    assert call.parent is not None
    same = [c for c in call.parent.children if c.module is None and c.name == call.name]
    return next(i for i, c in enumerate(same) if c is call)


def quantizer_path(call: Call, value: Value) -> str:
    """Return the path of the quantizer that a call owns for one of its inputs.

    That of a module in a container stands in the module: a container is the list of its children.
    """
    if call.module is not None:
        if call.parent is not None and isinstance(call.parent.module, _CONTAINERS):
            return join_path(call.name, "input_quantizer")
        parent = call.parent.name if call.parent is not None else ""
        leaf = call.name.rsplit(".", 1)[-1]
        return join_path(parent, f"{leaf}_quantizer")
    several = len(call.inputs) > 1 and call.kind != "Add"
    number = f"_input_{call.inputs.index(value)}" if several else ""
    return f"{function_path(call)}{number}_quantizer"
