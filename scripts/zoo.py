"""Take the models of torchvision through the whole of qatkit and write a table.

    python scripts/zoo.py                                    # all of them
    python scripts/zoo.py --models 'resnet*' vit_b_16 --csv zoo.csv --markdown zoo.md
    python scripts/zoo.py --csv zoo.csv --resume             # those that are not in zoo.csv yet

Each model has random weights and batch norm statistics of its inputs. It is prepared, calibrated,
trained for one step, exported, checked with onnx.checker, linted, and verified in ONNX Runtime with
the tensors of the model as the inputs of every layer. A model that does not export as a whole, as
detection models that draw boxes, is exported in its largest parts that do. Each model runs in a
process of its own with a limit of time and one of memory. Rows of other models that are in the CSV
file stay there.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
import torchvision
from benchmarks.measuring import MALLOC
from zoo_models import list_models
from zoo_row import PHASES, Row, run

import qatkit

COLUMNS = (
    *("model", "kind", "input", "params_m", "status", "files", "quantized", "weighted"),
    *("adds_quantized", "adds", "groups", "left_float", "error", "warn", "info", "rules"),
    *("codes", "differ", "moved", "seconds", *PHASES, "rss_mb", "phase", "reason", "whole"),
)

EXPLANATION = """\
Weights are random, batch norms have the statistics of the input. *files*: the whole model, or the
parts of it that were exported instead. *weighted ops*: of Conv, ConvTranspose, Gemm, MatMul and
Einsum in the files, those whose two operands come from a DequantizeLinear. *residual adds*: of the
adds of two tensors of one shape behind a weighted operator, those with a quantized operand.
*groups*: sets of quantizers that share a scale. *errors* and *warnings*: what `qatkit.lint_onnx`
finds, warnings by rule. *codes that differ*: integers of all quantizers, weights included, that
ONNX Runtime computes otherwise than the model from the same inputs. *MB*: peak resident memory of
the process."""


def measure(name: str, args: argparse.Namespace) -> Row:
    """Run one model in a process of its own, and kill it at a limit; return its row."""
    command = [sys.executable, __file__, "--one", "--models", name]
    command += ["--seed", str(args.seed), "--opset", str(args.opset)]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)} | MALLOC
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(
            command, stdout=out, stderr=err, env=environment, start_new_session=True
        )
        started, why = time.monotonic(), ""
        while child.poll() is None:
            why = _over_limit(child.pid, time.monotonic() - started, args)
            if why:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                break
            time.sleep(0.2)
        out.seek(0)
        err.seek(0)
        rows = [json.loads(line) for line in out.read().splitlines() if line.startswith("{")]
        row: Row = rows[-1] if rows else {"model": name, "status": "failed", "phase": "start"}
        if why or child.returncode:
            last = (err.read().strip().splitlines() or [""])[-1]
            row["reason"] = why or f"exit code {child.returncode}: {last[:300]}"
            row["seconds"] = round(time.monotonic() - started, 1)
    return row


def _over_limit(pid: int, seconds: float, args: argparse.Namespace) -> str:
    """Return which limit a process is over, empty for none; memory is seen on Linux only."""
    if seconds > args.time_limit:
        return f"killed at the limit of {args.time_limit} s"
    status = Path(f"/proc/{pid}/status")
    try:
        resident = next(line for line in status.read_text().splitlines() if "VmRSS" in line)
    except (OSError, StopIteration):
        return ""
    megabytes = int(resident.split()[1]) // 1024
    over = megabytes > args.memory_limit
    return f"killed with {megabytes} MB of {args.memory_limit} MB" if over else ""


def run_one(args: argparse.Namespace) -> None:
    """Be the process of one model: print the row as JSON, and on the way what is there of it."""
    torch.set_num_threads(args.threads)
    (name,) = args.models
    with tempfile.TemporaryDirectory() as folder:
        row = run(name, args.seed, args.opset, Path(folder), _print)
    _print(row)


def _print(row: Row) -> None:
    print(json.dumps(row), flush=True)


def read_csv(path: Path | None) -> dict[str, Row]:
    """Return the rows of a CSV file by model, none if there is no file."""
    if path is None or not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["model"]: dict(row) for row in csv.DictReader(file)}


def write_csv(path: Path, rows: dict[str, Row]) -> None:
    """Write the rows in the order of torchvision's list."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in sorted(rows))


def to_markdown(rows: dict[str, Row], args: argparse.Namespace) -> str:
    """Return the table with what it was measured with above it."""
    ordered = [rows[name] for name in sorted(rows)]

    def total(column: str) -> int:
        return round(sum(float(row.get(column) or 0) for row in ordered))

    good = sum(row["status"] == "ok" for row in ordered)
    head = ["model", "kind", "input", "files", "weighted ops", "residual adds", "groups"]
    head += ["errors", "warnings", "codes that differ", "CPU s", "MB", "fails in"]
    lines = [
        "# Zoo",
        "",
        f"`python scripts/zoo.py {' '.join(sys.argv[1:])}`",
        "",
        f"{_versions()}; opset {args.opset}, seed {args.seed}, {args.threads} thread(s), "
        f"{args.jobs} model(s) at once.",
        "",
        f"{good} of {len(ordered)} models went the whole way without an error: prepare, calibrate, "
        f"one training step, export, onnx.checker, lint, verification. {total('quantized')} of "
        f"{total('weighted')} weighted operators and {total('adds_quantized')} of {total('adds')} "
        f"residual adds in their files are quantized, {total('differ')} of {total('codes')} codes "
        f"differ from the model's, {total('seconds')} s of CPU time.",
        "",
        EXPLANATION,
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    return "\n".join([*lines, *map(_markdown_row, ordered), ""])


def _markdown_row(row: Row) -> str:
    def cell(name: str) -> str:
        return str(row.get(name, ""))

    def share(part: str, whole: str) -> str:
        return f"{cell(part)}/{cell(whole)}" if cell(whole) else ""

    warnings = f"{cell('warn')} ({cell('rules')})" if cell("rules") else cell("warn")
    failure = f"{cell('phase')}: {cell('reason')}" if row["status"] != "ok" else ""
    cells = [
        *(cell(name) for name in ("model", "kind", "input", "files")),
        share("quantized", "weighted"),
        share("adds_quantized", "adds"),
        *(cell("groups"), cell("error"), warnings, share("differ", "codes")),
        *(cell("seconds"), cell("rss_mb"), failure.replace("|", "\\|")),
    ]
    return "| " + " | ".join(cells) + " |"


def _versions() -> str:
    packages: list[Any] = [qatkit, torch, torchvision, onnx, onnxruntime]
    found = ", ".join(f"{one.__name__} {one.__version__}" for one in packages)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = f"{len(names)} x {names[0]}" if names else platform.processor()
    return f"{found}, Python {platform.python_version()}; {cpu}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["*"], metavar="GLOB", help="which models")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each model")
    parser.add_argument("--time-limit", type=float, default=600, metavar="SECONDS")
    parser.add_argument("--memory-limit", type=int, default=12000, metavar="MB", help="resident")
    parser.add_argument("--csv", type=Path, help="write the rows here, after each model")
    parser.add_argument("--markdown", type=Path, help="write the table here at the end")
    parser.add_argument("--resume", action="store_true", help="keep what the CSV file has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--opset", type=int, default=13)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure every model and write the tables."""
    args = parse()
    if args.one:
        run_one(args)
        return
    rows = read_csv(args.csv)
    names = [name for name in list_models(*args.models) if not (args.resume and name in rows)]
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(partial(measure, args=args), names):
            rows[row["model"]] = row
            shown = ("model", "status", "quantized", "weighted", "seconds", "rss_mb", "reason")
            print(*(row.get(column, "-") for column in shown), flush=True)
            if args.csv:
                write_csv(args.csv, rows)
    if args.markdown:
        args.markdown.write_text(to_markdown(rows, args), encoding="utf-8")


if __name__ == "__main__":
    main()
