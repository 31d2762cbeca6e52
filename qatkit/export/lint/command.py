"""The lint as a command: arguments, output and exit status, for any command line to take over."""

from __future__ import annotations

import argparse
import sys

from qatkit.backend import BACKENDS
from qatkit.errors import QatkitError
from qatkit.export.lint import (
    LEVELS,
    VERSIONS,
    at_least,
    count_levels,
    findings_to_json,
    format_findings,
    lint_onnx,
)

CLEAN, BROKEN, FAILED = 0, 1, 2


def add_lint_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `run_lint` reads."""
    parser.add_argument("file", help="an .onnx file, external data beside it")
    parser.add_argument(
        "--backend", default="tensorrt", choices=sorted(BACKENDS), help="engine, default: tensorrt"
    )
    parser.add_argument(
        "--trt", type=int, choices=sorted(VERSIONS), help="major version of TensorRT, default: 10"
    )
    parser.add_argument(
        "--level", default="INFO", choices=LEVELS, help="least level to print, default: INFO"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON array, not a table")


def run_lint(arguments: argparse.Namespace) -> int:
    """Print the findings of a file and return the exit status.

    Args:
        arguments: what the arguments of `add_lint_arguments` were parsed to.

    Returns:
        0 for a file without errors, 1 for one with errors, 2 for one that cannot be linted, with
        one line on the standard error output.
    """
    try:
        findings = lint_onnx(arguments.file, arguments.backend, trt=arguments.trt)
    except QatkitError as error:
        sys.stderr.write(f"qatkit lint: {error}\n")
        return FAILED
    shown = at_least(findings, arguments.level)
    sys.stdout.write((findings_to_json(shown) if arguments.json else format_findings(shown)) + "\n")
    return BROKEN if count_levels(findings)["ERROR"] else CLEAN


def main(argv: list[str] | None = None) -> int:
    """Run the lint with the arguments of a shell, those of this process by default."""
    parser = argparse.ArgumentParser(
        prog="python -m qatkit.export.lint",
        description="Check a QDQ ONNX file against the rules of an inference engine.",
        epilog="Exit status: 0 no errors, 1 errors found, 2 wrong usage or unreadable file.",
    )
    add_lint_arguments(parser)
    return run_lint(parser.parse_args(argv))
