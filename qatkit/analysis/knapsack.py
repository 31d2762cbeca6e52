"""Choose one option of each item: the least cost within a budget, with a certificate.

The multiple-choice knapsack problem: minimize ``sum_i cost[i][k_i]`` over ``k`` subject to
``sum_i load[i][k_i] <= budget``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_MOST_STATES = 200_000
_ROUNDING = 1e-9


class Option(NamedTuple):
    """One way to take an item: its load and its cost, and which it was of those given."""

    load: float
    cost: float
    position: int


@dataclass(frozen=True)
class Choice:
    """A solution.

    Attributes:
        indices: the option of each item.
        cost: sum of their costs.
        load: sum of their loads, within the budget.
        lower_bound: no choice within the budget costs less.
        optimal: whether ``cost`` is the least there is; the lower bound is then equal to it.
    """

    indices: tuple[int, ...]
    cost: float
    load: float
    lower_bound: float
    optimal: bool


def choose(
    options: Sequence[Sequence[tuple[float, float]]],
    budget: float,
    *,
    most_states: int = _MOST_STATES,
) -> Choice | None:
    """Return the best choice, ``None`` if there is none within the budget.

    First the greedy choice along the lower convex hulls, whose multiplier gives the bound by
    Lagrangian duality; it is the linear relaxation of the problem. Then dynamic programming over
    the choices that are not dominated and that the bound does not exclude, which is exact unless
    there are more than ``most_states`` of them; the greedy choice is the answer then.

    Args:
        options: pairs (load, cost) for each item.
        budget: the largest sum of loads.
        most_states: give up to be exact beyond so many.

    Source: Kellerer, Pferschy and Pisinger 2004, Knapsack Problems, chapter 11.

    >>> choose([[(2, 5.0), (4, 1.0)], [(2, 4.0), (4, 3.0)]], budget=6)
    Choice(indices=(1, 0), cost=5.0, load=6, lower_bound=5.0, optimal=True)
    """
    kept = [_undominated(each) for each in options]
    slack = _ROUNDING * max(1.0, abs(budget))
    if sum(each[0].load for each in kept) > budget + slack:
        return None
    greedy, multiplier = _greedy(kept, budget + slack)
    best = [kept[item][at] for item, at in enumerate(greedy)]
    bound = _dual(kept, budget, multiplier)
    found = _dynamic(kept, budget + slack, multiplier, sum(o.cost for o in best), most_states)
    if found is not None:
        best = [kept[item][at] for item, at in enumerate(found)] if found else best
        bound = sum(option.cost for option in best)
    cost, load = sum(option.cost for option in best), sum(option.load for option in best)
    indices = tuple(option.position for option in best)
    return Choice(indices, cost, load, min(bound, cost), found is not None)


def _undominated(options: Sequence[tuple[float, float]]) -> list[Option]:
    """Return the options by rising load, without those that cost no less than a lighter one."""
    found: list[Option] = []
    for load, cost, index in sorted(Option(*each, i) for i, each in enumerate(options)):
        if not found or cost < found[-1].cost:
            found.append(Option(load, cost, index))
    return found


def _hull(options: list[Option]) -> list[int]:
    """Return the positions of the lower convex hull: each step saves less per load."""
    hull: list[int] = []
    for at, option in enumerate(options):
        while len(hull) > 1 and _gain(options[hull[-2]], options[hull[-1]]) <= _gain(
            options[hull[-1]], option
        ):
            hull.pop()
        hull.append(at)
    return hull


def _gain(light: Option, heavy: Option) -> float:
    """Return how much cost each unit of load saves."""
    return (light.cost - heavy.cost) / (heavy.load - light.load)


def _greedy(kept: list[list[Option]], budget: float) -> tuple[list[int], float]:
    """Return a choice within the budget, and the multiplier of the linear relaxation.

    The steps along all hulls, the best first; where one does not fit, the item stays as it is and
    lighter steps of the others may still fit.
    """
    steps = []
    for item, options in enumerate(kept):
        hull = _hull(options)
        for light, heavy in pairwise(hull):
            steps.append((-_gain(options[light], options[heavy]), item, heavy))
    chosen = [0] * len(kept)
    left = budget - sum(options[0].load for options in kept)
    multiplier = 0.0
    stuck: set[int] = set()
    for negative, item, heavy in sorted(steps):
        load = kept[item][heavy].load - kept[item][chosen[item]].load
        if item in stuck or load > left:
            multiplier = multiplier if stuck else -negative
            stuck.add(item)
            continue
        chosen[item] = heavy
        left -= load
    return _improved(kept, chosen, left), multiplier


def _improved(kept: list[list[Option]], chosen: list[int], left: float) -> list[int]:
    """Spend what is left of the budget, on the option that saves most each time."""
    while True:
        moves = [
            (options[at].cost - options[chosen[item]].cost, item, at)
            for item, options in enumerate(kept)
            for at in range(chosen[item] + 1, len(options))
            if options[at].load - options[chosen[item]].load <= left
        ]
        if not moves:
            return chosen
        _, item, at = min(moves)
        left -= kept[item][at].load - kept[item][chosen[item]].load
        chosen[item] = at


def _dual(kept: list[list[Option]], budget: float, multiplier: float) -> float:
    """Return the value of the Lagrangian dual, which no choice within the budget undercuts."""
    least = sum(min(o.cost + multiplier * o.load for o in options) for options in kept)
    return least - multiplier * budget


def _dynamic(
    kept: list[list[Option]], budget: float, multiplier: float, best: float, most: int
) -> list[int] | None:
    """Return a choice that costs less than ``best``, empty if none does, ``None`` to give up.

    A state is a choice for the first items. It is dropped if another one is neither heavier nor
    dearer, if the rest does not fit any more, or if the dual bound of the rest says that it cannot
    get below ``best``.
    """
    # The items with many ways to go last: the states stay few for long.
    order = sorted(range(len(kept)), key=lambda item: len(kept[item]))
    lightest = _suffix_sums([kept[item][0].load for item in order])
    duals = _suffix_sums([min(o.cost + multiplier * o.load for o in kept[i]) for i in order])
    target = best - _ROUNDING * max(1.0, abs(best))
    loads, costs = np.zeros(1), np.zeros(1)
    trail: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
    for position, item in enumerate(order, start=1):
        options = kept[item]
        wide = np.add.outer(np.array([o.load for o in options]), loads).ravel()
        cost = np.add.outer(np.array([o.cost for o in options]), costs).ravel()
        reach = cost + duals[position] - multiplier * (budget - wide)
        alive = np.flatnonzero((wide + lightest[position] <= budget) & (reach < target))
        alive = alive[_front(wide[alive], cost[alive])]
        if alive.size > most:
            return None
        if not alive.size:
            return []
        trail.append((alive // loads.size, alive % loads.size))
        loads, costs = wide[alive], cost[alive]
    state = int(np.argmin(costs))
    chosen = [0] * len(kept)
    for item, (option, before) in zip(order[::-1], trail[::-1], strict=True):
        chosen[item] = int(option[state])
        state = int(before[state])
    return chosen


def _suffix_sums(values: list[float]) -> list[float]:
    """Return the sum from each position to the end, and 0 behind it."""
    sums = [0.0]
    for value in reversed(values):
        sums.append(sums[-1] + value)
    return sums[::-1]


def _front(loads: Floats, costs: Floats) -> npt.NDArray[np.int64]:
    """Return the positions that no other is below in both, by rising load."""
    order = np.lexsort((costs, loads))
    if not order.size:
        return order
    before = np.concatenate(([np.inf], np.minimum.accumulate(costs[order])[:-1]))
    return order[costs[order] < before]
