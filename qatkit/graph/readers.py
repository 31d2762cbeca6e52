"""Which operators read a quantized tensor, and which stay float.

The rules of the backend are applied to a recorded run.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from torch import nn

from qatkit.backend import Backend, get_backend
from qatkit.config import QuantConfig
from qatkit.graph.capture import Call, Capture, Value
from qatkit.graph.plan import Skip, join_path
from qatkit.graph.residual import is_join, place_join
from qatkit.nn.quantized import QUANTIZED, swappable
from qatkit.spec import QuantSpec

_NORMS = ("BatchNormalization", "LayerNormalization")
_OWN_REASON = {
    "Attention": "attention stays float",
    "Other": "no quantized form of this layer",
}


@dataclass(frozen=True, eq=False)
class Reader:
    """An operator that reads one tensor through a quantizer, or several if it is called often.

    Attributes:
        path: path of the module, or of the block around a function.
        quantizer: path that the quantizer has if this reader owns it.
        calls: the recorded calls.
        values: what they read, in order.
        spec: how it is quantized.
        reason: the rule that asks for it.
    """

    path: str
    quantizer: str
    calls: tuple[Call, ...]
    values: tuple[Value, ...]
    spec: QuantSpec
    reason: str

    @property
    def is_layer(self) -> bool:
        """Whether the reader is a layer that is swapped, and can run its quantizer itself."""
        return self.quantizer == join_path(self.path, "input_quantizer")


@dataclass(eq=False)
class Reading:
    """Everything that was decided about a capture.

    Attributes:
        readers: in order of execution.
        weights: spec and reason of the weight of each layer by path.
        skipped: what stays float and why.
    """

    readers: list[Reader] = field(default_factory=list)
    weights: dict[str, tuple[QuantSpec, str]] = field(default_factory=dict)
    skipped: list[Skip] = field(default_factory=list)


def find_readers(capture: Capture, config: QuantConfig) -> Reading:
    """Apply the rules F1, F6 and F7 to a recorded run."""
    finder = _Finder(capture, config)
    finder.weighted()
    finder.joins()
    finder.pools()
    finder.unreached()
    finder.reading.readers.sort(key=lambda reader: reader.calls[0].index)
    return finder.reading


class _Finder:
    def __init__(self, capture: Capture, config: QuantConfig) -> None:
        self.capture = capture
        self.config = config
        self.backend: Backend = get_backend(config.backend)
        self.reading = Reading()
        self.quantized: set[Call] = set()
        self.calls: dict[str, list[Call]] = {}
        for call in capture.operators:
            if call.module is not None:
                self.calls.setdefault(call.name, []).append(call)

    def weighted(self) -> None:
        """F1: the input and the weight of every weighted layer."""
        layers = [
            path
            for path, calls in self.calls.items()
            if _weighted_layer(calls[0], self.backend.weighted)
        ]
        edges = {layers[0], layers[-1]} if layers else set()
        for call in self.capture.operators:
            if call.module is None:
                if call.kind in self.backend.weighted or call.kind == "Attention":
                    self._functional(call)
            elif call.name in layers:
                if call is self.calls[call.name][0]:
                    self._layer(call, first_or_last=call.name in edges)
            elif call is self.calls[call.name][0]:
                self._other_layer(call)

    def joins(self) -> None:
        """F6: the skip input of every residual addition."""
        for call in self.capture.operators:
            if not is_join(call):
                continue
            join = place_join(call, self.quantized, self.backend)
            path = function_path(call)
            if not join.quantized and len(call.inputs[0].shape) > 2:  # boxes and anchors are 2-D
                self._skip(path, join.reason)
            for value in join.quantized:
                self._read_by_function(call, value, join.reason)

    def pools(self) -> None:
        """F7: the input of an average pool whose result is quantized again."""
        for call in reversed(self.capture.operators):
            if not self._is_pool(call):
                continue
            where = call.name if call.module is not None else function_path(call)
            if not any(self._is_read(value) for value in call.results):
                self._skip(where, f"F7: {call.kind} without a quantized layer behind it")
            elif (
                call.module is None or not swappable(call.module) or len(self.calls[call.name]) > 1
            ):
                self._read_by_function(
                    call, call.inputs[0], f"F7: {call.kind} between quantized layers"
                )
            else:
                path = join_path(call.name, "input_quantizer")
                spec = self.config.spec(path, "activation")
                if spec is None:
                    self._skip(call.name, "disabled by a rule")
                else:
                    reason = f"F7: {call.kind} between quantized layers"
                    self._add(Reader(call.name, path, (call,), (call.inputs[0],), spec, reason))

    def unreached(self) -> None:
        """Name the layers that only run in training, or on other inputs: they stay float."""
        inside = [f"{path}." for path, calls in self.calls.items() if calls[0].kind != "Block"]
        for path, module in self.capture.copy.named_modules():
            known = path in self.calls or any(path.startswith(prefix) for prefix in inside)
            weighted = swappable(module) and isinstance(
                getattr(module, "weight", None), nn.Parameter
            )
            if weighted and not known:
                self._skip(path, "example_inputs do not reach it in eval mode")

    def _functional(self, call: Call) -> None:
        """Say why a weighted function stays float: it is the user's, or a layer's own forward."""
        owner = call.parent
        module = None if owner is None else owner.module
        if owner is not None and module is not None and isinstance(module, tuple(QUANTIZED)):
            self._own_forward(owner.name, module)
        else:
            reason = f"functional {call.name} has no module whose weight to quantize"
            self._skip(function_path(call), reason)

    def _own_forward(self, path: str, module: nn.Module) -> None:
        kind = type(module)
        home = "" if kind.__module__.startswith("torch.nn.") else f" ({kind.__module__})"
        reason = f"{kind.__name__}{home} is not a plain torch.nn layer: it may have its own forward"
        self._skip(path, reason)

    def _layer(self, call: Call, *, first_or_last: bool) -> None:
        module, path = call.module, call.name
        assert module is not None
        if not swappable(module):
            self._own_forward(path, module)
            return
        specs = self._specs(path, module, self.config.first_last_bits if first_or_last else None)
        if specs is None:
            self._skip(path, "disabled by a rule")
            return
        calls = tuple(self.calls[path])
        edge = (
            "; first or last layer (F16)" if first_or_last and self.config.first_last_bits else ""
        )
        self.quantized.update(calls)
        self.reading.weights[path] = (specs[0], f"F2: weight of {call.kind}{edge}")
        values = tuple(one.inputs[0] for one in calls)
        reason = f"F1: input of {call.kind}{edge}"
        quantizer = join_path(path, "input_quantizer")
        self._add(Reader(path, quantizer, calls, values, specs[1], reason))

    def _specs(
        self, path: str, module: nn.Module, bits: int | None
    ) -> tuple[QuantSpec, QuantSpec] | None:
        """Return the specs of weight and input, ``None`` if a rule disables one.

        Rule B1 wants both or neither.
        """
        weight_path = join_path(path, "weight_quantizer")
        weight = self.config.spec(weight_path, "weight", bits=bits)
        data = self.config.spec(join_path(path, "input_quantizer"), "activation", bits=bits)
        if weight is None or data is None:
            return None
        if weight.axis is not None and not self.config.names_axis(weight_path):
            kind = "ConvTranspose" if "ConvTranspose" in type(module).__name__ else "Conv"
            weight = weight.replace(axis=self.backend.axis_of_weight[kind])
        return weight, data

    def _other_layer(self, call: Call) -> None:
        module = call.module
        assert module is not None
        if call.kind in _NORMS or not any(True for _ in module.parameters()):
            return
        if call.kind in _OWN_REASON:
            self._skip(call.name, f"{_OWN_REASON[call.kind]} ({type(module).__name__})")

    def _read_by_function(self, call: Call, value: Value, reason: str) -> None:
        path = quantizer_path(call, value)
        spec = self.config.spec(path, "activation")
        if spec is None:
            self._skip(path, "disabled by a rule")
        else:
            block = call.parent.name if call.parent is not None else ""
            self._add(Reader(block, path, (call,), (value,), spec, reason))

    def _is_pool(self, call: Call) -> bool:
        if call.kind not in self.backend.needs_quantized_output or not call.inputs:
            return False
        before, after = call.inputs[0].shape, call.results[0].shape
        return call.kind != "ReduceMean" or (len(before) == 4 and _spatial_mean(before, after))

    def _is_read(self, value: Value) -> bool:
        """Tell whether a quantizer reads ``value``, at once or behind operators that only copy."""
        todo, seen = [value], set()
        reads = {
            (call, v)
            for reader in self.reading.readers
            for call in reader.calls
            for v in reader.values
        }
        while todo:
            current = todo.pop()
            seen.add(current)
            for call in current.consumers:
                if (call, current) in reads:
                    return True
                if call.kind in self.backend.copies:
                    todo.extend(result for result in call.results if result not in seen)
        return False

    def _add(self, reader: Reader) -> None:
        self.reading.readers.append(reader)

    def _skip(self, path: str, reason: str) -> None:
        self.reading.skipped.append(Skip(path, reason))


def function_path(call: Call) -> str:
    """Return a path for a function call: its block and its name, numbered from the second use."""
    parent = call.parent
    if parent is None:
        return call.name
    same = [c for c in parent.children if c.module is None and c.name == call.name]
    number = next(i for i, c in enumerate(same) if c is call)
    name = f"{call.name}_{number}" if number else call.name
    return join_path(parent.name, name)


def quantizer_path(call: Call, value: Value) -> str:
    """Return the path of the quantizer that a call owns for one of its inputs."""
    if call.module is not None:
        parent = call.parent.name if call.parent is not None else ""
        leaf = call.name.rsplit(".", 1)[-1]
        return join_path(parent, f"{leaf}_quantizer")
    several = len(call.inputs) > 1 and call.kind != "Add"
    number = f"_input_{call.inputs.index(value)}" if several else ""
    return f"{function_path(call)}{number}_quantizer"


def _weighted_layer(call: Call, kinds: Container[str]) -> bool:
    return call.module is not None and call.kind in kinds


def _spatial_mean(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    return after in (before[:2], (*before[:2], 1, 1))
