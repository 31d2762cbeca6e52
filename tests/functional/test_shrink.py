from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qatkit import kernels
from qatkit.errors import QatkitError
from qatkit.functional import count_nonfinite, shrink_range
from qatkit.kernels import portable
from qatkit.kernels.layout import dense_order


def oracle(x: Tensor, percentile: float) -> tuple[float, float]:
    """The definition, bin by bin, in float32 as TI maps values to bins, with exact counts."""
    values = x.float().flatten().numpy()
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return 0.0, 0.0
    low, high = values.min(), values.max()
    droppable = math.floor(Fraction(str(percentile)) * len(values) / 100)
    if low == high:
        return float(low), float(high)
    factor = np.float32(1) / (high - low) * np.float32(255)
    bins = np.rint((values - low) * factor).astype(int)
    counts = np.bincount(bins, minlength=256)
    first = max(int((counts.cumsum() <= droppable).sum()) - 1, 0)
    last = 255 - max(int((counts[::-1].cumsum() <= droppable).sum()) - 1, 0)
    back = np.float32(1) / factor
    start = max(low, np.float32(first) * back + low) if first else low
    stop = min(high, np.float32(last) * back + low) if last < 255 else high
    return float(start), float(stop)


def pair(ends: tuple[Tensor, Tensor]) -> tuple[float, float]:
    assert all(end.dtype == torch.float32 and end.shape == () for end in ends)
    return float(ends[0]), float(ends[1])


def portable_range(x: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    with mock.patch.object(kernels, "is_eager_cpu", return_value=False):
        return shrink_range(x, percentile)


SAMPLES = {
    "randn": lambda n: torch.randn(n),
    "relu": lambda n: torch.randn(n).relu(),
    "far": lambda n: torch.rand(n) + 100,
    "heavy": lambda n: torch.randn(n) ** 5,
    "coarse": lambda n: torch.randint(-4, 5, (n,)).float(),
    "outlier": lambda n: torch.cat([torch.rand(n - 1), torch.tensor([1e6])]),
    "spiky": lambda n: torch.where(torch.rand(n) < 0.001, 50.0, torch.randn(n)),
}


@pytest.mark.parametrize("find", [shrink_range, portable_range])
@pytest.mark.parametrize("percentile", [0.0, 0.01, 0.1, 0.5, 1, 5.0, 25, 49.9])
@pytest.mark.parametrize("count", [2, 7, 100, 1000, 20_011])
@pytest.mark.parametrize("sample", SAMPLES)
def test_agrees_with_the_definition(sample, count, percentile, find):
    x = SAMPLES[sample](count)
    assert pair(find(x, percentile)) == oracle(x, percentile)


@pytest.mark.parametrize("percentile", [0.01, 0.07, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_in_float32(dtype, percentile):
    x = torch.randn(30_000).to(dtype)
    assert pair(shrink_range(x, percentile)) == oracle(x, percentile)


def test_counts_exactly():
    x = torch.cat([torch.zeros(9971), torch.full((29,), 1.0)])
    assert pair(shrink_range(x, 0.29)) == (0.0, pytest.approx(1 / 255))
    assert pair(shrink_range(x, 0.28)) == (0.0, 1.0)


@pytest.mark.parametrize("percentile", [0.0, 0.05, 3.0])
def test_compiles_whole(percentile):
    x = torch.randn(2, 8, 40, 40).to(memory_format=torch.channels_last)
    compiled = torch.compile(shrink_range, fullgraph=True, backend="aot_eager")
    assert pair(compiled(x, percentile)) == oracle(x, percentile)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.permute(3, 1, 0, 2),
        lambda x: x[:, ::2, 1:, :],
        lambda x: x[:1].expand(4, -1, -1, -1),
        lambda x: x.flip(0),
    ],
)
def test_any_memory_layout(layout):
    x = layout(torch.randn(8, 8, 16, 16))
    assert pair(shrink_range(x, 0.1)) == oracle(x, 0.1)


def test_dense_tensors_are_not_copied():
    x = torch.randn(2, 3, 4, 5)
    for dense in (x, x.permute(2, 0, 3, 1), x.to(memory_format=torch.channels_last), x[1:]):
        assert dense_order(dense).data_ptr() == dense.data_ptr()


@pytest.mark.parametrize("find", [shrink_range, portable_range])
@pytest.mark.parametrize("percentile", [0.0, 0.1, 5.0])
@pytest.mark.parametrize("count", [300, 30_000])
def test_ignores_what_is_not_finite(count, percentile, find):
    x = torch.randn(count)
    x[:: count // 7] = torch.nan
    x[1 :: count // 5] = torch.inf
    x[2 :: count // 5] = -torch.inf
    assert pair(find(x, percentile)) == oracle(x, percentile)
    assert count_nonfinite(x) == (~x.isfinite()).sum()


BIG = 3.4e38
AWKWARD = {
    "empty": [],
    "single": [2.5],
    "zero": [0.0] * 300,
    "constant": [3.25] * 300,
    "all nan": [math.nan] * 3,
    "all inf": [math.inf, -math.inf] * 200,
    "nan and one": [math.nan, 1.0],
    "span overflows": [BIG, -BIG, *torch.linspace(-1e38, 1e38, 300).tolist()],
    "huge constant": [BIG] * 5,
    "denormal": [i * 1e-44 for i in range(300)],
    "denormal around one": [1e-45, -1e-45, 1.0],
    "neighbours": [1.0, 1.0 + 2**-23] * 200,
    "tiny": [i * 1e-38 for i in range(300)],
    "span below 2^-126": [2.0**-126, 2.0**-126 + 2.0**-149],
}


@pytest.mark.parametrize("find", [shrink_range, portable_range])
@pytest.mark.parametrize("percentile", [0.0, 0.01, 1.0, 20.0, 49.99])
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_data_gives_a_finite_range_inside_it(name, percentile, find):
    x = torch.tensor(AWKWARD[name], dtype=torch.float32)
    low, high = pair(find(x, percentile))
    kept = x[x.isfinite()]
    assert math.isfinite(low)
    assert math.isfinite(high)
    assert low <= high
    if len(kept):
        assert kept.min() <= low
        assert high <= kept.max()
    else:
        assert low == high == 0.0


@pytest.mark.parametrize("name", ["span overflows", "denormal"])
def test_scaling_by_a_power_of_two_scales_the_range(name):
    x = torch.tensor(AWKWARD[name])
    unit = 2.0**-20 if name == "span overflows" else 2.0**120
    low, high = pair(shrink_range(x, 2.0))
    want = shrink_range(x * unit, 2.0)
    assert (low * unit, high * unit) == pytest.approx(pair(want), rel=1e-6, abs=2.0**-148 * unit)


@pytest.mark.parametrize("percentile", [0.0, 0.01, 0.5, 10])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((3, 5, 40), 0), ((3, 5, 40), 1), ((3, 5, 40), -1), ((2, 3, 9000), 0), ((2, 3, 9000), 1)],
)
def test_per_channel_is_per_tensor_of_each_channel(shape, axis, percentile):
    x = torch.randn(shape)
    x.select(axis, 0)[0, 0] = torch.nan
    x.select(axis, -1).fill_(torch.inf)
    low, high = shrink_range(x, percentile, axis=axis)
    assert low.shape == high.shape == (x.shape[axis],)
    for index, channel in enumerate(x.unbind(axis)):
        assert (low[index], high[index]) == pair(shrink_range(channel, percentile))


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=300),
    st.floats(0, 49.9),
    st.floats(0, 49.9),
)
def test_properties(values, one, other):
    x = torch.tensor(values)
    low, high = pair(shrink_range(x, one))
    assert x.min() <= low <= high <= x.max()
    droppable = math.floor(Fraction(str(one)) * len(values) / 100)
    width = (float(x.max()) - float(x.min())) / 255
    assert int((x < low - width).sum()) <= droppable
    assert int((x > high + width).sum()) <= droppable
    wide, narrow = sorted([one, other])
    outer, inner = pair(shrink_range(x, wide)), pair(shrink_range(x, narrow))
    assert outer[0] <= inner[0]
    assert inner[1] <= outer[1]
    if width > 1e-35:  # a result below the normal numbers is rounded
        assert pair(shrink_range(x * 8, one)) == (low * 8, high * 8)


def test_subsampling_keeps_the_extremes():
    x = torch.randn(2, 3, 16, 16)
    x[0, 0, 0, 0], x[0, 0, 1, 1] = 9.0, -9.0
    low, high = shrink_range(x, 0.01, phase=(0, 1))
    assert (float(low), float(high)) == (-9.0, 9.0)
    small = x[:, :, :4, :4]
    assert pair(shrink_range(small, 1.0, phase=(0, 1))) == pair(shrink_range(small, 1.0))


@pytest.mark.parametrize("percentile", [-1.0, 50, 50.0, 100.0, math.nan, True, "1", None])
def test_illegal_percentile(percentile):
    with pytest.raises(QatkitError, match="0 <= percentile < 50"):
        shrink_range(torch.randn(10), percentile)


def test_illegal_arguments():
    with pytest.raises(QatkitError, match="axis=3"):
        shrink_range(torch.randn(10), 1.0, axis=3)
    with pytest.raises(QatkitError, match="int64"):
        shrink_range(torch.arange(10), 1.0)
    with pytest.raises(QatkitError, match="per-tensor"):
        shrink_range(torch.randn(10), 1.0, axis=0, exact_ti=True)


def vector_tensor(vector: dict) -> Tensor:
    if "generator" in vector:
        names = {"rs": np.random.RandomState(vector["generator"]["seed"]), "np": np}
        array = eval(vector["generator"]["expr"], names)
    else:
        array = np.array([float(value) for value in vector["data"]])
    return torch.tensor(np.reshape(array, vector["shape"])).to(getattr(torch, vector["dtype"]))


def test_vectors(shared_dir: Path):
    vectors = json.loads((shared_dir / "vectors/extrema_vectors.json").read_text())["vectors"]
    checked = 0
    for vector in vectors:
        x = vector_tensor(vector)
        phase = tuple(vector["phase"]) if vector["fast_mode"] else None
        for case in vector["expected"]:
            percentile, where = case["percentile"], (vector["name"], case["percentile"])
            exact = pair(shrink_range(x, percentile, exact_ti=True, phase=phase))
            if "raises" in case or case["mn_hex"] == "nan":
                assert exact == oracle(x, percentile), where
            else:
                want = float.fromhex(case["mn_hex"]), float.fromhex(case["mx_hex"])
                assert exact == want, where
            if 0 <= percentile < 50 and phase is None:
                assert pair(shrink_range(x, percentile)) == oracle(x, percentile), where
            checked += 1
    assert checked > 100


def test_published_example(shared_dir: Path):
    vectors = json.loads((shared_dir / "vectors/extrema_vectors.json").read_text())["vectors"]
    x = vector_tensor(vectors[0])
    assert pair(shrink_range(x, 1.0)) == pytest.approx((-1.79403, 2.55650), abs=5e-6)


def test_bins_of_ordinary_data_are_those_of_ti():
    x = torch.randn(1000)
    edges = portable.bins(x.amin(), x.amax())
    factor = (1 / (x.amax() - x.amin())) * 255
    assert torch.equal(edges.of(x), ((x - x.amin()) * factor).round())
