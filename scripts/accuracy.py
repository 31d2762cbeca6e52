"""Run recipes/cifar10.py over widths and seeds, and print a table in Markdown.

    python scripts/accuracy.py --init FILE.pt --mode ptq --bits 8:8
    python scripts/accuracy.py --init FILE.pt --mode qat --bits 4:4 3:3 2:2

Arguments that are not known here go to the recipe: --net, --images, --epochs, --data. Each run is a
process of its own; results lie in --out as JSON and are not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import onnxruntime
import torch

import qatkit

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "cifar10.py"
HEADER = (
    "| | float | PTQ | QAT | ONNX Runtime, by seed | mean | flips | seconds |\n"
    "|---|---|---|---|---|---|---|---|"
)


def run(mode: str, bits: str, seed: int, out: Path, options: list[str]) -> dict[str, Any]:
    """Return the numbers of one run."""
    weight_bits, bits_of_activations = bits.split(":")
    name = f"{mode}-w{weight_bits}a{bits_of_activations}-{seed}"
    result = out / f"{name}.json"
    if not result.is_file():
        command = [
            *(sys.executable, str(RECIPE), "--mode", mode, "--seed", str(seed)),
            *("--wbits", weight_bits, "--abits", bits_of_activations, *options),
            *("--onnx", str(out / f"{name}.onnx"), "--json", str(result)),
        ]
        root = str(RECIPE.parents[1])
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        done = subprocess.run(command, check=False, env=os.environ | {"PYTHONPATH": paths})
        if done.returncode:  # the recipe has said why
            raise SystemExit(done.returncode)
    numbers: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return numbers


def row(mode: str, bits: str, runs: list[dict[str, Any]]) -> str:
    """Return one line of the table."""

    def average(field: str) -> str:
        values = [each[field] for each in runs]
        return "" if None in values else f"{mean(values):.2f}"

    title = "W{}A{} ".format(*bits.split(":")) + mode.upper()
    by_seed = ", ".join(f"{each['onnx_top1']:.2f}" for each in runs)
    flips = ", ".join(str(each["flips"]) for each in runs)
    cells = [title, *(average(f"{field}_top1") for field in ("float", "ptq", "qat")), by_seed]
    cells += [average("onnx_top1"), flips, f"{mean(each['seconds'] for each in runs):.0f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--init", required=True, help="state dict of the float network")
    parser.add_argument("--mode", default="qat", choices=("ptq", "qat"))
    parser.add_argument("--bits", nargs="+", default=["4:4"], help="pairs WEIGHT:ACTIVATION")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("accuracy"), help="folder of the results")
    given, options = parser.parse_known_args()
    given.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for bits in given.bits:
        runs = [
            run(given.mode, bits, seed, given.out, ["--init", given.init, *options])
            for seed in given.seeds
        ]
        lines.append(row(given.mode, bits, runs))
    print(
        f"\n{time.strftime('%Y-%m-%d')}, qatkit {qatkit.__version__}, torch {torch.__version__}, "
        f"ONNX Runtime {onnxruntime.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads, seeds {given.seeds}, {' '.join(options)}\n"
    )
    print(HEADER, *lines, sep="\n")


if __name__ == "__main__":
    main()
