"""F6 and F6c: which operand of a residual Add is quantized."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from qatkit.backend import Backend
from qatkit.export.lint.finding import Finding
from qatkit.export.lint.graph_view import GraphView, Node
from qatkit.export.lint.reach import reaches_quantizer
from qatkit.export.lint.rule import Rule
from qatkit.export.lint.walks import (
    CONVS,
    constant_operand,
    is_copy,
    is_int8,
    is_quantized,
    weight_input,
)

# Copies behind which a convolution no longer is the operand of the Add, so that nothing fuses.
RESAMPLING = frozenset({"MaxPool", "Resize", "Upsample", "Expand", "DepthToSpace", "SpaceToDepth"})


@dataclass(frozen=True, eq=False)
class Operand:
    """One input of a join: its tensor, the node that really computes it, and its state.

    Attributes:
        tensor: name of the input.
        origin: the node behind copies, Q/DQ, batch norm, bias and layer scale; ``None`` for a
            graph input.
        quantized: whether it comes from a DequantizeLinear.
        kind: ``conv`` or ``linear`` where the origin is a quantized weighted operator, else ``""``.
    """

    tensor: str
    origin: Node | None
    quantized: bool
    kind: str


def read_operand(view: GraphView, tensor: str, backend: Backend) -> Operand:
    """Classify one input of a join."""
    node, moved = view.local_producer(tensor), False
    while node is not None:
        step = 0
        if node.op in ("Add", "Mul"):
            constant = constant_operand(view, node)
            if constant is None:
                break
            step = 1 - constant
        elif node.op == "Concat" or (is_copy(view, node, backend) and node.op != "Cast"):
            if node.op in RESAMPLING or not _one_source(view, node):
                break
            moved |= node.op not in ("Identity", "Dropout")
        elif not (node.is_q or node.is_dq or node.op in ("BatchNormalization", "Cast")):
            break
        node = view.local_producer(node.input(step))
    kind = "" if node is None else _kind(view, node, backend)
    if kind == "conv" and moved:
        kind = ""
    return Operand(tensor, node, is_quantized(view, tensor, backend), kind)


def _one_source(view: GraphView, node: Node) -> bool:
    """Return whether a copy has one data input, or is a Concat of slices of one tensor (a roll)."""
    if node.op != "Concat":
        return True
    sources = set()
    for name in node.inputs:
        producer = view.local_producer(name)
        sources.add(producer.input(0) if producer is not None and producer.op == "Slice" else name)
    return len(sources) == 1


def _kind(view: GraphView, node: Node, backend: Backend) -> str:
    if node.op not in backend.weighted or node.domain or not is_int8(view, node, backend):
        return ""
    if node.op in CONVS:
        return "conv"
    return "linear" if weight_input(view, node) is not None else ""


def depths(view: GraphView, node: Node | None) -> dict[int, int]:
    """Return the ancestors of ``node`` with the longest path to each, not counting Q and DQ.

    The key is the position of the ancestor in the graph, -1 for the graph inputs.
    """
    if node is None:
        return {-1: 0}
    longest = {node.index: 0}
    todo = [-node.index]
    while todo:
        index = -heapq.heappop(todo)  # nodes are sorted, so all paths to the last one are known
        current = view.nodes[index]
        if current.op == "Shape":
            continue
        depth = longest[index] + (not (current.is_q or current.is_dq))
        for name in current.inputs:
            if not name or view.is_constant(name):
                continue
            producer = view.local_producer(name)
            before = -1 if producer is None else producer.index
            if before >= index:
                continue
            if before >= 0 and before not in longest:
                heapq.heappush(todo, -before)
            longest[before] = max(depth, longest.get(before, 0))
    return longest


def is_residual(view: GraphView, node: Node) -> bool:
    """Return whether an Add joins two tensors of one shape, as far as shapes are known."""
    if node.op not in ("Add", "Sum") or node.domain or len(node.inputs) != 2:
        return False
    if any(view.is_constant(name) for name in node.inputs):
        return False
    first, second = (view.shape(name) for name in node.inputs)
    if first is None or second is None:
        return True
    return len(first) == len(second) and all(
        a == b or a is None or b is None for a, b in zip(first, second, strict=True)
    )


def check_conv_residuals(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F6: of a residual Add behind a conv, the other operand is quantized, and it alone."""
    return (one for one in _residual_findings(view, backend) if one.rule == "F6")


def check_linear_residuals(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F6c: of a residual Add behind a linear layer, the other operand is quantized, or both."""
    return (one for one in _residual_findings(view, backend) if one.rule == "F6c")


def _residual_findings(view: GraphView, backend: Backend) -> Iterator[Finding]:
    for node in view.nodes:
        if not is_residual(view, node):
            continue
        operands = [read_operand(view, name, backend) for name in node.inputs]
        if not any(operand.kind for operand in operands):
            continue
        fused, sure = _fused(view, operands)
        if fused is None:
            continue
        branch, skip = operands[fused], operands[1 - fused]
        conv = branch.kind == "conv"
        policy = backend.residual if conv else backend.transformer_residual
        rule = "F6" if conv else "F6c"
        if policy == "none" or (not conv and branch.quantized and skip.quantized):
            continue
        if policy == "both":
            if not (branch.quantized and skip.quantized):
                text = "residual Add with a float input"
                yield Finding(rule, "WARN", node.name, text, remedy="quantize both inputs")
            continue
        text = _verdict(branch, skip)
        if text:
            wrong = branch.quantized and not skip.quantized
            near = branch.quantized or bool(skip.kind) or _near(view, skip, node, backend)
            level = "INFO" if (wrong and not sure) or not near else "WARN"
            remedy = f"quantize {skip.tensor!r} only, {branch.tensor!r} fuses"
            yield Finding(rule, level, node.name, text, remedy=remedy)


def _near(view: GraphView, skip: Operand, node: Node, backend: Backend) -> bool:
    """Return whether the skip input or the sum gets to a quantizer: else nothing runs in INT8."""
    return any(reaches_quantizer(view, name, backend) for name in (skip.tensor, node.output))


def _verdict(branch: Operand, skip: Operand) -> str:
    """Return what is wrong under the skip-only policy, ``""`` for nothing."""
    if branch.quantized and skip.quantized:
        return "both inputs of the residual Add are quantized"
    if branch.quantized:
        return "the branch of the residual Add is quantized, its skip input is float"
    return "" if skip.quantized else "neither input of the residual Add is quantized"


def _fused(view: GraphView, operands: list[Operand]) -> tuple[int | None, bool]:
    """Return which operand fuses into its producer, and whether that is beyond doubt.

    An operand that is an ancestor of the other one is the skip input. Of two branches that end in
    a conv the deeper one, by the longest path to the nearest common ancestor, fuses.
    """
    first, second = (depths(view, operand.origin) for operand in operands)
    nearest = max(first.keys() & second.keys(), default=None)
    positions = [-1 if one.origin is None else one.origin.index for one in operands]
    kinds = [operand.kind for operand in operands]
    for skip in (0, 1):
        if nearest == positions[skip] and positions[0] != positions[1]:
            return (1 - skip if kinds[1 - skip] else None), True
    if kinds.count("conv") == 1:
        return kinds.index("conv"), True
    if "conv" not in kinds:
        return None, True
    if nearest is None or first[nearest] == second[nearest]:
        quantized = [operand.quantized for operand in operands]
        return (quantized.index(False) if False in quantized else 0), False
    return (0 if first[nearest] > second[nearest] else 1), True


RESIDUAL_RULES = (
    Rule(
        "F6", "residual: quantize the skip input", "[D][T] TensorRT, modelopt", check_conv_residuals
    ),
    Rule(
        "F6c", "transformer residual", "[T] modelopt, policy of the backend", check_linear_residuals
    ),
)
