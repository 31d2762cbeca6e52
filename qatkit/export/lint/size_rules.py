"""Advice on layers too small for INT8 kernels: F14 and F15 (level INFO)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from qatkit.backend import Backend
from qatkit.export.lint.finding import Finding
from qatkit.export.lint.graph_view import GraphView, Node
from qatkit.export.lint.rule import Rule
from qatkit.export.lint.walks import is_copy, is_int8, weight_input, weighted_nodes


def matmul_sizes(view: GraphView, node: Node) -> tuple[int | None, int | None, int | None]:
    """Return ``(M, K, N)`` of a Gemm or MatMul, ``None`` where unknown.

    M counts all rows that meet a 2-d weight: 197 for data of shape (197, 1, 768).
    """
    a, b = view.shape(node.input(0)), view.shape(node.input(1))
    trans_a = node.op == "Gemm" and bool(node.attribute("transA", 0))
    trans_b = node.op == "Gemm" and bool(node.attribute("transB", 0))
    m = k = n = None
    if a:
        rows = a[-1:] if trans_a else a[:-1]
        if b is not None and len(b) > 2:
            rows = rows[-1:]
        known = [size for size in rows if size is not None]
        m = math.prod(known) if len(known) == len(rows) else None
    if b:
        k = b[0] if len(b) == 1 else b[-1 if trans_b else -2]
        n = 1 if len(b) == 1 else b[-2 if trans_b else -1]
    return m, k, n


def check_small_matmuls(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F14: INT8 does not pay for a matrix-vector product, nor for K or N < 16."""
    for node in weighted_nodes(view, backend) if backend.min_channels else ():
        if node.op not in ("Gemm", "MatMul") or weight_input(view, node) is None:
            continue
        if not is_int8(view, node, backend):
            continue
        m, k, n = matmul_sizes(view, node)
        if m == 1 or n == 1:
            text = f"INT8 matrix-vector product (M={m}, K={k}, N={n})"
        elif any(size is not None and size < backend.min_channels for size in (k, n)):
            text = f"INT8 {node.op} with K={k}, N={n}, less than {backend.min_channels}"
        else:
            continue
        remedy = "float may be as fast"
        yield Finding("F14", "INFO", node.name, text, remedy=remedy)


def check_few_channels(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F15: INT8 convolutions want 16 channels, or 8-aligned ones in the first layer."""
    for node in weighted_nodes(view, backend) if backend.min_channels else ():
        shape = view.shape(node.input(1))
        if node.op != "Conv" or shape is None or not is_int8(view, node, backend):
            continue
        if len(shape) < 2 or shape[0] is None or shape[1] is None:
            continue
        c_in, c_out = shape[1] * node.attribute("group", 1), shape[0]
        first = _reads_graph_input(view, node, backend)
        short_in = c_in < backend.min_channels and not (first and c_in % 8 == 0)
        if short_in or c_out < backend.min_channels:
            place = "first " if first else ""
            text = f"{place}INT8 Conv with {c_in} input and {c_out} output channels"
            remedy = f"INT8 kernels want {backend.min_channels}" + (
                ", or a multiple of 8 input channels in the first layer" if first else ""
            )
            yield Finding("F15", "INFO", node.name, text, remedy=remedy)


def _reads_graph_input(view: GraphView, node: Node, backend: Backend) -> bool:
    producer = view.producer(node.input(0))
    while producer is not None:
        moves = producer.is_q or producer.is_dq or producer.op == "Pad"
        if not (moves or is_copy(view, producer, backend)):
            return False
        producer = view.producer(producer.input(0))
    return True


SIZE_RULES = (
    Rule("F14", "small matrix products", "[T] modelopt: GEMV, K or N < 16", check_small_matmuls),
    Rule("F15", "few channels", "[T] modelopt: channels < 16", check_few_channels),
)
