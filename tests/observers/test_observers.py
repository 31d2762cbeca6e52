from __future__ import annotations

import math

import pytest
import torch

from qatkit.functional import shrink_range
from qatkit.observers import OBSERVERS, is_empty
from qatkit.spec import OBSERVER_NAMES, QuantSpec

T = torch.tensor


def spec_of(name: str, **fields) -> QuantSpec:
    fixed = (-1.5, 2.5) if name == "fixed" else None
    return QuantSpec(observer=name, fixed_range=fixed, **fields)


def estimate(name: str, x, **fields):
    return OBSERVERS[name].estimate(x, spec_of(name, **fields))


def feed(name: str, ranges, **fields):
    old = T(0.0), T(0.0)
    history = []
    for count, (low, high) in enumerate(ranges):
        old = OBSERVERS[name].remember(*old, T(count), T(low), T(high), spec_of(name, **fields))
        history.append((old[0].item(), old[1].item()))
    return history


def test_registry():
    assert tuple(OBSERVERS) == OBSERVER_NAMES
    assert all(name == observer.name for name, observer in OBSERVERS.items())


def test_estimates():
    x = torch.randn(4, 3, 50, 50)
    flat, channels = x.flatten(), x.movedim(1, 0).flatten(1)
    want = {
        "shrink": shrink_range(x, 0.5),
        "sigma": (flat.mean() - 2 * flat.std(), flat.mean() + 2 * flat.std()),
        "channel-mean": (channels.amin(1).mean(), channels.amax(1).mean()),
        "fixed": (T(-1.5), T(2.5)),
    }
    reach = 2 * flat.abs().mean() * math.sqrt(3)
    want["lsq"], want["tqt"] = (-reach, reach), want["sigma"]
    for name in OBSERVERS:
        low, high = estimate(name, x, percentile=0.5, sigma=2.0, num_bits=3)
        torch.testing.assert_close((low, high), want.get(name, (x.min(), x.max())))


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_per_channel_is_per_tensor_of_each_channel(name, axis, dtype):
    x = torch.randn(3, 4, 500).to(dtype)
    low, high = estimate(name, x, axis=axis, percentile=1.0)
    one = "minmax" if name == "channel-mean" else name
    for index, channel in enumerate(x.unbind(axis)):
        want = estimate(one, channel, percentile=1.0)
        torch.testing.assert_close((low[index], high[index]), want)
        assert low.dtype == high.dtype == torch.float32


AWKWARD = {
    "empty": torch.empty(0),
    "empty images": torch.empty(0, 3, 4, 4),
    "no channels": torch.empty(2, 0, 4, 4),
    "scalar": T(2.0),
    "single": T([2.0]),
    "zeros": torch.zeros(2, 3, 4),
    "nan": torch.full((2, 3), math.nan),
    "inf": T([[math.inf, -math.inf, math.nan, 1.0]]),
    "dead channel": T([[[math.nan] * 4, [1.0, 2.0, 3.0, 4.0]]]),
    "huge": T([[3.4e38, -3.4e38], [3.4e38, 3.4e38]]),
    "denormal": T([1e-45, 2e-45]),
    "half": torch.full((4, 4), 65504.0, dtype=torch.float16),
}


@pytest.mark.parametrize("data", AWKWARD)
@pytest.mark.parametrize("name", OBSERVERS)
def test_awkward_data_gives_a_finite_range_inside_it(name, data):
    x = AWKWARD[data]
    low, high = estimate(name, x)
    assert low.shape == high.shape == ()
    assert math.isfinite(low)
    assert math.isfinite(high)
    assert low <= high
    if name != "fixed":
        kept = x[x.isfinite()].float()
        assert not len(kept) or kept.min() <= low <= high <= kept.max()
        assert len(kept) or is_empty(low, high)


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("dirty", [False, True])
def test_compiles_whole_to_the_same(name, axis, dirty):
    x = torch.randn(2, 3, 40, 40)
    if dirty:
        x[0, 0, 0, :3] = T([math.nan, math.inf, -math.inf])
    spec = spec_of(name, axis=axis, percentile=0.05)

    def step(x, count):
        low, high = OBSERVERS[name].estimate(x, spec)
        return OBSERVERS[name].remember(low - 1, high + 1, count, low, high, spec)

    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, T(3))
    torch.testing.assert_close(got, step(x, T(3)))


RANGES = [(-1.0, 4.0), (-3.0, 2.0), (-2.0, 3.0), (-6.0, 11.0)]


@pytest.mark.parametrize("name", ["shrink", "sigma", "channel-mean", "average"])
def test_cumulative_average_counts_the_first_batch(name):
    highs = [high for _, high in feed(name, RANGES)]
    assert highs == pytest.approx([4, 3, 3, 5])


def test_cumulative_average_ends_as_a_moving_one():
    assert [h for _, h in feed("shrink", RANGES, momentum=0.5)] == pytest.approx([4, 3, 3, 7])
    many = feed("shrink", [(0.0, 0.5)] + [(0.0, 1.5)] * 1500)
    average = feed("average", [(0.0, 0.5)] + [(0.0, 1.5)] * 1500)
    assert many[999][1] == average[999][1]
    assert many[-1][1] > average[-1][1]


def test_other_memories():
    assert [h for _, h in feed("ema", RANGES)] == pytest.approx([4, 3.8, 3.72, 4.448])
    assert [h for _, h in feed("ema", RANGES, momentum=0.5)] == pytest.approx([4, 3, 3, 7])
    assert feed("minmax", RANGES) == [(-1, 4), (-3, 4), (-3, 4), (-6, 11)]
    assert feed("fixed", RANGES) == [(-1.5, 2.5)] * 4


@pytest.mark.parametrize("name", [name for name in OBSERVERS if name != "fixed"])
def test_a_batch_without_data_is_skipped(name):
    with_gaps = feed(name, [(0.0, 0.0), RANGES[0], (0.0, 0.0)])
    assert with_gaps == [(0, 0), RANGES[0], RANGES[0]]


@pytest.mark.parametrize("name", OBSERVERS)
def test_memory_per_channel_and_extreme_ranges(name):
    old = T([0.0, -3e38]), T([0.0, 3e38])
    new = T([-1.0, 3e38]), T([1.0, 3e38])
    spec = spec_of(name)
    low, high = OBSERVERS[name].remember(*old, T(5.0), *new, spec)
    assert torch.isfinite(low).all()
    assert torch.isfinite(high).all()
    if name != "fixed":
        assert (low[0], high[0]) == (-1.0, 1.0)
