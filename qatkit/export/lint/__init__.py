"""Lint of QDQ ONNX files: what an engine refuses, and what costs speed or accuracy.

From a shell: ``python -m qatkit.export.lint FILE --trt 10 --json``.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from qatkit.backend import Backend, get_backend
from qatkit.errors import QatkitError
from qatkit.export.lint.finding import (
    LEVELS,
    Finding,
    at_least,
    count_levels,
    findings_to_json,
    sort_findings,
)
from qatkit.export.lint.graph_view import GraphView, open_view
from qatkit.export.lint.loading import load_for_lint, malformed
from qatkit.export.lint.rule import Rule, rule_table
from qatkit.export.lint.text import format_findings
from qatkit.export.lint.versions import DEFAULT_VERSION, VERSIONS, get_version

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = [
    "LEVELS",
    "VERSIONS",
    "Finding",
    "GraphView",
    "Rule",
    "at_least",
    "count_levels",
    "findings_to_json",
    "format_findings",
    "lint_onnx",
    "open_view",
    "rule_table",
    "rules",
    "rules_of_version",
    "sort_findings",
]


@functools.cache
def rules() -> tuple[Rule, ...]:
    """Return every rule; the files that hold them are read at the first use."""
    from qatkit.export.lint.attention_rules import ATTENTION_RULES
    from qatkit.export.lint.fusion_rules import FUSION_RULES
    from qatkit.export.lint.layout_rules import LAYOUT_RULES
    from qatkit.export.lint.narrow_rules import NARROW_RULES
    from qatkit.export.lint.operand_rules import OPERAND_RULES
    from qatkit.export.lint.parse_rules import PARSE_RULES
    from qatkit.export.lint.residual_rules import RESIDUAL_RULES
    from qatkit.export.lint.result_rules import RESULT_RULES
    from qatkit.export.lint.size_rules import SIZE_RULES
    from qatkit.export.lint.weight_rules import WEIGHT_RULES

    return (
        *PARSE_RULES,
        *OPERAND_RULES,
        *WEIGHT_RULES,
        *NARROW_RULES,
        *FUSION_RULES,
        *RESIDUAL_RULES,
        *RESULT_RULES,
        *LAYOUT_RULES,
        *ATTENTION_RULES,
        *SIZE_RULES,
    )


def rules_of_version(trt: int) -> tuple[Rule, ...]:
    """Return what is checked for one major version of TensorRT besides `rules`.

    Raises:
        QatkitError: the version is not among `VERSIONS`.
    """
    from qatkit.export.lint.version_rules import version_rules

    return version_rules(get_version(trt))


def lint_onnx(
    path: str | Path | ModelProto, backend: str | Backend = "tensorrt", *, trt: int | None = None
) -> list[Finding]:
    """Check a QDQ ONNX file against the rules of an inference engine.

    Graphs inside If, Loop and Scan are checked too, local functions after inlining. Weights in
    external data files are read only where a rule needs their values.

    Args:
        path: path of an .onnx file, or a model in memory.
        backend: name of the engine, or its rules.
        trt: major version of TensorRT: 8, 10 or 11; 10 if it is not given. For the engine called
            ``tensorrt`` only.

    Returns:
        The findings, errors first; empty for a clean file.

    Raises:
        MissingExtraError: onnx is not installed.
        QatkitTypeError: neither a path nor a ``ModelProto``.
        QatkitError: the backend or the version is unknown, the file is missing, no ONNX file or
            malformed, or external data is missing.

    Source: NVIDIA TensorRT documentation, "Explicit quantization"; the onnx-tensorrt parser.
    """
    rules_of = backend if isinstance(backend, Backend) else get_backend(backend)
    checks = (*rules(), *_version_rules(rules_of, trt))
    file, where = load_for_lint(path)
    try:
        view = open_view(file)
        found = [one for rule in checks for part in view.walk() for one in rule.run(part, rules_of)]
    except QatkitError as error:
        raise QatkitError(f"{where}: {error}") from None
    except Exception as error:
        reason = malformed(file)
        if not reason:
            raise
        raise QatkitError(f"{where}: malformed graph ({reason}): write the file again") from error
    return sort_findings(found)


def _version_rules(backend: Backend, trt: int | None) -> tuple[Rule, ...]:
    if backend.name == "tensorrt":
        return rules_of_version(DEFAULT_VERSION if trt is None else trt)
    if trt is not None:
        raise QatkitError(
            f"lint_onnx(trt={trt!r}): the backend is {backend.name!r}: leave it out, or give "
            "backend='tensorrt'"
        )
    return ()
