"""Measure what quantization adds to a training step: QAT step over float step, in process CPU time.

    python scripts/bench_step.py --model resnet18 mobilenet_v2 --frozen

A step is forward, cross entropy, backward and SGD on one fixed batch of random images. The
variants take turns step by step, so that a slow moment of the machine hits all of them, and the
medians are compared. `control` is a second float copy: how far its ratio is from 1 is the error of
the measurement. The script starts itself again with an allocator that keeps its memory, because
page faults otherwise decide such ratios.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import nn

import qatkit

MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_MMAP_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


def make_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """Return a function that does one training step."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def variants(name: str, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Return the step of each variant of the torchvision model ``name``, all from equal weights."""
    torch.manual_seed(0)
    x = torch.randn(args.batch, 3, args.size, args.size)
    y = torch.randint(1000, (args.batch,))
    model = torchvision.models.get_model(name)
    qat = qatkit.prepare(copy.deepcopy(model), x[:1], args.config)
    qatkit.calibrate(qat, [x], progress=False)
    models = {"float": model, "control": copy.deepcopy(model), "qat": qat}
    if args.frozen:
        models["qat frozen"] = copy.deepcopy(qat)
        qatkit.freeze_ranges(models["qat frozen"]).apply()
    return {label: make_step(m, x, y) for label, m in models.items()}


def measure(steps: dict[str, Callable[[], None]], count: int) -> dict[str, list[float]]:
    """Return the CPU seconds of ``count`` steps of each variant, taken in turn after a warm-up."""
    seconds: dict[str, list[float]] = {label: [] for label in steps}
    for turn in range(count + 2):
        for label, step in steps.items():
            started = time.process_time()
            step()
            if turn >= 2:
                seconds[label].append(time.process_time() - started)
    return seconds


def cpu_name() -> str:
    """Return the model name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Measure every model and print one table."""
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--config", default="tensorrt-int8", help="a preset")
    parser.add_argument("--frozen", action="store_true", help="also with frozen ranges")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {cpu_name()}")
    print(f"Python {platform.python_version()}, {args.threads} thread(s), {args.config}, medians")
    print(f"of {args.steps} steps, batch {args.batch}x3x{args.size}x{args.size}, memory kept:")
    print(" ".join(f"{name}={value}" for name, value in MALLOC.items()))
    print(f"\n{'model':20} {'variant':12} {'CPU ms/step':>12} {'quartiles':>17} {'ratio':>7}")
    for name in args.model:
        seconds = measure(variants(name, args), args.steps)
        base = statistics.median(seconds["float"])
        for label, values in seconds.items():
            low, middle, high = (1000 * q for q in statistics.quantiles(values, n=4))
            quartiles = f"{low:.1f}..{high:.1f}"
            ratio = statistics.median(values) / base
            print(f"{name:20} {label:12} {middle:12.1f} {quartiles:>17} {ratio:7.3f}", flush=True)


if __name__ == "__main__":
    main()
