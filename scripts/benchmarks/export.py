"""Time and peak memory of `qatkit.export_onnx` with lint and proof, each model in a new process."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.measuring import default_allocator
from benchmarks.tables import Bar, Cell, Result, Table

KEEPS_MEMORY = False

SECONDS = {"resnet50": 10.0, "vit_b_16": 30.0}
MEMORY = 3.0
"""Peak above the idle process, in sizes of the model."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--model", nargs="+", default=["resnet50", "vit_b_16"])
    parser.add_argument("--config", default="tensorrt-int8", help="a preset")
    parser.add_argument("--front-end", nargs="+", default=["legacy", "dynamo"])
    parser.add_argument("--threads", type=int, default=1)


def run(args: argparse.Namespace) -> Result:
    """Measure every model with every front end."""
    rows: list[tuple[Cell, ...]] = []
    bars: list[Bar] = []
    for name in args.model:
        for front_end in args.front_end:
            found = _measure(name, front_end, args)
            rows.append((name, front_end, *(found[key] for key in _KEYS)))
            label = f"export of {name}, {front_end}"
            if name in SECONDS:
                bars.append(Bar(f"{label}, CPU time", found["cpu"], SECONDS[name], unit="s"))
            bars.append(Bar(f"{label}, peak above idle over model", found["peak"], MEMORY))
    table = Table(
        "export_onnx with lint and verify",
        f"1x3x224x224, {args.config}, {args.threads} thread(s), the default allocator, a process "
        "for each. *idle*: the process with the calibrated model; *peak*: the most that was "
        "resident during the export, imports of onnx and onnxruntime included, less idle, over the "
        "bytes of the parameters.",
        (
            *("model", "front end", "model MB", "idle MB", "peak MB", "peak over model"),
            *("CPU s", "wall s", "CPU s without lint and verify", "file MB", "verified"),
        ),
        tuple(rows),
    )
    return Result((table,), tuple(bars))


_KEYS = ("model", "idle", "most", "peak", "cpu", "wall", "bare", "file", "verified")


def _measure(name: str, front_end: str, args: argparse.Namespace) -> dict[str, Any]:
    scripts = Path(__file__).parents[1]
    environment = default_allocator() | {"OMP_NUM_THREADS": str(args.threads)}
    root = os.pathsep.join(filter(None, [str(scripts.parent), environment.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "benchmarks.export_process", name, front_end, args.config]
    done = subprocess.run(
        [*command, str(args.threads)],
        cwd=scripts,
        env=environment | {"PYTHONPATH": root},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
