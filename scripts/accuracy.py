"""Run recipes/cifar10.py over widths and seeds, and print a table in Markdown.

    python scripts/accuracy.py --init FILE.pt --mode ptq
    python scripts/accuracy.py --init FILE.pt --mode ptq --bits 8:8 --calibration max entropy kld
    python scripts/accuracy.py --init FILE.pt --mode qat --bits 4:4 3:3 2:2

Arguments that are not known here go to the recipe: --net, --images, --epochs, --data. Each run is a
process of its own; results lie in --out as JSON and are not made again: a folder for each network.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import onnxruntime
import torch

import qatkit

BITS = {"ptq": ["8:8", "4:8", "4:4", "3:4"], "qat": ["4:4"]}
RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "cifar10.py"
HEADER = (
    "| | float | PTQ | QAT | ONNX Runtime, by seed | mean ± deviation | flips | seconds |\n"
    "|---|---|---|---|---|---|---|---|"
)


def run(result: Path, options: list[str]) -> dict[str, Any]:
    """Return the numbers of one run, which lie in ``result`` or get there."""
    if not result.is_file():
        files = ["--onnx", str(result.with_suffix(".onnx")), "--json", str(result)]
        command = [sys.executable, str(RECIPE), *options, *files]
        root = str(RECIPE.parents[1])
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        done = subprocess.run(command, check=False, env=os.environ | {"PYTHONPATH": paths})
        if done.returncode:  # the recipe has said why
            raise SystemExit(done.returncode)
    numbers: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return numbers


def row(title: str, runs: list[dict[str, Any]]) -> str:
    """Return one line of the table."""

    def average(field: str) -> str:
        values = [each[field] for each in runs]
        return "" if None in values else f"{mean(values):.2f}"

    by_seed = ", ".join(f"{each['onnx_top1']:.2f}" for each in runs)
    flips = ", ".join(str(each["flips"]) for each in runs)
    cells = [title, *(average(f"{field}_top1") for field in ("float", "ptq", "qat")), by_seed]
    spread = f" ± {stdev(each['onnx_top1'] for each in runs):.2f}" if len(runs) > 1 else ""
    cells += [average("onnx_top1") + spread, flips, f"{mean(each['seconds'] for each in runs):.0f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--init", required=True, help="state dict of the float network")
    parser.add_argument("--mode", default="qat", choices=("ptq", "qat"))
    parser.add_argument("--bits", nargs="+", help="pairs WEIGHT:ACTIVATION")
    parser.add_argument(
        "--calibration", nargs="+", default=[""], help="methods; without: that of the recipe"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("accuracy"), help="folder of the results")
    given, options = parser.parse_known_args()
    given.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for bits, method in itertools.product(given.bits or BITS[given.mode], given.calibration):
        weights, activations = bits.split(":")
        widths = f"W{weights}A{activations}"
        more = ["--init", given.init, "--mode", given.mode, "--wbits", weights]
        more += ["--abits", activations, *options]
        more += ["--calibration", method] if method else []
        stem = "-".join(filter(None, [given.mode, widths.lower(), method]))
        runs = [
            run(given.out / f"{stem}-{seed}.json", [*more, "--seed", str(seed)])
            for seed in given.seeds
        ]
        lines.append(row(f"{widths} {given.mode.upper()} {method}".strip(), runs))
    print(
        f"\n{time.strftime('%Y-%m-%d')}, qatkit {qatkit.__version__}, torch {torch.__version__}, "
        f"ONNX Runtime {onnxruntime.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads, seeds {given.seeds}, {' '.join(options)}\n"
    )
    print(HEADER, *lines, sep="\n")


if __name__ == "__main__":
    main()
