"""The range whose quantized histogram is closest to the histogram, by Kullback-Leibler divergence.

For a cut of i bins, P are the counts below the cut with all others added to bin i - 1, and Q are
the counts below the cut, averaged over the bins that are not empty in each of G groups; group j
holds the bins ``ceil(j i / G) .. ceil((j + 1) i / G) - 1``, and ``G = 2^(bits - 1 + unsigned)``.
The cut is the last of those with the smallest ``KL(P || Q) = sum p log(p / q)``, p and q being P
and Q divided by their sums T and S.

With ``C_g`` the count of a group, ``n_g`` its bins that are not empty and ``m_g = C_g / n_g``,

    T KL = sum_k P_k log P_k - sum_g C_g log m_g - out log m_last - T log T + T log S,

where ``out`` are the counts above the cut. All sums come from running sums over the bins, so that a
cut costs G steps instead of i.

Source: NVIDIA pytorch-quantization 2.2.1, ``calib/histogram.py``.
"""

from __future__ import annotations

import numpy as np

from qatkit.observers.calibrators.histogram import FIRST_CUT, Floats, Histogram, Ints, Settings

KEPT = 0.9
"""The share of the samples outside the bin of zero that ``entropy`` keeps at least."""

_BLOCK = 1 << 18
_TIE = 1e-12


def entropy_threshold(histogram: Histogram, settings: Settings) -> float:
    """Return the threshold, safe against what makes the original collapse.

    The bin of zero is lowered to the next one (never raised), empty bins at the end do not count,
    and no cut drops more than a tenth of what lies outside the bin of zero: a cut right above a
    lone full bin would have no divergence at all, since P and Q are then one number each.

    >>> relu = Histogram(np.array([10**6, *range(255, 0, -1)]), np.arange(257.0))
    >>> entropy_threshold(relu, Settings()) > 128
    True
    """
    trimmed = histogram.without_zeros()
    counts = trimmed.counts
    running = np.cumsum(counts)
    if not running[-1]:
        return histogram.top
    cuts = np.arange(min(FIRST_CUT, len(counts)), len(counts) + 1)
    cuts = cuts[running[cuts - 1] >= KEPT * running[-1]]
    values = divergences(counts, cuts, settings.levels)
    best = np.flatnonzero(values <= values.min() + _TIE)[-1]
    return float(trimmed.edges[cuts[best]])


def exact_entropy_threshold(histogram: Histogram, settings: Settings) -> float:
    """Return the threshold of pytorch-quantization, to the last bit of its divergences.

    Where it divides by zero (nothing below the cut) or has no candidate (fewer than 128 bins) the
    cut counts as infinitely bad, and the full range is one.
    """
    counts = histogram.counts.copy()
    if len(counts) > 1:
        counts[0] = counts[1]
    if not counts.any():
        return float(histogram.edges[-1])
    cuts = np.arange(min(FIRST_CUT, len(counts)), len(counts) + 1)
    values = divergences(counts, cuts, settings.levels)
    close = cuts[values <= values.min() + _TIE]
    if len(close) > 1:
        # The running sums round otherwise than the original: let its own order of sums decide.
        exact = np.array([_direct_divergence(counts, int(cut), settings.levels) for cut in close])
        close = close[exact == exact.min()]
    return float(histogram.edges[close[-1]])


def divergences(counts: Ints, cuts: Ints, groups: int) -> Floats:
    """Return ``KL(P || Q)`` in nats for each cut; infinite where P is positive and Q is not.

    Args:
        counts: (N,).
        cuts: (K,), each 1..N.
        groups: G, a power of two.

    Returns:
        (K,) float64.

    >>> divergences(np.array([1, 5, 8, 8]), np.array([3, 4]), 2).round(4)
    array([0.1183, 0.0662])
    """
    numbers = counts.astype(np.float64)
    mass, full, log_sum = (_running(x) for x in (numbers, counts > 0, _times_log(numbers)))
    total, below, last = mass[-1], mass[cuts], numbers[cuts - 1]
    above = total - below
    grouped, log_mean = np.empty(len(cuts)), np.empty(len(cuts))
    rows = max(_BLOCK // (groups + 1), 1)
    for start in range(0, len(cuts), rows):
        block = slice(start, start + rows)
        grouped[block], log_mean[block] = _group_sums(mass, full, cuts[block], groups)
    reference = log_sum[cuts] - _times_log(last) + _times_log(last + above)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = reference - grouped - above * log_mean + total * (np.log(below) - np.log(total))
    impossible = (below == 0) | ((last == 0) & (above > 0))
    result: Floats = np.where(impossible, np.inf, scaled / total)
    return result


def _group_sums(mass: Floats, full: Floats, cuts: Ints, groups: int) -> tuple[Floats, Floats]:
    """Return ``sum_g C_g log m_g`` and ``log m`` of the last group for each cut."""
    bounds = -(-np.arange(groups + 1) * cuts[:, None] // groups)
    in_group = np.diff(mass[bounds], axis=1)
    log_mean = in_group / np.maximum(np.diff(full[bounds], axis=1), 1.0)
    np.log(log_mean, out=log_mean, where=in_group > 0)
    # The group of the last bin: the last one that is not of width 0.
    group = (cuts - 1) * groups // cuts
    last: Floats = log_mean[np.arange(len(cuts)), group]
    return np.einsum("kg,kg->k", in_group, log_mean), last


def _direct_divergence(counts: Ints, cut: int, groups: int) -> float:
    """Return one divergence with the original's sums in the original's order."""
    below = counts[:cut].astype(np.float64)
    group = np.arange(cut) * groups // cut
    mean = np.bincount(group, below) / np.maximum(np.bincount(group, below > 0), 1.0)
    q = np.where(below > 0, mean[group], 0.0)
    p = below
    p[-1] += counts[cut:].sum()
    p, q = p / p.sum(), q / q.sum()
    some = p > 0
    if (q[some] <= 0).any():
        return float("inf")
    terms = np.zeros(cut)
    terms[some] = _relative_entropy(p[some], q[some])
    return float(terms.sum())


def _relative_entropy(p: Floats, q: Floats) -> Floats:
    """Return ``p log(p / q)``, as scipy computes it: by log1p for ratios between 1/2 and 2."""
    ratio = p / q
    near = (ratio > 0.5) & (ratio < 2.0)
    result: Floats = p * np.where(near, np.log1p((p - q) / q), np.log(ratio))
    return result


def _running(values: Floats | np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Floats:
    return np.concatenate(([0.0], np.cumsum(values, dtype=np.float64)))


def _times_log(x: Floats) -> Floats:
    """Return ``x log x``, 0 at 0."""
    return x * np.log(np.maximum(x, 1.0))
