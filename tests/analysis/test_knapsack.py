"""The bit allocation solver against every possible choice."""

from __future__ import annotations

import itertools
import random

import pytest

from qatkit.analysis.knapsack import choose


def brute_force(options, budget):
    found = [
        sum(options[i][k][1] for i, k in enumerate(choice))
        for choice in itertools.product(*(range(len(each)) for each in options))
        if sum(options[i][k][0] for i, k in enumerate(choice)) <= budget + 1e-9
    ]
    return min(found, default=None)


def problem(seed: int, *, integers: bool):
    rng = random.Random(seed)
    options = []
    for _ in range(rng.randint(1, 6)):
        size = rng.randint(1, 1000)
        widths = sorted(rng.sample(range(2, 9), rng.randint(1, 4)))
        load = [w * size if integers else w * size * rng.random() for w in widths]
        cost = [rng.choice([rng.random() * 4.0**-w, rng.uniform(-1, 1), 1.0]) for w in widths]
        options.append(list(zip(load, cost, strict=True)))
    low = sum(min(load for load, _ in each) for each in options)
    high = sum(max(load for load, _ in each) for each in options)
    return options, low + (high - low) * rng.uniform(-0.1, 1.1)


@pytest.mark.parametrize("integers", [True, False])
def test_the_best_choice_of_all(integers: bool) -> None:
    feasible = 0
    for seed in range(300):
        options, budget = problem(seed, integers=integers)
        wanted, found = brute_force(options, budget), choose(options, budget)
        assert (found is None) == (wanted is None), seed
        if found is None:
            continue
        feasible += 1
        assert found.optimal
        assert found.cost == pytest.approx(wanted, abs=1e-8), seed
        assert found.load <= budget + 1e-6
        picked = [options[i][k] for i, k in enumerate(found.indices)]
        assert found.cost == pytest.approx(sum(cost for _, cost in picked))
        assert found.load == pytest.approx(sum(load for load, _ in picked))
    assert feasible > 100


def test_the_bound_holds_where_the_answer_is_greedy() -> None:
    gaps = 0
    for seed in range(300):
        options, budget = problem(seed, integers=True)
        wanted, found = brute_force(options, budget), choose(options, budget, most_states=0)
        if found is None:
            continue
        assert found.load <= budget + 1e-6
        assert found.lower_bound <= wanted + 1e-9 <= found.cost + 2e-9, seed
        gaps += found.lower_bound < found.cost - 1e-9
    assert gaps > 20


def test_a_large_problem_is_solved_exactly() -> None:
    rng = random.Random(0)
    options = [
        [(w * size, rng.random() * 4.0**-w * 100) for w in (2, 3, 4, 5, 6, 8)]
        for size in (rng.randint(100, 2_000_000) for _ in range(60))
    ]
    budget = sum(each[2][0] for each in options)
    exact, greedy = choose(options, budget), choose(options, budget, most_states=0)
    assert exact is not None
    assert greedy is not None
    assert exact.optimal
    assert not greedy.optimal
    assert greedy.lower_bound <= exact.cost <= greedy.cost
