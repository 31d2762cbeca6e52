"""`allocate_bits`: the width of each layer that loses least within a budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from qatkit.analysis.bit_sensitivity import BitSensitivity, LayerBits
from qatkit.analysis.knapsack import choose
from qatkit.analysis.parts import literal
from qatkit.config import QuantConfig, Rule, matches
from qatkit.errors import QatkitError, QatkitTypeError
from qatkit.graph.plan import table
from qatkit.spec import suggest

LatencyTable = Mapping[str, Mapping[int, float]]
Limits = Mapping[str, tuple[int, int]]

_VERB = "allocate_bits"


@dataclass(frozen=True)
class LayerAllocation:
    """The width of one layer.

    Attributes:
        name: path of the layer.
        bits: its width.
        cost: what the model loses by it.
        load: what it takes of the budget.
        weights: how many weights it has.
        rules: what gives it this width.
    """

    name: str
    bits: int
    cost: float
    load: float
    weights: int
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class BitAllocation:
    """The width of each layer, and how good the choice is; print it.

    Attributes:
        unit: of the budget: ``"model bits"``, ``"BOPs"`` or ``"ms"``.
        budget: the largest sum of loads that was allowed.
        load: the sum of loads.
        cost: the sum of costs.
        lower_bound: no allocation within the budget costs less: the certificate. It is the value of
            the Lagrangian dual, or ``cost`` itself where that is the proven optimum.
        optimal: whether no allocation within the budget costs less than this one.
        layers: one entry for each layer.
    """

    unit: str
    budget: float
    load: float
    cost: float
    lower_bound: float
    optimal: bool
    layers: tuple[LayerAllocation, ...]

    @property
    def bits(self) -> dict[str, int]:
        """The width of each layer by its path."""
        return {layer.name: layer.bits for layer in self.layers}

    @property
    def gap(self) -> float:
        """How much the cost may be above the least possible at most; 0 for the optimum."""
        return self.cost - self.lower_bound

    @property
    def average_bits(self) -> float:
        """The mean width of a weight."""
        weights = sum(layer.weights for layer in self.layers)
        return sum(layer.bits * layer.weights for layer in self.layers) / weights

    @property
    def rules(self) -> tuple[Rule, ...]:
        """What gives each layer its width, for the config of a fresh float model."""
        return tuple(rule for layer in self.layers for rule in layer.rules)

    def config(self, base: QuantConfig | str | None = None) -> QuantConfig:
        """Return a config with these widths; what else it says is that of ``base``."""
        chosen = QuantConfig.of(base)
        return dataclasses.replace(chosen, rules=(*chosen.rules, *self.rules))

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the rules as plain values."""
        fields = asdict(self)
        for layer in fields["layers"]:
            del layer["rules"]
        return {**fields, "gap": self.gap, "average_bits": self.average_bits}

    def __str__(self) -> str:
        """Return the totals, and a table with a line for each layer."""
        proof = "optimal" if self.optimal else f"at most {self.gap:.4g} above the least cost"
        head = (
            f"{len(self.layers)} layers, {self.average_bits:.4g} bits on average, "
            f"{self.load:.6g} of {self.budget:.6g} {self.unit}, cost {self.cost:.4g}, {proof}"
        )
        rows = [("layer", "bits", "weights", "cost", self.unit)]
        rows += [
            (each.name, str(each.bits), str(each.weights), f"{each.cost:.4g}", f"{each.load:.4g}")
            for each in self.layers
        ]
        return "\n".join([head, "", *table(rows)])


class _Budget(NamedTuple):
    name: str
    given: float
    unit: str
    total: float
    latencies: LatencyTable


def allocate_bits(
    sensitivity: BitSensitivity,
    *,
    average_bits: float | None = None,
    model_bits: float | None = None,
    bops: float | None = None,
    latency: float | None = None,
    latency_table: LatencyTable | None = None,
    min_bits: int = 2,
    max_bits: int = 16,
    limits: Limits | None = None,
) -> BitAllocation:
    """Choose the width of each layer so that the summed losses are least within one budget.

    It is the exact optimum, by dynamic programming, or for very large problems a greedy choice
    with a bound that says how far from the optimum it is at most.

    Args:
        sensitivity: what each layer loses at each width, see `bit_sensitivity`.
        average_bits: budget: bits of a weight on average over all weights (PocketFlow's equivalent
            bits).
        model_bits: budget: bits of all weights.
        bops: budget: bit operations for one sample, the sum of MACs * weight bits * input bits.
        latency: budget: sum of the latencies, in the unit of ``latency_table``.
        latency_table: for ``latency``: by path of the layer and width, for example
            ``{"conv1": {4: 0.1, 8: 0.2}}``. A width that is not there is no choice.
        min_bits: no layer gets less.
        max_bits: no layer gets more.
        limits: narrower limits (min, max) for some layers, by glob over their paths.

    Returns:
        a frozen `BitAllocation`: print it, or take ``config()``.

    Raises:
        QatkitError: not exactly one budget, one that even the least widths exceed, no width is left
            for a layer, a loss is not finite at all of them, or a name matches no layer.

    Source: Wu et al. 2018, PocketFlow (equivalent bits); Yao et al. 2021, HAWQ-V3
        (arXiv:2011.10680), its integer program.

    >>> from qatkit.analysis.parts import Part
    >>> costs = ((4, 3.0), (8, 1.0))
    >>> layers = [
    ...     LayerBits(Part(n, "layer", (n + ".w",), (n + ".w",)), size, 1.0, 8, costs)
    ...     for n, size in (("a", 10), ("b", 30))
    ... ]
    >>> found = allocate_bits(BitSensitivity("noise", False, tuple(layers)), average_bits=6)
    >>> found.bits, found.cost, found.average_bits
    ({'a': 8, 'b': 4}, 4.0, 5.0)
    """
    if not isinstance(sensitivity, BitSensitivity) or not sensitivity.layers:
        raise QatkitTypeError(
            f"{_VERB}: sensitivity is a {type(sensitivity).__name__}"
            " without layers; give what bit_sensitivity(model, data) returned"
        )
    given = {
        "average_bits": average_bits,
        "model_bits": model_bits,
        "bops": bops,
        "latency": latency,
    }
    budget = _budget(sensitivity, given, latency_table)
    widths = _widths(sensitivity, budget, (min_bits, max_bits), limits or {})
    options = [
        [(_load(layer, bits, sensitivity.activations, budget), costs[bits]) for bits in chosen]
        for layer, chosen in widths
        for costs in [dict(layer.costs)]
    ]
    found = choose(options, budget.total)
    if found is None:
        least = sum(min(load for load, _ in each) for each in options)
        scale = budget.given / budget.total if budget.total else 1.0
        raise QatkitError(
            f"{_VERB}({budget.name}={budget.given:g}): the least widths of all layers take "
            f"{least * scale:.6g}; give more, or lower min_bits and the limits"
        )
    layers = []
    for (layer, chosen), each, index in zip(widths, options, found.indices, strict=True):
        load, cost = each[index]
        rules = _rules(layer, chosen[index], sensitivity.activations)
        layers.append(LayerAllocation(layer.name, chosen[index], cost, load, layer.weights, rules))
    return BitAllocation(
        budget.unit,
        budget.total,
        found.load,
        found.cost,
        found.lower_bound,
        found.optimal,
        tuple(layers),
    )


def _budget(
    sensitivity: BitSensitivity,
    given: Mapping[str, float | None],
    latency_table: LatencyTable | None,
) -> _Budget:
    chosen = [(name, value) for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        names = ", ".join(name for name, _ in chosen) or "none"
        raise QatkitError(f"{_VERB}: {names} given; give one budget of {', '.join(given)}")
    name, value = chosen[0]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise QatkitError(f"{_VERB}({name}={value!r}): give a positive number")
    if (name == "latency") != (latency_table is not None):
        raise QatkitError(f"{_VERB}: latency and latency_table go together, give both or neither")
    if name == "latency" and latency_table is not None:
        _check_latencies(sensitivity, latency_table)
        return _Budget(name, value, "ms", float(value), latency_table)
    if name == "bops":
        return _Budget(name, value, "BOPs", float(value), {})
    weights = sum(layer.weights for layer in sensitivity.layers)
    total = value * weights if name == "average_bits" else value
    return _Budget(name, value, "model bits", float(total), {})


def _check_latencies(sensitivity: BitSensitivity, latencies: LatencyTable) -> None:
    names = tuple(layer.name for layer in sensitivity.layers)
    for name in latencies:
        if name not in names:
            raise QatkitError(f"{_VERB}(latency_table): no layer {name!r}, {suggest(name, names)}")
    for name in names:
        if name not in latencies:
            raise QatkitError(
                f"{_VERB}(latency_table): has no entry for the layer {name!r}; add one, "
                "of the form {bits: ms}"
            )
        for bits, value in latencies[name].items():
            if not (isinstance(value, int | float) and 0 <= value < math.inf):
                raise QatkitError(
                    f"{_VERB}(latency_table): {name!r} at {bits} bits is {value!r}; "
                    "give a number of milliseconds"
                )


def _widths(
    sensitivity: BitSensitivity, budget: _Budget, ends: tuple[int, int], limits: Limits
) -> list[tuple[LayerBits, list[int]]]:
    """Return the widths that each layer may have."""
    _check_limits(sensitivity, ends, limits)
    found = []
    for layer in sensitivity.layers:
        low, high = ends
        for pattern, (least, most) in limits.items():
            if matches(pattern, layer.name):
                low, high = max(low, least), min(high, most)
        known = [bits for bits, cost in layer.costs if math.isfinite(cost)]
        if budget.name == "latency":
            known = [bits for bits in known if bits in budget.latencies[layer.name]]
        chosen = [bits for bits in known if low <= bits <= high]
        if not chosen:
            raise QatkitError(
                f"{_VERB}: {layer.name!r} may have {low} to {high} bits, and was measured (with a "
                f"finite loss and a latency) at {known}; widen its limits or measure more widths"
            )
        found.append((layer, chosen))
    return found


def _check_limits(sensitivity: BitSensitivity, ends: tuple[int, int], limits: Limits) -> None:
    names = tuple(layer.name for layer in sensitivity.layers)
    for where, pair in {"min_bits, max_bits": ends, **limits}.items():
        whole = isinstance(pair, tuple | list) and len(pair) == 2
        if not whole or not all(isinstance(end, int) for end in pair) or pair[0] > pair[1]:
            raise QatkitError(f"{_VERB}: {where}={pair!r}: give two integers with min <= max")
    for pattern in limits:
        if not any(matches(pattern, name) for name in names):
            raise QatkitError(f"{_VERB}(limits): no layer {pattern!r}, {suggest(pattern, names)}")


def _load(layer: LayerBits, bits: int, activations: bool, budget: _Budget) -> float:
    """Return what a layer takes of the budget."""
    if budget.name == "latency":
        return float(budget.latencies[layer.name][bits])
    if budget.name == "bops":
        return layer.macs * bits * (bits if activations else layer.input_bits)
    return float(layer.weights * bits)


def _rules(layer: LayerBits, bits: int, activations: bool) -> tuple[Rule, ...]:
    patterns = layer.part.patterns if activations else map(literal, layer.part.weights)
    return tuple(Rule(pattern, num_bits=bits) for pattern in patterns)
