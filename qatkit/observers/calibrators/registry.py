"""All calibrators by name, and the pure function from a histogram to a threshold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from qatkit.errors import QatkitError
from qatkit.observers.calibrators.analytic import aciq_threshold, octav_threshold
from qatkit.observers.calibrators.entropy import entropy_threshold, exact_entropy_threshold
from qatkit.observers.calibrators.histogram import Histogram, Settings, check_settings, checked
from qatkit.observers.calibrators.kld import document_kld_threshold, kld_threshold
from qatkit.observers.calibrators.mse import mse_threshold
from qatkit.observers.calibrators.plain import max_threshold, percentile_threshold, sigma_threshold
from qatkit.observers.calibrators.two_pointer import (
    exact_two_pointer_threshold,
    two_pointer_threshold,
)
from qatkit.spec import suggest

Source = Literal["magnitude", "rounded", "signed", "growing", "growing-signed"]


@dataclass(frozen=True)
class Calibrator:
    """How the histogram of a whole data set becomes the largest magnitude to represent.

    Attributes:
        name: its name in `histogram_threshold` and `qatkit.calibrate`.
        threshold: a pure function of the histogram and the settings.
        source: the histogram that it wants: of |x| (``magnitude``), of |x| without zeros in bins
            around the multiples of the width (``rounded``), of x (``signed``), or built as the
            original does (``growing``, ``growing-signed``).
        bins: how many bins it wants at most, of those that are made for it.
    """

    name: str
    threshold: Callable[[Histogram, Settings], float]
    source: Source
    bins: int = 2048


_ALL = (
    Calibrator("max", max_threshold, "signed", 8192),
    Calibrator("percentile", percentile_threshold, "magnitude", 4096),
    Calibrator("entropy", entropy_threshold, "magnitude"),
    Calibrator("entropy-exact", exact_entropy_threshold, "growing"),
    Calibrator("kld", kld_threshold, "rounded"),
    Calibrator("kld-document", document_kld_threshold, "rounded"),
    Calibrator("mse", mse_threshold, "magnitude"),
    Calibrator("two-pointer", two_pointer_threshold, "signed", 128),
    Calibrator("two-pointer-exact", exact_two_pointer_threshold, "growing-signed"),
    Calibrator("sigma", sigma_threshold, "signed", 8192),
    Calibrator("aciq", aciq_threshold, "magnitude", 4096),
    Calibrator("octav", octav_threshold, "magnitude", 4096),
)

CALIBRATORS: Mapping[str, Calibrator] = MappingProxyType({each.name: each for each in _ALL})


def histogram_threshold(
    counts: Any,
    bin_edges: Any,
    method: str,
    *,
    num_bits: int = 8,
    unsigned: bool = False,
    percentile: float = 99.99,
    coverage: float = 0.99,
) -> float:
    """Return the largest magnitude to represent, by one of the calibrators.

    Args:
        counts: (N,) how many samples fell into each bin; whole numbers, an array or a tensor. Not
            written to.
        bin_edges: (N + 1,) ascending. Of |x|, that is from 0 on; of x itself for ``max``,
            ``sigma`` and the two-pointer methods, which look at both ends.
        method: a name in `CALIBRATORS`.
        num_bits: width of a code, 2..16.
        unsigned: codes from 0, so that there are twice as many up to the threshold.
        percentile: for ``percentile``: percent of the samples to keep, 0 < percentile <= 100.
        coverage: for ``two-pointer`` and its exact variant: share of the samples to keep,
            0 < coverage <= 1.

    Returns:
        the threshold; 0.0 where there is nothing but zeros, or nothing at all.

    Raises:
        QatkitError: there is no such method, a setting is out of its range, or the arrays are no
            histogram for the method.

    >>> histogram_threshold([90, 9, 1], [0.0, 1.0, 2.0, 3.0], "percentile", percentile=95.0)
    1.0
    >>> histogram_threshold([90, 9, 1], [0.0, 1.0, 2.0, 3.0], "maximum")
    Traceback (most recent call last):
    qatkit.errors.QatkitError: histogram_threshold(method='maximum'): unknown method, did ...
    """
    where = "histogram_threshold"
    if not isinstance(method, str) or method not in CALIBRATORS:
        remedy = suggest(method, tuple(CALIBRATORS))
        raise QatkitError(f"{where}(method={method!r}): unknown method, {remedy}")
    calibrator = CALIBRATORS[method]
    settings = Settings(num_bits, unsigned, percentile, coverage)
    check_settings(settings, where)
    histogram = checked(counts, bin_edges, where)
    if histogram.edges[1] < 0 and not calibrator.source.endswith("signed"):
        raise QatkitError(
            f"{where}(method={method!r}): bin_edges start at {histogram.edges[0]:g}, give a "
            "histogram of |x|"
        )
    return calibrator.threshold(histogram, settings) if histogram.top else 0.0
