"""One model the whole way, and what there is to count in the files that come out."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn
from zoo_models import Case, build, loss_of

import qatkit
from qatkit.backend import Backend, get_backend
from qatkit.export.lint import GraphView, count_levels, open_view
from qatkit.export.lint.residual_rules import is_residual, read_operand
from qatkit.export.lint.walks import is_int8, is_quantized, weighted_nodes

PHASES = ("build", "prepare", "calibrate", "train", "export", "check", "lint", "verify")

Row = dict[str, Any]
Report = Callable[[Row], None]


class Course:
    """The phases of one model: keeps the time of each in the row, and reports where it is."""

    def __init__(self, row: Row, report: Report) -> None:
        """Start with nothing done."""
        self.row, self._report = row, report

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name and time one phase; a phase that comes again adds up."""
        self.row["phase"] = name
        self._report(self.row)
        started = time.process_time()
        try:
            yield
        finally:
            seconds = self.row.get(name, 0.0) + time.process_time() - started
            self.row[name] = round(seconds, 2)
            self.row["rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def run(name: str, seed: int, opset: int, folder: Path, report: Report) -> Row:
    """Take a model through all phases and return its row; an error ends it, and is the reason."""
    row: Row = {"model": name, "status": "failed", "reason": ""}
    course = Course(row, report)
    try:
        with course.phase("build"):
            case = build(name, seed)
            row |= {"kind": case.kind, "input": case.shapes}
            row["params_m"] = round(sum(p.numel() for p in case.model.parameters()) / 1e6, 1)
        train(course, case)
        export(course, case, opset, folder)
        row["status"] = "ok" if not row["reason"] else row["status"]
    except Exception as error:
        row["reason"] = row["reason"] or _line(error)
    row["seconds"] = round(sum(row.get(phase, 0.0) for phase in PHASES), 1)
    return row


def train(course: Course, case: Case) -> None:
    """Prepare, calibrate, and train one step.

    Raises:
        ArithmeticError: a loss, a gradient or a parameter is not finite, or nothing has moved.
    """
    model, row = case.model, course.row
    with course.phase("prepare"):
        qatkit.prepare(model, case.args)
        plan = qatkit.plan(model, case.args)
        row |= {"groups": len(plan.groups), "left_float": len(plan.skipped)}
    with course.phase("calibrate"):
        qatkit.calibrate(model, [case.args], progress=False)
    with course.phase("train"):
        model.train()
        parameters = dict(model.named_parameters())
        before = {name: p.detach().abs().double().sum() for name, p in parameters.items()}
        loss_of(case, model).backward()
        _require_finite(
            "gradient", {n: p.grad for n, p in parameters.items() if p.grad is not None}
        )
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        torch.optim.SGD(parameters.values(), lr=0.1).step()
        _require_finite("parameter", parameters)
        moved = [n for n, p in parameters.items() if p.detach().abs().double().sum() != before[n]]
        row["moved"] = f"{len(moved)}/{len(parameters)}"
        if not moved:
            raise ArithmeticError("no parameter has moved")
        model.zero_grad(set_to_none=True)
        model.eval()


def export(course: Course, case: Case, opset: int, folder: Path) -> None:
    """Export the whole model, or else those of its parts that export, and add up the files."""
    counts: Counter[str] = Counter()
    rules: Counter[str] = Counter()
    try:
        path = folder / f"{case.name}.onnx"
        _export_one(course, case.model, case.args, opset, path, counts, rules)
        course.row["files"] = "whole"
    except qatkit.QatkitError as error:
        course.row["whole"] = _line(error)
        parts = list(_export_parts(course, case, opset, folder, counts, rules))
        course.row["files"] = " ".join(parts)
        if not parts:
            raise
    finally:
        course.row |= {key: counts[key] for key in sorted(counts)}
        course.row["rules"] = " ".join(f"{rule}:{n}" for rule, n in sorted(rules.items()))


def _export_one(
    course: Course,
    model: nn.Module,
    inputs: Any,
    opset: int,
    path: Path,
    counts: Counter[str],
    rules: Counter[str],
) -> None:
    """Write, check, lint and verify one file, and add to the counts."""
    with course.phase("export"):
        large = sum(p.numel() for p in model.parameters()) * 4 > 1.9e9  # the limit of protobuf
        weights = "int8" if large else "float"
        qatkit.export_onnx(
            model, inputs, path, opset=opset, weights=weights, lint=False, verify=False
        )
    with course.phase("check"):
        onnx.checker.check_model(str(path), full_check=True)
    with course.phase("lint"):
        findings = qatkit.lint_onnx(path)
        found = structure(open_view(onnx.load(path)))
    with course.phase("verify"):
        report = qatkit.verify_onnx(path, model, inputs)
    counts.update(found)
    counts.update({level.lower(): n for level, n in count_levels(findings).items()})
    rules.update(one.rule for one in findings if one.level != "INFO")
    counts.update(codes=report.codes, differ=report.differing)
    errors = [str(finding) for finding in findings if finding.level == "ERROR"]
    if errors:
        course.row["reason"], course.row["phase"] = errors[0], "lint"
    elif not report.ok:
        course.row["reason"] = "; ".join(str(report).splitlines()[:2])


def structure(view: GraphView) -> dict[str, int]:
    """Count the operators that could run in INT8 and those that do.

    A weighted operator is a Conv, ConvTranspose, Gemm, MatMul or Einsum on data; it is quantized if
    both operands come from a DequantizeLinear. A residual add joins two computed tensors of one
    shape, one of which comes from a weighted operator, its norm, its activation or its gate; it is
    quantized if a DequantizeLinear feeds it.
    """
    backend = get_backend("tensorrt")
    counts: Counter[str] = Counter()
    for one in view.walk():
        weighted = list(weighted_nodes(one, backend))
        counts["weighted"] += len(weighted) + sum(node.op == "Einsum" for node in one.nodes)
        counts["quantized"] += sum(is_int8(one, node, backend) for node in weighted)
        adds = list(_residual_adds(one, backend))
        counts["adds"] += len(adds)
        counts["adds_quantized"] += sum(adds)
    return dict(counts)


def _residual_adds(view: GraphView, backend: Backend) -> Iterator[bool]:
    """Yield for each residual add whether an operand of it is quantized."""
    for node in view.nodes:
        if is_residual(view, node) and any(
            _is_behind_weighted(view, name, backend) for name in node.inputs
        ):
            yield any(is_quantized(view, name, backend) for name in node.inputs)


def _is_behind_weighted(view: GraphView, tensor: str, backend: Backend) -> bool:
    """Tell whether a feature map comes from a weighted operator, its activation and its gate."""
    node = read_operand(view, tensor, backend).origin
    if node is None or node.op in backend.weighted:
        return node is not None
    shape = view.shape(node.output)
    gate = node.op == "Mul" and (shape is None or len(shape) > 3)
    if not gate and node.op not in backend.activations | backend.smooth_activations:
        return False
    return any(_is_behind_weighted(view, name, backend) for name in node.inputs[: 1 + gate])


def _export_parts(
    course: Course,
    case: Case,
    opset: int,
    folder: Path,
    counts: Counter[str],
    rules: Counter[str],
) -> Iterator[str]:
    """Export the largest submodules that take and return tensors; yield their paths."""
    calls = _recorded(case)
    done: list[str] = []
    for path, inputs in calls.items():
        if any(path.startswith(f"{part}.") for part in done):
            continue
        part = case.model.get_submodule(path)
        try:
            _export_one(course, part, inputs, opset, folder / f"{path}.onnx", counts, rules)
        except qatkit.QatkitError as error:
            course.row["whole"] += f"; {path}: {_line(error)}"
            continue
        done.append(path)
        yield path


def _recorded(case: Case) -> dict[str, Any]:
    """Return the inputs of the first call of each submodule with quantizers, outermost first."""
    calls: dict[str, Any] = {}
    handles = []

    def recorder(path: str) -> Any:
        def record(_: nn.Module, args: Any, kwargs: Any) -> None:
            calls.setdefault(path, kwargs if kwargs and not args else args)

        return record

    for path, module in case.model.named_modules():
        quantizes = any(isinstance(one, qatkit.TensorQuantizer) for one in module.modules())
        if path and quantizes and not isinstance(module, qatkit.TensorQuantizer):
            hook = recorder(path)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    with torch.no_grad():
        case.model(*case.args)
    for handle in handles:
        handle.remove()
    return dict(sorted(calls.items(), key=lambda call: call[0].count(".")))


def _require_finite(what: str, values: dict[str, Any]) -> None:
    bad = [name for name, value in values.items() if not value.isfinite().all()]
    if bad:
        raise ArithmeticError(f"the {what} of {bad[0]} and {len(bad) - 1} more is not finite")


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400]
