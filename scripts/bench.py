"""Measure qatkit: one entry for all benchmarks.

    python scripts/bench.py step --markdown step.md --json step.json

ops        fake quantize, what it saves, the percentile range
step       a training step over the float step, beside other tools
compiled   torch.compile: its price, and the compiled step over the eager one
calibrate  images per second of each method over the float forward
export     time and memory of `qatkit.export_onnx` with lint and proof
deploy     what INT8 gains in CPU engines
imports    what `import qatkit` costs

Variants take turns, process CPU time counts, medians are compared, and a control copy shows the
error of the measurement. Ratios hold from run to run, absolute times do not.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from types import ModuleType

from benchmarks import calibrate, compiled, deploy, export, imports, ops, step
from benchmarks.machine import machine
from benchmarks.measuring import restart_with_memory_kept

BENCHMARKS: dict[str, ModuleType] = {
    "ops": ops,
    "step": step,
    "compiled": compiled,
    "calibrate": calibrate,
    "export": export,
    "deploy": deploy,
    "imports": imports,
}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options; ``benchmark`` is the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="name", required=True)
    for name, module in BENCHMARKS.items():
        text = (module.__doc__ or "").strip()
        part = parts.add_parser(
            name, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(part)
        part.add_argument("--json", type=Path, help="write the numbers to this file too")
        part.add_argument(
            "--markdown",
            type=Path,
            help="write the tables to this file too, in one with marks to their place in it",
        )
        part.set_defaults(benchmark=module)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Run one benchmark, print its tables, and write them where that is wanted."""
    args = parse(arguments)
    if args.benchmark.KEEPS_MEMORY:
        restart_with_memory_kept()
    command = shlex.join(["python", "scripts/bench.py", *_without_files(arguments)])
    about = machine()
    result = args.benchmark.run(args)
    text = result.markdown(command, about)
    print(text)
    if args.markdown is not None:
        before = args.markdown.read_text() if args.markdown.exists() else ""
        args.markdown.write_text(put_in_place(before, args.name, text))
    if args.json is not None:
        args.json.write_text(result.json(command, about))


def put_in_place(page: str, name: str, text: str) -> str:
    """Return a page with the tables of one benchmark between their marks, or the tables alone."""
    start, end = f"<!-- bench {name} -->", f"<!-- end {name} -->"
    if start not in page or end not in page:
        return text
    return f"{page.partition(start)[0]}{start}\n\n{text}\n{end}{page.partition(end)[2]}"


def _without_files(arguments: list[str]) -> list[str]:
    """Return the command line without where its results go."""
    kept = []
    skip = False
    for argument in arguments:
        name = argument.partition("=")[0]
        if not skip and name not in ("--json", "--markdown"):
            kept.append(argument)
        skip = argument in ("--json", "--markdown")
    return kept


if __name__ == "__main__":
    main(sys.argv[1:])
