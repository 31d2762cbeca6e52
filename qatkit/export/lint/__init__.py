"""Lint of QDQ ONNX files: what an engine refuses, and what costs speed or accuracy."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from qatkit.backend import Backend, get_backend
from qatkit.export.lint.finding import (
    LEVELS,
    Finding,
    count_levels,
    findings_to_json,
    format_findings,
    sort_findings,
)
from qatkit.export.lint.graph_view import GraphView, open_view
from qatkit.export.lint.loading import load_for_lint
from qatkit.export.lint.rule import Rule

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = [
    "LEVELS",
    "Finding",
    "GraphView",
    "Rule",
    "count_levels",
    "findings_to_json",
    "format_findings",
    "lint_onnx",
    "open_view",
    "rules",
    "sort_findings",
]


@functools.cache
def rules() -> tuple[Rule, ...]:
    """Return every rule; the files that hold them are read at the first use."""
    from qatkit.export.lint.attention_rules import ATTENTION_RULES
    from qatkit.export.lint.fusion_rules import FUSION_RULES
    from qatkit.export.lint.layout_rules import LAYOUT_RULES
    from qatkit.export.lint.operand_rules import OPERAND_RULES
    from qatkit.export.lint.parse_rules import PARSE_RULES
    from qatkit.export.lint.residual_rules import RESIDUAL_RULES
    from qatkit.export.lint.size_rules import SIZE_RULES
    from qatkit.export.lint.weight_rules import WEIGHT_RULES

    return (
        *PARSE_RULES,
        *OPERAND_RULES,
        *WEIGHT_RULES,
        *FUSION_RULES,
        *RESIDUAL_RULES,
        *LAYOUT_RULES,
        *ATTENTION_RULES,
        *SIZE_RULES,
    )


def lint_onnx(path: str | Path | ModelProto, backend: str | Backend = "tensorrt") -> list[Finding]:
    """Check a QDQ ONNX file against the rules of an inference engine.

    Graphs inside If, Loop and Scan are checked too, local functions after inlining. Weights in
    external data files are read only where a rule needs their values.

    Args:
        path: path of an .onnx file, or a model in memory.
        backend: name of the engine, or its rules.

    Returns:
        The findings, errors first; empty for a clean file.

    Raises:
        MissingExtraError: onnx is not installed.
        QatkitTypeError: neither a path nor a ``ModelProto``.
        QatkitError: the backend is unknown, the file is missing or no ONNX file, or external data
            is missing.

    Source: NVIDIA TensorRT documentation, "Explicit quantization"; the onnx-tensorrt parser.
    """
    rules_of = backend if isinstance(backend, Backend) else get_backend(backend)
    model, base_dir = load_for_lint(path)
    view = open_view(model, base_dir)
    return sort_findings(
        finding for rule in rules() for one in view.walk() for finding in rule.run(one, rules_of)
    )
