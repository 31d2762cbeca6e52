"""Rules on transformers: inputs that stay float (F12) and the INT8 attention fusion (F13)."""

from __future__ import annotations

from collections.abc import Iterator

from qatkit.backend import Backend
from qatkit.export.lint.finding import Finding
from qatkit.export.lint.graph_view import GraphView, Node
from qatkit.export.lint.rule import Rule
from qatkit.export.lint.walks import (
    CONVS,
    constant_operand,
    dq_behind,
    is_copy,
    is_int8,
    norm_axes,
    quantizers_after,
    weight_input,
)

# Between the scores of an attention and its Softmax.
SCALING = frozenset({"Add", "Sub", "Mul", "Div", "Where"})


def check_float_inputs(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F12: inputs of Softmax and LayerNorm are float, except conv -> (copies) -> LayerNorm."""
    for node in view.nodes:
        tensor = node.input(0)
        if node.op in backend.float_inputs:
            name = node.op
        elif (found := _normalized(view, node)) is not None:
            name, tensor = found
        else:
            continue
        if "Softmax" in name:
            dequantize = _dq_behind_scores(view, tensor, backend)
        else:
            dequantize = dq_behind(view, tensor, backend)
        if dequantize is None:
            continue
        if "Softmax" not in name and _is_behind_conv(view, dequantize, backend):
            continue
        text = f"input of {name} is quantized"
        remedy = "leave it float, quantize behind it"
        yield Finding("F12", "WARN", node.name, text, remedy=remedy)


def _normalized(view: GraphView, node: Node) -> tuple[str, str] | None:
    """Return the norm that a ReduceMean over trailing axes starts, and the tensor it normalizes.

    LayerNorm is ``x - mean(x)``, RMSNorm ``x / sqrt(mean(x * x))``.
    """
    if node.op != "ReduceMean" or node.domain:
        return None
    shape = view.shape(node.input(0))
    axes = norm_axes(view, node, len(shape) if shape is not None else None)
    end = len(shape) if shape is not None else 0
    if not axes or axes != tuple(range(end - len(axes), end)):
        return None
    readers = view.consumers(node.output)
    if any(one.op == "Sub" and one.input(0) == node.input(0) for one in readers):
        return "a decomposed LayerNormalization", node.input(0)
    square = view.producer(node.input(0))
    if square is not None and square.op in ("Pow", "Mul") and not square.domain:
        x = square.input(0)
        if square.op == "Pow" or square.input(1) == x:
            return "a decomposed RMSNormalization", x
    return None


def _dq_behind_scores(view: GraphView, tensor: str, backend: Backend) -> Node | None:
    """Return a DQ behind the input of a Softmax, also through its scaling and its mask."""
    todo, seen = [tensor], {tensor}
    while todo:
        name = todo.pop()
        found = dq_behind(view, name, backend)
        if found is not None:
            return found
        node = view.producer(name)
        if node is None or node.op not in SCALING or node.domain:
            continue
        data = {one for one in node.inputs if one and not view.is_constant(one)}
        if node.op in ("Add", "Sub", "Where") or len(data) == 1:
            todo += sorted(data - seen)
            seen |= data
    return None


def _is_behind_conv(view: GraphView, dequantize: Node, backend: Backend) -> bool:
    """Return whether a DQ stands for the output of a convolution, through copies and bias."""
    node: Node | None = dequantize
    while node is not None and node.op not in CONVS:
        step = 0
        if node.op == "Add":
            constant = constant_operand(view, node)
            if constant is None:
                return False
            step = 1 - constant
        elif not (node.is_q or node.is_dq or is_copy(view, node, backend)):
            return False
        node = view.producer(node.input(step))
    return node is not None


def attentions(view: GraphView, backend: Backend) -> Iterator[tuple[Node, Node, Node]]:
    """Yield ``(QK^T, Softmax, probabilities x V)``."""
    for node in view.nodes:
        if node.op != "Softmax" or node.domain:
            continue
        first = _scores(view, node.input(0), backend)
        second = _mix(view, node.output, backend)
        if first is not None and second is not None:
            yield first, node, second


def _scores(view: GraphView, tensor: str, backend: Backend) -> Node | None:
    """Walk back from Softmax through scaling, mask and Q/DQ to the MatMul of two activations."""
    todo, seen = [tensor], {tensor}
    while todo:
        node = view.producer(todo.pop())
        if node is None or view.is_constant(node.output):
            continue
        if node.op == "MatMul":
            if weight_input(view, node) is None:
                return node
            continue
        scaling = node.op in SCALING
        if scaling or node.is_q or node.is_dq or is_copy(view, node, backend):
            names = node.inputs if scaling else node.inputs[:1]
            todo += [name for name in names if name and name not in seen]
            seen.update(names)
    return None


def _mix(view: GraphView, tensor: str, backend: Backend) -> Node | None:
    """Walk on from Softmax through copies and Q/DQ to the MatMul of two activations."""
    todo, seen = [tensor], {tensor}
    while todo:
        name = todo.pop()
        for node in view.consumers(name):
            if node.op == "MatMul" and weight_input(view, node) is None:
                return node
            if node.is_q or node.is_dq or is_copy(view, node, backend):
                todo += [output for output in node.outputs if output not in seen]
                seen.update(node.outputs)
    return None


def check_attention(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F13: an INT8 attention quantizes both matmuls and what follows, within the fusion's sizes."""
    for first, softmax, second in attentions(view, backend) if backend.attention_head_sizes else ():
        flags = [is_int8(view, one, backend) for one in (first, second)]
        if not any(flags):
            continue  # F1 reports float matmuls
        if not all(flags):
            slow = (first, second)[flags.index(False)]
            text = f"only one matmul of the attention is INT8, MatMul {slow.name!r} is not"
            remedy = "quantize both inputs of both matmuls"
            yield Finding("F13", "WARN", softmax.name, text, remedy=remedy)
            continue
        if not quantizers_after(view, second.output, backend):
            text = f"no quantizer behind the second matmul {second.name!r} of an INT8 attention"
            yield Finding("F13", "WARN", softmax.name, text, remedy="quantize its output")
        yield from _size_findings(view, first, softmax, backend)


def _size_findings(
    view: GraphView, first: Node, softmax: Node, backend: Backend
) -> Iterator[Finding]:
    query, scores = view.shape(first.input(0)), view.shape(softmax.output)
    head = query[-1] if query else None
    length = scores[-1] if scores else None
    if head is not None and head not in backend.attention_head_sizes:
        sizes = ", ".join(str(size) for size in sorted(backend.attention_head_sizes))
        text = f"head size {head}, the INT8 attention fusion takes {sizes}"
        yield Finding("F13", "INFO", softmax.name, text, remedy="expect unfused INT8 matmuls")
    if length is not None and length > backend.max_attention_length:
        text = (
            f"sequence of {length}, the INT8 attention fusion takes {backend.max_attention_length}"
        )
        yield Finding("F13", "INFO", softmax.name, text, remedy="expect unfused INT8 matmuls")


ATTENTION_RULES = (
    Rule("F12", "float Softmax and LayerNorm inputs", "[T] modelopt placement", check_float_inputs),
    Rule("F13", "INT8 attention fusion", "[D][I] TensorRT, multi-head attention", check_attention),
)
