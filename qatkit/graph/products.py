"""Rules F1 and F13 for functions: matrix products, functional layers, scaled dot-product attention.

They are called in the forward of a block, where the quantizers of their operands go.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qatkit.graph.capture import Call, Value
from qatkit.graph.layers import has_own_forward, own_forward
from qatkit.graph.levels import name_of
from qatkit.graph.padding import pad_before
from qatkit.graph.plan import QuantizerPlan, join_path
from qatkit.graph.readers import Reader, Reading, function_path, quantizer_path
from qatkit.graph.structure import unflatten
from qatkit.nn.functions import FUNCTIONS
from qatkit.nn.slots import quantizer_of

_Operand = tuple[int, str]

_LAYER: tuple[_Operand, _Operand] = ((0, "input"), (1, "weight"))
_PRODUCTS: Mapping[str, tuple[_Operand, _Operand]] = {
    "linear": _LAYER,
    **{f"conv{n}d": _LAYER for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _LAYER for n in (1, 2, 3)},
    "matmul": ((0, "input"), (1, "other")),
    "bmm": ((0, "input"), (1, "mat2")),
    "mm": ((0, "input"), (1, "mat2")),
    "mv": ((0, "input"), (1, "vec")),
    "addmm": ((1, "mat1"), (2, "mat2")),
    "baddbmm": ((1, "batch1"), (2, "batch2")),
    "addbmm": ((1, "batch1"), (2, "batch2")),
}
"""Position and name of the two factors among the arguments of each function."""


_FLOAT: Mapping[str, str] = {
    "Embedding": "{} is given its table; use torch.nn.Embedding",
    "LSTM": "{} is one function, with products inside; use torch.nn.LSTM",
    "GRU": "{} is one function, with products inside; use torch.nn.GRU",
    "RNN": "{} is one function, with products inside; use torch.nn.RNN",
    "DeformConv": "no quantized form of {}: it interpolates between pixels",
    "RoiAlign": "no quantized form of {}: it interpolates between pixels",
}
"""Why a function of each kind stays float."""


def read_products(reading: Reading) -> None:
    """Quantize both factors of every product, and both products of attention."""
    for call in reading.capture.operators:
        if call.module is not None or all(value.constant for value in call.inputs):
            continue
        if call.name in FUNCTIONS and not any(_is_weight(reading, call, v) for v in _read(call)):
            _function(reading, call)
        elif call.kind in reading.backend.weighted:
            _product(reading, call)
        elif call.kind == "Attention":
            reading.skip(function_path(call), f"{call.name} is one function, with products inside")
        elif call.kind in _FLOAT:
            _stays_float(reading, call)


def _product(reading: Reading, call: Call) -> None:
    factors = _factors(call)
    if factors is None:
        reading.skip(function_path(call), f"{call.name} does not have two factors")
        return
    if _cannot_reach(reading, call):
        return
    if reading.spec(function_path(call), "activation") is None:
        reading.skip(function_path(call), "disabled by a rule")
        return
    plans = [_factor(reading, call, value, right=i == 1) for i, value in enumerate(factors)]
    if None in plans:  # rule B1 wants both or neither
        return
    reading.quantized.add(call)
    for plan in plans:
        assert plan is not None
        reading.read(plan)


def _stays_float(reading: Reading, call: Call) -> None:
    """Say why a function stays float; a module that is only a wrapper of it stands for it."""
    parent, reason = call.parent, _FLOAT[call.kind].format(call.name)
    module = None if parent is None else parent.module
    if parent is None or module is None or not parent.name:
        reading.skip(function_path(call), reason)
    elif has_own_forward(module):
        reading.skip(parent.name, own_forward(type(module)))
    else:
        childless = not any(True for _ in module.children())
        reading.skip(parent.name if childless else function_path(call), reason)


def _cannot_reach(reading: Reading, call: Call) -> bool:
    """Say that a function stays float because of the block around it, if that is so.

    What cannot be rewritten can be intercepted, as long as the calls can be counted.
    """
    problem = reading.levels.why_not(call.parent)
    if problem and reading.levels.functions(call.parent) is not None:
        return False
    if problem:
        module = None if call.parent is None else call.parent.module
        path = function_path(call)
        reason = f"{name_of(call.parent)} cannot be rewritten: {problem}"
        if module is not None and has_own_forward(module):
            assert call.parent is not None
            path, reason = call.parent.name, f"{own_forward(type(module))}, which {problem}"
        reading.skip(path, reason)
    return bool(problem)


def _factors(call: Call) -> tuple[Value, Value] | None:
    if call.name == "einsum":
        return (call.inputs[0], call.inputs[1]) if _two_factors(call) else None
    args, kwargs = unflatten(call.template, iter(call.inputs))
    found: list[Any] = []
    for position, name in _PRODUCTS.get(call.name, ()):
        found.append(args[position] if position < len(args) else kwargs.get(name))
    if len(found) != 2 or not all(isinstance(value, Value) for value in found):
        return None
    return found[0], found[1]


def _factor(reading: Reading, call: Call, value: Value, *, right: bool) -> Reader | None:
    """Return how a function reads one factor, ``None`` where a rule disables it."""
    block = call.parent.name if call.parent is not None else ""
    if not _is_weight(reading, call, value):
        path = quantizer_path(call, value)
        spec = reading.spec(path, "activation")
        rule = "F1" if call.kind in ("Gemm", "Conv", "ConvTranspose") else "F13"
        reason = f"{rule}: input of {call.kind}"
        if spec is None:
            reading.skip(path, "disabled by a rule")
            return None
        pad = pad_before(call, value, reading.levels)
        if pad is not None:
            call, value = pad, pad.inputs[0]
        return Reader(block, path, (call,), (value,), spec, reason, alone=rule == "F13")
    inside = value.name.startswith(f"{block}." if block else "")
    path = quantizer_of(value.name) if value.name and inside else quantizer_path(call, value)
    spec = reading.spec(path, "weight")
    if spec is None:
        reading.skip(path, "disabled by a rule")
        return None
    if spec.axis is not None and not reading.config.names_axis(path):
        spec = spec.replace(axis=_output_axis(reading, call, value, right=right))
    if any(r.quantizer == path and r.spec != spec for r in reading.readers):
        path = quantizer_path(call, value)  # the same weight is read along another axis
    reason = f"F2: weight of {call.kind}"
    return Reader(block, path, (call,), (value,), spec, reason, role="weight")


def _is_weight(reading: Reading, call: Call, value: Value) -> bool:
    """Tell whether a value is a weight: a parameter, or computed from nothing else.

    What a forward that branches computes may depend on sizes: a tensor like any other.
    """
    return value.constant and bool(value.name or not reading.levels.why_not(call.parent))


def _output_axis(reading: Reading, call: Call, value: Value, *, right: bool) -> int | None:
    """Return the axis of a constant factor that runs over the outputs."""
    if call.kind != "MatMul":
        return reading.backend.axis_of_weight[call.kind]
    rank = len(value.shape)
    if call.name == "einsum" or rank < 2:
        return None
    return rank - 1 if right else rank - 2


def _read(call: Call) -> list[Value]:
    """Return what a function multiplies, without masks."""
    return call.inputs[:2] if call.name == "einsum" else call.inputs[:3]


def _free_name(call: Call) -> str:
    """Return the path of a function, changed where its block has something of that name."""
    path = function_path(call)
    block = None if call.parent is None else call.parent.module
    while block is not None and hasattr(block, path.rpartition(".")[2]):
        path += "_function"
    return path


def _two_factors(call: Call) -> bool:
    args, _ = unflatten(call.template, iter(call.inputs))
    return len(call.inputs) == 2 and bool(args) and isinstance(args[0], str)


def _function(reading: Reading, call: Call) -> None:
    """F13: a module takes the place of the function, with a quantizer for each factor inside."""
    path = _free_name(call)
    reading.asked.add(path)
    if call.name == "einsum" and not _two_factors(call):
        reading.skip(path, "einsum without an equation of two factors")
        return
    if _cannot_reach(reading, call):
        return
    plans = []
    for group in FUNCTIONS[call.name].operands:
        paths = [join_path(path, name) for name in group]
        specs = [reading.spec(one, "activation") for one in paths]
        if None in specs:
            reading.skip(paths[0], "disabled by a rule")
            continue
        plans += [
            QuantizerPlan(one, (), "activation", spec, f"F13: factor inside {call.name}")
            for one, spec in zip(paths, specs, strict=True)
            if spec is not None
        ]
    if not plans:
        return
    reading.quantized.add(call)
    reading.owned[path] = plans
    reading.replaced.setdefault(path, []).append(call)
