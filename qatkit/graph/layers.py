"""Rules F1 and F2 for layers: the inputs, the weights and what is quantized inside."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from qatkit.config import Role
from qatkit.graph.capture import Call, Value
from qatkit.graph.kinds import kind_of, module_name
from qatkit.graph.padding import pad_before
from qatkit.graph.plan import QuantizerPlan, join_path
from qatkit.graph.readers import Reader, Reading
from qatkit.graph.structure import unflatten
from qatkit.nn.quantized import QuantizedInput
from qatkit.nn.registry import QUANTIZED, quantized_class, swappable
from qatkit.nn.slots import SUFFIX, Slots, parameter_of, quantizer_of
from qatkit.spec import QuantSpec


def read_layers(reading: Reading) -> None:
    """Quantize every layer with weights that has a quantized form, and name the others."""
    found = list(_weighted(reading))
    edges = {found[0], found[-1]} if found else set()
    for path, calls in reading.levels.calls.items():
        module = calls[0].module
        assert module is not None
        if path in found:
            _Layer(reading, path, module, calls, edge=path in edges).read()
        elif calls[0].kind != "Block":
            _other(reading, path, module, calls[0].kind)


def name_unreached(reading: Reading) -> None:
    """Name the layers that only run in training, or on other inputs: they stay float."""
    calls = reading.levels.calls
    inside = [f"{path}." for path, found in calls.items() if found[0].kind != "Block"]
    for path, module in reading.capture.copy.named_modules():
        known = path in calls or any(path.startswith(prefix) for prefix in inside)
        if not known and swappable(module) and slots_of(module).parameters:
            reading.skip(path, "example_inputs do not reach it in eval mode")


def has_own_forward(module: nn.Module | None) -> bool:
    """Tell whether a module is a subclass of a layer that computes something else."""
    return module is not None and isinstance(module, tuple(QUANTIZED)) and not swappable(module)


def own_forward(kind: type[nn.Module]) -> str:
    """Return the reason why a subclass of a layer is not swapped."""
    home = "" if kind.__module__.startswith("torch.nn.") else f" ({kind.__module__})"
    return f"{kind.__name__}{home} is not a plain torch.nn layer: it has its own forward"


def slots_of(module: nn.Module) -> Slots:
    """Return the quantizers that a float layer is going to have."""
    quantized = _quantized_input(module)
    return Slots(inputs={}) if quantized is None or refusal(module) else quantized.slots(module)


def refusal(module: nn.Module) -> str:
    """Return why a float layer that has a quantized class stays float, empty if it does not."""
    quantized = _quantized_input(module)
    return "" if quantized is None else quantized.refusal(module)


def _quantized_input(module: nn.Module) -> type[QuantizedInput] | None:
    quantized = quantized_class(type(module))
    if quantized is None or not issubclass(quantized, QuantizedInput):
        return None
    return quantized


def _weighted(reading: Reading) -> Iterator[str]:
    """Yield the paths of the layers with weights in order of execution."""
    for path, calls in reading.levels.calls.items():
        module = calls[0].module
        if module is None or calls[0].kind == "Block":
            continue
        slots = slots_of(module)
        if (slots.parameters or slots.layers) and not _unknown_to_engine(reading, calls[0].kind):
            yield path


def _unknown_to_engine(reading: Reading, kind: str) -> bool:
    return kind.startswith("Conv") and kind not in reading.backend.weighted


class _Layer:
    """One layer that is going to be swapped."""

    def __init__(
        self, reading: Reading, path: str, module: nn.Module, calls: list[Call], *, edge: bool
    ) -> None:
        self._reading = reading
        self._path = path
        self._module = module
        self._calls = calls
        self._kind = calls[0].kind
        bits = reading.config.first_last_bits if edge else None
        self._bits = bits
        self._edge = "; first or last layer (F16)" if bits else ""

    def read(self) -> None:
        slots, reading = slots_of(self._module), self._reading
        inputs = {name: self._spec(name, "activation") for name in slots.inputs}
        weights = [self._weight("", name, self._module) for name in slots.parameters]
        inside = {group[0]: [self._inside(name) for name in group] for group in slots.inner}
        children = {name: self._child(name) for name in slots.layers}
        if None in inputs.values() or None in weights:  # rule B1 wants both or neither
            reading.skip(self._path, "disabled by a rule")
            return
        reading.layers[self._path] = type(self._module).__name__
        reading.quantized.update(self._calls)
        for name, argument in slots.inputs.items():
            self._input(name, argument, inputs[name])
        owned = [plan for plan in weights if plan is not None]
        for name, plans in {**inside, **children}.items():
            path = join_path(self._path, name)
            if None in plans:
                reading.skip(path, "disabled by a rule")
                continue
            owned += [plan for plan in plans if plan is not None]
            if name in children:
                reading.layers[path] = type(self._module.get_submodule(name)).__name__
        reading.owned[self._path] = owned

    def _child(self, name: str) -> list[QuantizerPlan | None]:
        """Return the plans of weight and input of a child layer."""
        weight = self._weight(name, "weight", self._module.get_submodule(name))
        return [weight, self._inside(join_path(name, "input_quantizer"))]

    def _input(self, name: str, argument: str, spec: QuantSpec | None) -> None:
        """Let the layer read an argument, if it is given one in every call."""
        values = tuple(_argument(call, argument) for call in self._calls)
        found = tuple(value for value in values if value is not None)
        path = join_path(self._path, name)
        assert spec is not None
        reason = f"F1: input of {self._kind}{self._edge}"
        if len(found) != len(self._calls):
            return
        calls = tuple(self._calls)
        pads = [pad_before(*pair, self._reading.levels) for pair in zip(calls, found, strict=True)]
        if None in pads:
            self._reading.read(Reader(self._path, path, calls, found, spec, reason, is_layer=True))
            return
        for pad in pads:
            assert pad is not None
            reason = f"F1, F18: input of {self._kind} behind a padding{self._edge}"
            self._reading.read(Reader(self._path, path, (pad,), (pad.inputs[0],), spec, reason))

    def _inside(self, name: str) -> QuantizerPlan | None:
        """Return the plan of an operand inside the layer, a tensor or a weight."""
        if parameter_of(self._module, name) is not None:
            return self._weight("", name.removesuffix(SUFFIX), self._module)
        spec = self._spec(name, "activation")
        if spec is None:
            return None
        product = self._kind == "Attention" and not name.endswith("input_quantizer")
        reason = f"{'F13' if product else 'F1'}: inside {self._kind}"
        return QuantizerPlan(join_path(self._path, name), (), "activation", spec, reason)

    def _weight(self, child: str, name: str, module: nn.Module) -> QuantizerPlan | None:
        path = join_path(join_path(self._path, child) if child else self._path, quantizer_of(name))
        spec = self._spec(path, "weight", whole=True)
        if spec is None:
            return None
        kind = kind_of(module_name(module))
        axes = self._reading.backend.axis_of_weight
        if spec.axis is not None and not self._reading.config.names_axis(path) and kind in axes:
            spec = spec.replace(axis=axes[kind])
        return QuantizerPlan(path, (), "weight", spec, f"F2: weight of {kind}{self._edge}")

    def _spec(self, name: str, role: Role, *, whole: bool = False) -> QuantSpec | None:
        path = name if whole else join_path(self._path, name)
        return self._reading.spec(path, role, bits=self._bits)


def _argument(call: Call, name: str) -> Value | None:
    """Return what a recorded call of a layer got for one argument of its forward."""
    args, kwargs = unflatten(call.template, iter(call.inputs))
    forward: Any = type(call.module).forward  # type: ignore[union-attr]
    parameters = inspect.signature(forward)
    bound: dict[str, Any] = parameters.bind(None, *args, **kwargs).arguments
    value = bound.get(name)
    if isinstance(value, list) and value:
        value = value[0]  # the data of a packed sequence
    return value if isinstance(value, Value) else None


def _other(reading: Reading, path: str, module: nn.Module, kind: str) -> None:
    """Say why a layer with parameters of its own stays float."""
    if has_own_forward(module):
        reading.skip(path, own_forward(type(module)))
    elif refusal(module):
        reading.skip(path, refusal(module))
    elif _unknown_to_engine(reading, kind):
        reading.skip(path, f"{reading.backend.name} has no INT8 {kind}")
    elif kind == "Other" and any(True for _ in module.parameters()):
        reading.skip(path, f"no quantized form of this layer ({type(module).__name__})")
