"""Thresholds from histograms, against the vectors, the originals' own loops, and bad input."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatkit.errors import QatkitError
from qatkit.observers import CALIBRATORS, histogram_threshold
from qatkit.observers.calibrators.entropy import _direct_divergence, divergences
from qatkit.observers.calibrators.mse import squared_errors

CASES = ("randn_10k", "relu_50k", "outlier", "bimodal", "growing_3batches")
POINTERS = ("published", "published_limit0.9", "published_limit1.0", "published_bins256", "outlier")
ON_MAGNITUDES = [n for n, each in CALIBRATORS.items() if not each.source.endswith("signed")]


@pytest.fixture(scope="module")
def vectors(shared_dir: Path) -> dict[str, Any]:
    return json.loads((shared_dir / "vectors" / "calib_vectors.json").read_text())


def case(vectors: dict[str, Any], name: str, part: str = "vectors") -> dict[str, Any]:
    return next(each for each in vectors[part] if each["name"] == name)


def grid(hist: dict[str, Any]) -> tuple[list[int], np.ndarray]:
    return hist["hist"], np.linspace(hist["first_edge"], hist["last_edge"], hist["n_edges"])


def data(vector: dict[str, Any]) -> np.ndarray:
    generator = vector["generator"]
    np.random.seed(generator["seed"])
    names = {"np": np, "rs": np.random.RandomState(generator["seed"])}
    return np.asarray(eval(generator["expr"], names)).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", ["entropy-exact", "entropy", "mse"])
def test_vectors_of_pytorch_quantization(vectors: Any, name: str, method: str) -> None:
    vector = case(vectors, name)
    wanted = vector["torch_hist"]["amax"][method.removesuffix("-exact")]
    got = histogram_threshold(*grid(vector["torch_hist"]), method, unsigned=vector["unsigned"])
    assert got == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99, 99.999])
def test_vectors_of_percentiles(vectors: Any, name: str, percentile: float) -> None:
    vector = case(vectors, name)["torch_hist"]
    got = histogram_threshold(*grid(vector), "percentile", percentile=percentile)
    assert got == pytest.approx(vector["amax"][f"percentile_{percentile}"], rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_percentile_100_keeps_the_maximum(vectors: Any, name: str) -> None:
    vector = case(vectors, name)["torch_hist"]
    got = histogram_threshold(*grid(vector), "percentile", percentile=100)
    assert got == pytest.approx(vector["last_edge"])
    assert got >= vector["amax"]["percentile_100.0"]


@pytest.mark.parametrize("name", CASES[:4])
def test_vectors_of_numpy_histograms(vectors: Any, name: str) -> None:
    vector = case(vectors, name)
    counts, edges = np.histogram(np.abs(data(vector)), 2048)
    before = counts.copy()
    for key, wanted in vector["numpy_hist"]["amax"].items():
        if key in ("mse", "entropy"):
            method = {"entropy": "entropy-exact"}.get(key, key)
            got = histogram_threshold(counts, edges, method, unsigned=vector["unsigned"])
            assert got == pytest.approx(wanted, rel=1e-6)
        elif key.startswith("percentile") and key.count("_") == 1 and "100" not in key:
            p = float(key.split("_")[1])
            got = histogram_threshold(counts, edges, "percentile", percentile=p)
            # Also "after entropy", where the original has changed the histogram.
            assert got == pytest.approx(wanted, rel=1e-6)
    assert np.array_equal(counts, before)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", ["kld", "kld-document"])
def test_vectors_of_tpu_mlir(vectors: Any, name: str, method: str) -> None:
    vector = case(vectors, name)["tpu_mlir"]
    edges = np.arange(2049) * vector["width"]
    wanted = vector["code_threshold" if method == "kld" else "doc_threshold"]
    got = histogram_threshold(vector["hist"], edges, method)
    assert got == pytest.approx(wanted, rel=1e-6)
    # The same bins, with their true edges.
    got = histogram_threshold(vector["hist"], edges - vector["width"] / 2, method)
    assert got == pytest.approx(wanted, rel=1e-6)


def test_the_document_cannot_keep_a_bimodal_range(vectors: Any) -> None:
    vector = case(vectors, "bimodal")["tpu_mlir"]
    edges = np.arange(2049) * vector["width"]
    assert histogram_threshold(vector["hist"], edges, "kld") > 10
    assert histogram_threshold(vector["hist"], edges, "kld-document") < 3


@pytest.mark.parametrize("name", POINTERS)
def test_vectors_of_two_pointers(vectors: Any, name: str) -> None:
    vector = case(vectors, name, "two_pointer")
    x, limit = data(vector), vector["limit"]
    counts, edges = np.histogram(x, vector["bins"])
    got = histogram_threshold(counts, edges, "two-pointer-exact", coverage=limit)
    assert got == pytest.approx(vector["amax"], rel=1e-6)
    assert got / 127 == pytest.approx(vector["scale"], rel=1e-6)
    ours = histogram_threshold(counts, edges, "two-pointer", coverage=limit)
    assert (np.abs(x) <= ours).mean() >= limit
    if limit == 1:
        assert ours == np.float32(np.abs(x).max())


def test_two_pointers_of_a_constant(vectors: Any) -> None:
    vector = case(vectors, "constant", "two_pointer")
    counts, edges = np.histogram(np.array(vector["data"], np.float32), 100)
    assert histogram_threshold(counts, edges, "two-pointer-exact") == vector["amax"]
    assert histogram_threshold(counts, edges, "two-pointer") >= 3.0


def test_the_published_example(vectors: Any) -> None:
    published = vectors["published_print"]
    args = published["hist"], published["bins"], "two-pointer-exact"
    assert histogram_threshold(*args) / 127 == pytest.approx(0.0223889, rel=1e-5)


def test_relu_and_sparse_data_do_not_collapse(vectors: Any) -> None:
    vector = case(vectors, "relu_50k")
    plain = vector["s7310"]["threshold"]
    counts, edges = grid(vector["torch_hist"])
    got = {name: histogram_threshold(counts, edges, name, unsigned=True) for name in CALIBRATORS}
    for name in ("entropy", "mse", "aciq", "octav", "percentile"):
        assert got[name] > 1.5 * plain, name
    sparse = np.array(counts)
    sparse[0] += 10_000_000
    for name in ("entropy", "mse", "aciq", "octav"):
        assert histogram_threshold(sparse, edges, name, unsigned=True) == got[name], name


def test_a_coarse_grid_of_values_does_not_collapse() -> None:
    # Already quantized data: full bins far apart. The original sees no divergence when only one
    # of them is left below the cut.
    counts = np.zeros(2048, np.int64)
    counts[::200] = [10**6, 900, 800, 700, 600, 500, 400, 300, 200, 100, 50]
    counts[401::200] = counts[400::200] // 3
    edges = np.arange(2049.0)
    assert histogram_threshold(counts, edges, "entropy-exact") < 300
    assert histogram_threshold(counts, edges, "entropy") > 1500


def original_entropy(bins: np.ndarray, edges: np.ndarray, num_bits: int, unsigned: bool) -> float:
    """Do what the loops of pytorch-quantization do, one cut after the other."""
    entropy = pytest.importorskip("scipy.stats").entropy
    bins = bins.copy()
    bins[0] = bins[1]
    groups, values = 1 << (num_bits - 1 + int(unsigned)), []
    for i in range(128, len(bins) + 1):
        place = np.digitize(range(i), np.linspace(0, i, num=groups + 1)) - 1
        place[bins[:i] == 0] = -1
        density = np.zeros(i)
        for group in set(place.tolist()) - {-1}:
            density[place == group] = bins[:i][place == group].mean()
        reference = np.array(bins[:i])
        reference[-1] += bins[i:].sum()
        values.append(entropy(reference, density))
    return float(edges[len(values) - 1 - int(np.argmin(values[::-1])) + 128])


@pytest.mark.parametrize("seed", range(6))
def test_entropy_is_that_of_the_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(300 * np.exp(-np.arange(180 + 20 * seed) / (10 + 20 * seed)))
    counts[:3] += 1
    edges = np.linspace(0, 3, len(counts) + 1)
    bits, unsigned = 2 + seed, bool(seed % 2)
    wanted = original_entropy(counts, edges, bits, unsigned)
    got = histogram_threshold(counts, edges, "entropy-exact", num_bits=bits, unsigned=unsigned)
    assert got == wanted


def test_divergences_are_those_of_direct_sums(vectors: Any) -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(2.0, 400)
    cuts = np.arange(1, 401)
    for groups in (2, 16, 128, 1024):
        wanted = [_direct_divergence(counts, int(cut), groups) for cut in cuts if counts[cut - 1]]
        got = divergences(counts, cuts, groups)[counts > 0]
        assert np.allclose(got, wanted, rtol=1e-9, atol=1e-12)
    example = vectors["kl_example"]
    p = np.array([1, 5, 8, 8])
    assert divergences(p, np.array([4]), 1)[0] == pytest.approx(example["value"])


@pytest.mark.parametrize("steps", [1, 7, 127, 255, 32767])
def test_squared_errors_are_those_of_direct_sums(steps: int) -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 50, 300).astype(float)
    centers = np.arange(300) + 0.5
    candidates = centers[100:]
    got = squared_errors(counts, centers, candidates, steps)
    for value, amax in zip(got, candidates, strict=True):
        codes = np.rint(centers * steps / amax).clip(0, steps)
        wanted = (counts * (codes * amax / steps - centers) ** 2).sum()
        assert value == pytest.approx(wanted, rel=1e-7, abs=1e-3 * (steps == 32767))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_octav_and_aciq_are_near_the_optimum_of_their_model(bits: int) -> None:
    x = np.abs(np.random.default_rng(1).laplace(size=400_000))
    counts, edges = np.histogram(x, 4096, (0, x.max()))

    def error(amax: float) -> float:
        step = amax / (1 << (bits - 1))
        inside = x[x <= amax]
        return inside.size * step**2 / 12 + ((x[x > amax] - amax) ** 2).sum()

    best = min(error(amax) for amax in np.linspace(0.5, x.max(), 400))
    for method in ("octav", "aciq"):
        assert error(histogram_threshold(counts, edges, method, num_bits=bits)) <= 1.02 * best


def test_aciq_tells_gauss_from_laplace() -> None:
    rng = np.random.default_rng(0)
    for x, wanted in ((rng.normal(size=10**6), 2.55), (rng.laplace(size=10**6), 5.03)):
        counts, edges = np.histogram(np.abs(x), 2048, (0, np.abs(x).max()))
        got = histogram_threshold(counts, edges, "aciq", num_bits=4)
        assert got == pytest.approx(wanted, rel=0.01)


def test_sigma() -> None:
    x = np.random.default_rng(0).normal(1.0, 2.0, 10**6)
    assert histogram_threshold(*np.histogram(x, 2000), "sigma") == pytest.approx(7.0, rel=0.01)
    assert histogram_threshold([0, 5, 0], [0, 1, 2, 3], "sigma") == 1.5


@pytest.mark.parametrize("method", CALIBRATORS)
def test_arguments_are_not_written_to(method: str) -> None:
    counts, edges = np.arange(300, 0, -1), np.linspace(0, 1, 301)
    counts.flags.writeable = edges.flags.writeable = False
    first = histogram_threshold(counts, edges, method)
    tensors = torch.from_numpy(counts.copy()), torch.from_numpy(edges.copy())
    copies = [x.clone() for x in tensors]
    assert histogram_threshold(*tensors, method) == first
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))
    assert type(first) is float
    assert histogram_threshold(counts.tolist(), edges.tolist(), method) == first


@pytest.mark.parametrize("method", CALIBRATORS)
def test_nothing_and_zeros_have_no_threshold(method: str) -> None:
    assert histogram_threshold(np.zeros(200), np.arange(201), method) == 0.0
    assert histogram_threshold([1000] + [0] * 2047, np.zeros(2049), method) == 0.0


@pytest.mark.parametrize("method", CALIBRATORS)
@pytest.mark.parametrize("bins", [1, 2, 64, 127, 128, 129, 130])
@pytest.mark.parametrize("num_bits", [2, 8, 16])
def test_few_bins(method: str, bins: int, num_bits: int) -> None:
    # The original finds no minimum below 129 bins and raises.
    edges = np.linspace(0, 3.0, bins + 1)
    got = histogram_threshold(np.full(bins, 10**9), edges, method, num_bits=num_bits)
    if method == "two-pointer-exact":  # at the left edge of the right bin
        assert 0 <= got <= 3.0
    else:
        assert 0 < got <= 3.0 + 1e-9


@pytest.mark.parametrize("method", CALIBRATORS)
def test_all_samples_in_the_bin_of_zero(method: str) -> None:
    got = histogram_threshold([10**9] + [0] * 2047, np.arange(2049.0), method)
    assert 0 <= got <= 2048


def test_counts_beyond_float32() -> None:
    counts = np.full(2048, 2**24 + 1)
    counts[-1] = 2**40
    edges = np.arange(2049.0)
    half = histogram_threshold(counts, edges, "percentile", percentile=1.0)
    assert half == int(np.searchsorted(np.cumsum(counts / counts.sum()), 0.01))
    counts[:] = 2**50
    assert all(np.isfinite(histogram_threshold(counts, edges, name)) for name in CALIBRATORS)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=300).filter(any),
    st.sampled_from(sorted(CALIBRATORS)),
    st.integers(2, 9),
    st.booleans(),
)
def test_scale_equivariance(counts: list[int], method: str, bits: int, unsigned: bool) -> None:
    edges = np.arange(len(counts) + 1.0)
    one = histogram_threshold(counts, edges, method, num_bits=bits, unsigned=unsigned)
    four = histogram_threshold(counts, edges * 4, method, num_bits=bits, unsigned=unsigned)
    assert four == pytest.approx(4 * one, rel=1e-9)
    assert 0 <= one <= edges[-1] + 1e-9


def test_entropy_is_fast(vectors: Any) -> None:
    counts, edges = grid(case(vectors, "randn_10k")["torch_hist"])
    best = 1.0
    for _ in range(5):
        start = time.process_time()
        histogram_threshold(counts, edges, "entropy")
        best = min(best, time.process_time() - start)
    assert best <= 0.05


@pytest.mark.parametrize(
    ("method", "hint"), [("entropi", "did you mean 'entropy'"), ("histgoram", "choose one of max")]
)
def test_unknown_method(method: str, hint: str) -> None:
    with pytest.raises(QatkitError, match=hint):
        histogram_threshold([1], [0, 1], method)


@pytest.mark.parametrize("method", [None, 3, ["max"], ""])
def test_methods_that_are_no_names(method: Any) -> None:
    with pytest.raises(QatkitError, match="unknown method"):
        histogram_threshold([1], [0, 1], method)


BAD = {
    "lengths": ([1, 2], [0, 1], "2 counts and 2 bin_edges"),
    "empty": ([], [0], "0 counts"),
    "both empty": ([], [], "0 counts"),
    "negative": ([1, -1], [0, 1, 2], r"counts\[1\] is -1"),
    "fraction": ([1, 1.5], [0, 1, 2], r"counts\[1\] is 1.5"),
    "nan": ([1, float("nan")], [0, 1, 2], "finite numbers"),
    "inf edge": ([1], [0, float("inf")], "finite numbers"),
    "2-d": ([[1, 2]], [0, 1, 2], "1-d array"),
    "descending": ([1, 1], [0, 2, 1], r"bin_edges\[2\] is below"),
    "text": (["a"], [0, 1], "array of numbers"),
    "none": (None, [0, 1], "counts"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_histograms(name: str) -> None:
    counts, edges, message = BAD[name]
    with pytest.raises(QatkitError, match=message):
        histogram_threshold(counts, edges, "max")


@pytest.mark.parametrize("method", ON_MAGNITUDES)
def test_a_signed_histogram_is_refused(method: str) -> None:
    with pytest.raises(QatkitError, match=r"histogram of \|x\|"):
        histogram_threshold([1, 1, 1, 1], [-2, -1, 0, 1, 2], method)


@pytest.mark.parametrize(
    "setting",
    [
        {"num_bits": 1}, {"num_bits": 17}, {"num_bits": 8.0}, {"num_bits": True}, {"unsigned": 1},
        {"percentile": 0}, {"percentile": -1}, {"percentile": 100.1}, {"percentile": "99"},
        {"percentile": float("nan")}, {"coverage": 0}, {"coverage": 1.1}, {"coverage": None},
    ],
)  # fmt: skip
def test_bad_settings(setting: dict[str, Any]) -> None:
    with pytest.raises(QatkitError, match=next(iter(setting))):
        histogram_threshold([1], [0, 1], "max", **setting)
