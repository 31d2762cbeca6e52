"""Which tensors cannot be negative, and with that which activations get codes from 0.

A tensor is known to be nonnegative if it comes from an operator without negative results (ReLU,
sigmoid, softmax ...), seen through operators that keep nonnegative numbers nonnegative: copies,
pools, sums and products of such tensors with each other and with numbers from 0 on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from qatkit.backend import Backend
from qatkit.graph.capture import Call, Capture, Value
from qatkit.graph.kinds import is_leaf, kind_of, module_name
from qatkit.graph.plan import QuantizerPlan
from qatkit.graph.structure import Template

_NONNEGATIVE = frozenset(
    {"relu", "relu6", "sigmoid", "hardsigmoid", "softmax", "softmax2d", "softmin", "softplus"}
    | {"exp", "exp2", "abs", "square"}
)
_CLAMPS = {"hardtanh": "min_val", "clamp": "min", "clip": "min", "clamp_min": "min"}
"""The name of the lower bound, which is the first number behind the tensor."""
_KEEPING_KINDS = frozenset(
    {"MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split"}
    | {"Gather", "Concat", "Expand", "Identity", "AveragePool", "ReduceMean"}
)
_KEEPING = frozenset({"sum", "amax", "amin", "max", "min", "minimum", "sqrt", "pow", "cumsum"})
_ARITHMETIC = frozenset({"add", "mul", "multiply", "truediv", "div", "divide", "true_divide"})
_NEGATIVE_IN_TRAINING = frozenset({"alpha_dropout", "feature_alpha_dropout"})
_WINDOWS = frozenset({"interpolate", "upsample", "pad", "zeropad1d", "zeropad2d", "zeropad3d"})


def nonnegative_values(capture: Capture) -> frozenset[Value]:
    """Return the values of a recorded run that are nonnegative for every input."""
    found: set[Value] = set()
    for call in capture.operators:
        if _makes_nonnegative(call) or _keeps_nonnegative(call, found):
            found.update(call.results)
    return frozenset(found)


def with_unsigned(
    quantizers: Iterable[QuantizerPlan],
    values: Mapping[str, tuple[Value, ...]],
    groups: Iterable[tuple[str, ...]],
    nonnegative: frozenset[Value],
    backend: Backend,
) -> tuple[QuantizerPlan, ...]:
    """Give the activations that cannot be negative codes from 0.

    Args:
        quantizers: the quantizers of a plan.
        values: what each activation quantizer reads, by path.
        groups: quantizers that share a scale; they get one grid, so all or none change.
        nonnegative: see `nonnegative_values`.
        backend: the engine, for the widths that it takes unsigned.
    """
    plans = {plan.path: plan for plan in quantizers}
    able = {
        path
        for path, plan in plans.items()
        if path in values
        and all(value in nonnegative for value in values[path])
        and plan.spec.symmetric
        and (backend.unsigned_int8 or plan.spec.num_bits < 8)
    }
    for group in groups:
        if not able.issuperset(group):
            able.difference_update(group)
    for path in able:
        spec = plans[path].spec.replace(signed=False, narrow_range=False)
        plans[path] = dataclasses.replace(plans[path], spec=spec)
    return tuple(plans.values())


def _name(call: Call) -> str:
    """Return the name of an operator; the empty one for a module that may do other things."""
    if call.module is None:
        return call.name
    return module_name(call.module) if is_leaf(call.module) else ""


def _makes_nonnegative(call: Call) -> bool:
    """Tell whether an operator has no negative result, whatever it reads."""
    name = _name(call)
    if name in _NONNEGATIVE:
        return True
    if name in _CLAMPS:
        bound = _lower_bound(call, _CLAMPS[name])
        return isinstance(bound, int | float) and bound >= 0
    return False


def _lower_bound(call: Call, keyword: str) -> Any:
    """Return the number below which a clamp lets nothing pass, ``None`` if it is not plain."""
    if call.module is not None:
        return getattr(call.module, keyword, None)
    _, (_, *args), (_, *kwargs) = call.template
    named = dict(kwargs).get(keyword)
    chosen = named if named is not None else args[1] if len(args) > 1 else None
    return chosen[1] if chosen is not None and chosen[0] == "const" else None


def _keeps_nonnegative(call: Call, known: set[Value]) -> bool:
    """Tell whether an operator makes only nonnegative numbers of the nonnegative that it reads."""
    name = _name(call)
    if name in _NEGATIVE_IN_TRAINING or not call.inputs:
        return False
    if name == "maximum":
        return any(value in known for value in call.inputs)
    if not all(value in known for value in call.inputs):
        return False
    numbers = list(_constants(call.template))
    if name in _ARITHMETIC:
        return all(isinstance(number, str | None) or number >= 0 for number in numbers)
    if name in _WINDOWS:
        mode = getattr(call.module, "mode", "")
        fill = getattr(call.module, "value", 0)
        return (
            fill >= 0 and "bicubic" not in (*numbers, mode) and not any(map(_is_negative, numbers))
        )
    return kind_of(name) in _KEEPING_KINDS or name in _KEEPING


def _is_negative(constant: Any) -> bool:
    return isinstance(constant, int | float) and constant < 0


def _constants(template: Template) -> Iterator[Any]:
    """Yield the numbers, strings and switches among the arguments of a call."""
    kind, *rest = template
    if kind == "const":
        yield rest[0]
    elif kind == "dict":
        for _, item in rest:
            yield from _constants(item)
    elif kind in ("tuple", "list"):
        for item in rest:
            yield from _constants(item)
