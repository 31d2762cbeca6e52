"""Histograms collected from tensors: streaming, growing, and the ranges out of them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatkit.errors import QatkitError
from qatkit.observers import CALIBRATORS
from qatkit.observers.calibrators import Collector, StreamingHistogram
from qatkit.observers.calibrators.growing import (
    MOST_BINS,
    GrowingHistogram,
    GrowingSignedHistogram,
)
from qatkit.observers.calibrators.streaming import BINS
from qatkit.spec import QuantSpec

NAN, INF = float("nan"), float("inf")
STREAMING = [n for n, each in CALIBRATORS.items() if not each.source.startswith("growing")]


def collected(method: str, *tensors: torch.Tensor, spec: QuantSpec | None = None) -> Collector:
    collector = Collector(method, spec or QuantSpec())
    for tensor in tensors:
        collector.add(tensor)
    return collector


def same(a: StreamingHistogram, b: StreamingHistogram) -> bool:
    states = [vars(each) | {"extremes": vars(each.extremes)} for each in (a, b)]
    counts = [state.pop("_counts") for state in states]
    return states[0] == states[1] and torch.equal(*counts)


def test_bins_are_exact() -> None:
    x = torch.randn(100_000) * 3
    histogram = StreamingHistogram()
    histogram.add(x)
    whole = histogram.signed(2 * BINS)
    wide, zero = x.double().numpy(), int(np.searchsorted(whole.edges, 0.0))
    assert np.array_equal(whole.counts[zero:], np.histogram(wide[wide >= 0], whole.edges[zero:])[0])
    mirrored = -whole.edges[: zero + 1][::-1]
    assert np.array_equal(whole.counts[:zero][::-1], np.histogram(-wide[wide < 0], mirrored)[0])
    top = histogram.width * BINS
    assert top / 2 <= x.abs().max() < top
    for bins in (BINS, 2048, 100):
        part = histogram.magnitude(bins)
        assert len(part.counts) <= bins
        assert np.array_equal(part.counts, np.histogram(x.double().abs().numpy(), part.edges)[0])


def test_rounded_bins_leave_out_zeros() -> None:
    x = torch.relu(torch.randn(50_000))
    histogram = StreamingHistogram(count_zeros=True)
    histogram.add(x)
    rounded = histogram.rounded(2048)
    nonzero = x[x > 0].double().numpy()
    assert rounded.counts.sum() == nonzero.size
    assert np.array_equal(rounded.counts, np.histogram(nonzero, rounded.edges)[0])
    assert rounded.edges[0] == -rounded.width / 2


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.lists(
            st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-4, 4, width=32), max_size=6
        ),
        min_size=1,
        max_size=6,
    )
)
def test_order_and_split_do_not_matter(batches: list[list[float]]) -> None:
    tensors = [torch.tensor(batch) for batch in batches]
    forward, backward, once = (StreamingHistogram(count_zeros=True) for _ in range(3))
    for tensor in tensors:
        forward.add(tensor)
    for tensor in reversed(tensors):
        backward.add(tensor)
    once.add(torch.cat(tensors))
    merged = StreamingHistogram(count_zeros=True)
    for tensor in tensors:
        other = StreamingHistogram(count_zeros=True)
        other.add(tensor)
        merged.merge(pickle.loads(pickle.dumps(other)))
    if once.total:
        assert same(forward, once)
        assert same(backward, once)
        assert same(merged, once)
    assert merged.total == sum(map(len, batches))


def test_counts_beyond_float32() -> None:
    histogram = StreamingHistogram()
    histogram.add(torch.ones(3))
    counts = histogram._counts
    assert counts is not None
    counts *= 2**40
    histogram.add(torch.ones(1))
    histogram.add(torch.full((1,), 8.0))
    assert histogram.total == 3 * 2**40 + 2
    assert counts.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_layouts(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, 7).to(dtype)
    plain, last = StreamingHistogram(), StreamingHistogram()
    plain.add(x.to(torch.float32))
    last.add(x.to(memory_format=torch.channels_last)[:, :, ::1])
    assert same(plain, last)


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-20, 1.0, 3e38])
def test_sizes_of_numbers(size: float) -> None:
    x = torch.linspace(-1, 1, 999) * size
    for method in CALIBRATORS:
        low, high = collected(method, x, x / 2).range()
        assert -x.abs().max() <= low <= high <= x.abs().max(), method
        if size >= 1e-20:
            assert max(-low, high) >= 0.5 * size, method


@pytest.mark.parametrize("method", CALIBRATORS)
def test_zeros_first(method: str) -> None:
    # The original divides by the width of the first histogram, 0: OverflowError.
    x = torch.randn(10_000)
    low, high = collected(method, torch.zeros(100), torch.zeros(1), x).range()
    assert -x.abs().max() <= low < -1
    assert 1 < high <= x.abs().max()


@pytest.mark.parametrize("method", CALIBRATORS)
def test_only_zeros_or_nothing(method: str) -> None:
    assert collected(method).range() == (0, 0)
    for x in (torch.zeros(5), torch.zeros(0), torch.tensor([NAN, INF])):
        assert collected(method, x, x).range() == (0, 0)


@pytest.mark.parametrize("method", CALIBRATORS)
def test_what_is_not_finite_does_not_count(method: str) -> None:
    x = torch.randn(1000)
    odd = torch.cat([x[:500], torch.tensor([NAN, INF, -INF]), x[500:]])
    assert collected(method, odd, torch.empty(0)).range() == collected(method, x).range()


@pytest.mark.parametrize("method", CALIBRATORS)
def test_a_tiny_first_batch(method: str) -> None:
    # Bins of constant width: the original makes 2 * 10^12 of them.
    x = torch.randn(10_000)
    tiny = collected(method, x[:100] * 1e-9, x)
    assert tiny.range()[1] == pytest.approx(collected(method, x).range()[1], rel=0.15)
    for each in vars(tiny._samples).values():
        if isinstance(each, np.ndarray | torch.Tensor):
            assert len(each) <= MOST_BINS + 2


@pytest.mark.parametrize("method", CALIBRATORS)
def test_computing_changes_nothing(method: str) -> None:
    x = torch.relu(torch.randn(5000))
    collector = collected(method, x)
    before = pickle.dumps(vars(collector._samples))
    first = collector.range()
    assert pickle.dumps(vars(collector._samples)) == before
    assert collector.range() == first
    collector.add(2 * x)
    assert collector.range() == collected(method, x, 2 * x).range()


@pytest.mark.parametrize("method", STREAMING)
def test_merge(method: str) -> None:
    x = torch.randn(4, 1000) * torch.tensor([[1.0], [5.0], [0.1], [0.0]])
    parts = [collected(method, part) for part in x]
    for part in parts[1:]:
        parts[0].merge(part)
    assert parts[0].range() == collected(method, *x).range()
    assert parts[0].batches == 4


@pytest.mark.parametrize("method", ["entropy-exact", "two-pointer-exact"])
def test_exact_methods_do_not_merge(method: str) -> None:
    a, b = collected(method, torch.ones(2)), collected(method, torch.ones(2))
    with pytest.raises(QatkitError, match=f"take '{method.removesuffix('-exact')}'"):
        a.merge(b)


def test_the_growing_histogram_is_the_original_one(shared_dir: Path) -> None:
    vectors = json.loads((shared_dir / "vectors" / "calib_vectors.json").read_text())["vectors"]
    for vector in vectors:
        rs = np.random.RandomState(vector["generator"]["seed"])
        x = np.asarray(eval(vector["generator"]["expr"], {"np": np, "rs": rs})).astype(np.float32)
        collector = Collector("entropy-exact", QuantSpec(signed=not vector["unsigned"]))
        for part in np.split(x, vector["batches"]):
            collector.add(torch.from_numpy(part))
        wanted = vector["torch_hist"]
        histogram = collector._histogram(unsigned=False)
        assert histogram.counts.sum() == vector["size"]
        assert len(histogram.counts) == wanted["n_bins"]
        assert histogram.edges[-1] == pytest.approx(wanted["last_edge"], rel=1e-6)
        # The last bits of the division by the width differ between machines.
        moved = np.abs(histogram.counts - np.array(wanted["hist"])).sum()
        assert moved <= 0.001 * vector["size"]
        if moved == 0:
            threshold = min(wanted["amax"]["entropy"], vector["absmax"])
            assert collector.range()[1] <= threshold * (1 + 1e-6)


def test_growing_keeps_every_sample_and_the_width() -> None:
    histogram = GrowingHistogram(8)
    for batch in ([1.0, -8.0], [8.5, 0.0], [3.0], [20.0]):
        histogram.add(torch.tensor(batch))
    result = histogram.histogram()
    assert result.width == 1
    assert result.counts.sum() == 7 - 1
    assert len(result.counts) == 20


def test_growing_on_both_sides() -> None:
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    parts = [x, 2 * x, 5 * x]
    histogram = GrowingSignedHistogram()
    for part in parts:
        histogram.add(part)
    result = histogram.histogram()
    counts, _ = np.histogram(torch.cat(parts).double().numpy(), result.edges)
    assert result.counts.sum() == 9000
    assert np.abs(counts - result.counts).sum() <= 4  # float32 against float64 at the edges
    first, edges = np.histogram(x.numpy(), 100)
    alone = GrowingSignedHistogram()
    alone.add(x)
    assert np.array_equal(alone.histogram().counts, first)
    assert np.array_equal(alone.histogram().edges, edges)


def test_the_range_follows_the_grid() -> None:
    x = torch.cat([torch.randn(10_000).abs() * 4, -torch.rand(100)])
    symmetric = collected("percentile", x).range()
    assert symmetric[0] == x.min()
    one_sided = QuantSpec(signed=False)
    minus = torch.cat([torch.full((5000,), -50.0), torch.rand(5000)])
    assert collected("entropy", minus, spec=one_sided).range()[1] <= 1
    assert collected("entropy", minus).range()[0] < -49
    above = torch.rand(1000) + 5
    affine = QuantSpec(signed=False, symmetric=False)
    low, high = collected("mse", above, spec=affine).range()
    assert 5 <= low < high <= 6


@pytest.mark.parametrize("bits", [3, 8])
def test_unsigned_codes_are_twice_as_many(bits: int) -> None:
    x = torch.relu(torch.randn(100_000))
    signed = collected("octav", x, spec=QuantSpec(num_bits=bits)).range()
    unsigned = collected("octav", x, spec=QuantSpec(num_bits=bits, signed=False)).range()
    wider = collected("octav", x, spec=QuantSpec(num_bits=bits + 1)).range()
    assert unsigned == wider
    assert signed[1] < unsigned[1]


def test_sigma_takes_the_deviations_of_the_spec() -> None:
    x = torch.randn(100_000)
    wide = collected("sigma", x, spec=QuantSpec(sigma=2.0)).range()[1]
    assert wide == pytest.approx(2.0, rel=0.02)
