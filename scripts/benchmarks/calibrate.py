"""Images per second of `qatkit.calibrate`, by method, over the float forward of the same images.

Each run is a whole calibration, its last step included. What this last step takes for one
histogram is in a table of its own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

import qatkit
from benchmarks.measuring import medians, take_turns
from benchmarks.tables import Bar, Cell, Result, Table
from qatkit.observers import CALIBRATORS, histogram_threshold

KEEPS_MEMORY = True

OBSERVERS = ("shrink", "minmax", "ema", "average")
ON_EVERY_BATCH = 0.8
"""The least share of the float images per second, with the percentile of each batch."""
HISTOGRAMS = 0.6
"""The same with a histogram of all data."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    names = [*OBSERVERS, *CALIBRATORS]
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--batches", type=int, default=4, help="batches of one calibration")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", nargs="+", choices=names, default=names, metavar="METHOD")


def run(args: argparse.Namespace) -> Result:
    """Measure every method, and the last step of every calibrator."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = [torch.randn(args.batch, 3, args.size, args.size) for _ in range(args.batches)]
    model = torchvision.models.get_model(args.model).eval()
    prepared = qatkit.prepare(torchvision.models.get_model(args.model).eval(), data[0][:1])
    runs = {"float": _forward(model, data), "float again (control)": _forward(model, data)}
    for method in args.method:
        runs[method] = lambda name=method: qatkit.calibrate(
            prepared, data, method=name, progress=False
        )
    seconds = medians(take_turns(runs, args.rounds))
    images = args.batch * args.batches
    share = {label: seconds["float"] / value for label, value in seconds.items()}
    rows = tuple((label, images / value, share[label]) for label, value in seconds.items())
    table = Table(
        f"calibration, {args.model}",
        f"{images} images of {args.size} x {args.size} in batches of {args.batch}, one thread, "
        f"medians of {args.rounds} calibrations in turn, last step included, memory kept.",
        ("method", "images/s (CPU time)", "share of the float forward"),
        rows,
    )
    bars = [
        Bar(
            f"calibrate({label!r}), share of the float images/s",
            share[label],
            ON_EVERY_BATCH if label in OBSERVERS else HISTOGRAMS,
            at_most=False,
        )
        for label in args.method
    ]
    return Result((table, _last_steps(args)), tuple(bars))


def _forward(model: nn.Module, data: list[Tensor]) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            for batch in data:
                model(batch)

    return forward


def _last_steps(args: argparse.Namespace) -> Table:
    """Time what makes a threshold of a histogram."""
    x = np.abs(np.random.default_rng(0).normal(size=200_000))
    counts, edges = np.histogram(x, bins=2048)
    rows: list[tuple[Cell, ...]] = []
    for name in CALIBRATORS:
        if name in args.method:
            times = []
            for _ in range(5):
                started = time.process_time()
                histogram_threshold(counts, edges, name)
                times.append(1000 * (time.process_time() - started))
            rows.append((name, float(np.median(times))))
    return Table(
        "from one histogram of 2048 bins to a threshold",
        "Magnitudes of 200,000 Gaussian numbers, one thread, medians of 5.",
        ("method", "CPU ms"),
        tuple(rows),
    )
