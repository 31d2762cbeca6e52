"""The search of the percentile range against the published loop, in a process of its own.

    python -m benchmarks.percentile_range --sizes 1000000 --rounds 9      # prints JSON

The allocator of a process cannot be changed: `ops` starts this once for each.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import medians, take_turns
from benchmarks.published_range import published_range
from qatkit.functional import shrink_range

PERCENTILES = (0.01, 0.1, 1.0, 5.0, 20.0)


def data(kind: str, count: int) -> Tensor:
    """Return ``count`` numbers, Gaussian or those behind a ReLU, shaped like activations."""
    x = torch.randn(count // 100, 100)
    return x if kind == "gaussian" else x.relu_()


def bins_apart(x: Tensor, percentile: float) -> float:
    """Return how far the two ranges are apart, in bins of the histogram.

    Where the percentile is a whole number K of elements, qatkit leaves out K and the published loop
    fewer, which is a bin or two.
    """
    low, high = x.aminmax()
    width = float(high - low) / 255
    mine = shrink_range(x, percentile)
    theirs = published_range(x, percentile)
    return max(abs(float(a) - b) for a, b in zip(mine, theirs, strict=True)) / width


def main() -> None:
    """Measure every case and print a list."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", required=True)
    parser.add_argument("--percentiles", type=float, nargs="+", default=PERCENTILES)
    parser.add_argument("--rounds", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(json.dumps([case for count in args.sizes for case in cases(count, args)]))


def cases(count: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one size: all kinds of data, all percentiles."""
    found = []
    for kind in ("gaussian", "relu"):
        x = data(kind, count)
        runs = {"floor": x.aminmax, "floor again": x.aminmax}
        for percentile in args.percentiles:
            runs[f"loop {percentile:g}"] = partial(published_range, x, percentile)
            runs[f"qatkit {percentile:g}"] = partial(shrink_range, x, percentile)
        rounds = args.rounds * max(1, min(10, 10**6 // count))
        seconds = take_turns(runs, rounds, warm_up=2)
        times = {label: 1e9 * value / count for label, value in medians(seconds).items()}
        for percentile in args.percentiles:
            ratios = [
                a / b
                for a, b in zip(
                    seconds[f"loop {percentile:g}"], seconds[f"qatkit {percentile:g}"], strict=True
                )
            ]
            found.append(
                {
                    "size": count,
                    "data": kind,
                    "percentile": percentile,
                    "floor": times["floor"],
                    "control": times["floor again"] / times["floor"],
                    "loop": times[f"loop {percentile:g}"],
                    "qatkit": times[f"qatkit {percentile:g}"],
                    "faster": statistics.median(ratios),
                    "bins apart": bins_apart(x, percentile),
                }
            )
    return found


if __name__ == "__main__":
    main()
