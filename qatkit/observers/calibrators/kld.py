"""The KLD calibrator of tpu-mlir: cuts in steps of 128 bins, 128 groups of equal width.

The histogram is one of |x| without zeros whose bin k lies around ``k w``, ``w = absmax / (N - 1)``:
``bin = floor(|x| / w + 0.5)``. The published document and the code differ:

| | ``kld`` (the code) | ``kld-document`` |
|---|---|---|
| cuts | 128, 256 .. N | 128, 256 .. below N |
| threshold | i w | (i + 0.5) absmax / N |

So the document can never keep the full range. Of equal divergences the first wins, in both.

Source: tpu-mlir, calibration math library and its documentation.
"""

from __future__ import annotations

import numpy as np

from qatkit.observers.calibrators.histogram import FIRST_CUT, Floats, Histogram, Settings

_TINY = 1e-30


def kld_threshold(histogram: Histogram, settings: Settings) -> float:
    """Return the threshold as the code has it, at most ``N w``."""
    cut = _best_cut(histogram, settings, full_range=True)
    return min(cut, len(histogram.counts)) * histogram.width


def document_kld_threshold(histogram: Histogram, settings: Settings) -> float:
    """Return the threshold as the document has it."""
    bins = len(histogram.counts)
    if bins == 1:
        return histogram.top
    absmax = (bins - 1) * histogram.width
    cut = min(_best_cut(histogram, settings, full_range=False), bins)
    return (cut + 0.5) * absmax / bins


def _best_cut(histogram: Histogram, settings: Settings, *, full_range: bool) -> int:
    """Return the first cut of least divergence; the full range if there is no other candidate."""
    groups = 1 << (settings.num_bits - 1)
    step = max(FIRST_CUT, groups)
    bins = len(histogram.counts)
    padded = np.zeros(-(-bins // step) * step)
    padded[:bins] = histogram.counts
    cuts = list(range(step, len(padded) + int(full_range), step)) or [len(padded)]
    return cuts[int(np.argmin([_divergence(padded, cut, groups) for cut in cuts]))]


def _divergence(counts: Floats, cut: int, groups: int) -> float:
    """Return ``sum p log10(p / q)`` with 1e-30 added to both, P with the outliers in its last bin.

    >>> round(_divergence(np.array([1.0, 5.0, 8.0, 8.0]), 4, 2), 6)
    0.028733
    """
    grouped = counts[:cut].reshape(groups, -1)
    full = grouped > 0
    mean = grouped.sum(1) / np.maximum(full.sum(1), 1)
    q = np.where(full, mean[:, None], 0.0).reshape(-1)
    p = counts[:cut].copy()
    p[-1] += counts[cut:].sum()
    p, q = p / p.sum(), q / max(q.sum(), _TINY)
    return float((p * np.log10((p + _TINY) / (q + _TINY))).sum())
