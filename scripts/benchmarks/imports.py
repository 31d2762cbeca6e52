"""What an import costs after `import torch`: the best of several fresh processes."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from benchmarks.machine import version_of
from benchmarks.tables import Bar, Cell, Result, Table

KEEPS_MEMORY = False

CODE = """
import time, torch
started = time.process_time()
import {}
print(time.process_time() - started)
"""

_NOT_COMPILED = "PYTHONDONTWRITEBYTECODE"
"""An installed package is compiled; with this set, one that runs from its source never is."""

PACKAGES = {
    "qatkit": "qatkit",
    "torch.ao.quantization.quantize_fx": "torch",
    "modelopt.torch.quantization": "nvidia-modelopt",
    "brevitas.nn": "brevitas",
    "nncf.torch": "nncf",
}
"""The package that must be installed, by what is imported."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--rounds", type=int, default=3)


def run(args: argparse.Namespace) -> Result:
    """Measure every package that is installed."""
    rows: list[tuple[Cell, ...]] = []
    notes = []
    for name, package in PACKAGES.items():
        if not version_of(package):
            notes.append(f"{name}: {package} is not installed")
            continue
        times = [_seconds(name) for _ in range(args.rounds + 1)][1:]  # the first one may compile
        found = [each for each in times if each is not None]
        if found:
            rows.append((name, 1000 * min(found)))
        else:
            notes.append(f"{name}: cannot be imported")
    table = Table(
        "import after `import torch`",
        f"Process CPU time, the best of {args.rounds} fresh processes.",
        ("package", "ms"),
        tuple(rows),
    )
    own = float(next((row[1] for row in rows if row[0] == "qatkit"), float("nan")) or 0)
    return Result((table,), (Bar("import qatkit", own, 100.0, unit="ms"),), tuple(notes))


def _seconds(name: str) -> float | None:
    environment = {key: value for key, value in os.environ.items() if key != _NOT_COMPILED}
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(name)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    return None if done.returncode else float(done.stdout.splitlines()[-1])
