"""Rules on one major version of TensorRT: opset, inputs of Q/DQ, scales, codes, typing."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from qatkit.backend import Backend
from qatkit.export.lint.finding import Finding
from qatkit.export.lint.graph_view import GraphView
from qatkit.export.lint.parse_rules import code_types, qdq_nodes
from qatkit.export.lint.rule import Rule
from qatkit.export.lint.versions import TensorRT
from qatkit.export.lint.walks import weighted_nodes


def check_opset(version: TensorRT, view: GraphView, backend: Backend) -> Iterator[Finding]:
    """P9: the version reads the opset of the file."""
    if view.parent is not None or view.opset <= version.common_opset:
        return
    refused = view.opset > version.last_opset
    text = f"opset {view.opset}, TensorRT {version.major}: {version.opset_note}"
    if refused:
        remedy = f"export at opset {version.last_opset} or lower"
    else:
        remedy = f"check your release, or export at opset {version.common_opset}"
    yield Finding("P9", "ERROR" if refused else "INFO", view.name, text, remedy=remedy)


def check_inputs(version: TensorRT, view: GraphView, backend: Backend) -> Iterator[Finding]:
    """P3: Q and DQ have a zero point, which TensorRT 8 wants and later versions do not need."""
    for node in qdq_nodes(view):
        if node.input(2) or (node.is_q and not node.attribute("output_dtype", 0)):
            continue
        if version.three_inputs:
            level, text = "ERROR", f"no zero point, TensorRT {version.major} wants three inputs"
        else:
            level, text = "INFO", "no zero point, which TensorRT 8 does not accept"
        yield Finding("P3", level, node.name, text, remedy="write an int8 zero point of 0")


def check_scales(version: TensorRT, view: GraphView, backend: Backend) -> Iterator[Finding]:
    """P9: scales are float32, one per tensor or channel, where the version knows no others."""
    for node in qdq_nodes(view):
        kind = view.dtype(node.input(1))
        if version.float_scales and kind not in ("float", None):
            text = f"TensorRT {version.major} reads {kind} scales as float32"
            yield Finding("P9", "ERROR", node.name, text, remedy="export float32 at opset 13")
        if not version.blocks and node.attribute("block_size", 0):
            text = f"TensorRT {version.major} knows no block scales"
            remedy = "quantize per channel, or use TensorRT 10"
            yield Finding("P9", "ERROR", node.name, text, remedy=remedy)


def check_codes(version: TensorRT, view: GraphView, backend: Backend) -> Iterator[Finding]:
    """P9: the version knows the type of the codes."""
    for node in qdq_nodes(view):
        for kind in sorted(code_types(view, node) & version.later_codes.keys()):
            text = f"{kind} codes came with TensorRT {version.later_codes[kind]}"
            remedy = f"use int8 codes for TensorRT {version.major}"
            yield Finding("P9", "ERROR", node.name, text, remedy=remedy)


def check_operators(version: TensorRT, view: GraphView, backend: Backend) -> Iterator[Finding]:
    """P9: operators that came with a later release of the version."""
    for node in view.nodes:
        release = version.later_operators.get(node.op) if not node.domain else None
        if release is not None:
            text = f"{node.op} came with TensorRT {release}"
            remedy = f"use {release}, or export at an opset without {node.op}"
            yield Finding("P9", "INFO", node.name, text, remedy=remedy)


def check_float_types(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """P10: with strong typing alone, what is float32 in the file runs in FP32."""
    if view.parent is not None:
        return
    kinds = [
        view.dtype(node.output) for one in view.walk() for node in weighted_nodes(one, backend)
    ]
    count = kinds.count("float")
    if count:
        text = (
            f"{count} of {len(kinds)} weighted operators are float32: all that is not INT8 runs "
            "in FP32, as there is no --fp16 and no --int8 any more"
        )
        remedy = "export FP16 with Q/DQ at opset 19 or higher"
        yield Finding("P10", "WARN", view.name, text, remedy=remedy)


def version_rules(version: TensorRT) -> tuple[Rule, ...]:
    """Return the rules on one version of TensorRT, to be checked besides those on every one."""
    parser = "[C] onnx-tensorrt parser, 8.x and 10.x"
    changes = "[D] onnx-tensorrt, Changelog.md and operators.md"
    rules = [
        Rule("P3", "zero point written", parser, partial(check_inputs, version)),
        Rule("P9", "opset", version.opset_source, partial(check_opset, version)),
    ]
    if version.float_scales or not version.blocks:
        rules.append(Rule("P9", "kind of scales", parser, partial(check_scales, version)))
    if version.later_codes:
        rules.append(Rule("P9", "type of the codes", changes, partial(check_codes, version)))
    if version.later_operators:
        rules.append(Rule("P9", "later operators", changes, partial(check_operators, version)))
    if version.strong_typing:
        source = "[D] TensorRT, Migrating from 10.x to 11.x"
        rules.append(Rule("P10", "no float32 left", source, check_float_types))
    return tuple(rules)
