"""Rules on scales around operators that only move values: F8, F9, F10, F17."""

from __future__ import annotations

from collections.abc import Iterator

from qatkit.backend import Backend
from qatkit.export.lint.finding import Finding
from qatkit.export.lint.graph_view import GraphView, Node
from qatkit.export.lint.rule import Rule
from qatkit.export.lint.walks import (
    IDENTITIES,
    WHOLE_COPIES,
    dq_behind,
    is_copy,
    quantizers_after,
    same_scale,
    show_scale,
)

RESIZES = frozenset({"Resize", "Upsample"})


def activation_quantizers(view: GraphView) -> Iterator[Node]:
    """Yield the QuantizeLinear nodes on activations."""
    for node in view.nodes:
        if node.is_q and not view.is_constant(node.input(0)):
            yield node


def direct_quantizers(view: GraphView, tensor: str) -> list[Node]:
    """Return the QuantizeLinear nodes that read ``tensor`` itself."""
    return [node for node in view.consumers(tensor) if node.is_q and node.input(0) == tensor]


def check_copies(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F8: both sides of a copy share one scale."""
    for quantize in activation_quantizers(view):
        for copy, other in _quantized_sources(view, quantize, backend):
            if same_scale(view, other, quantize) is False:
                text = (
                    f"scale {show_scale(view, other)} in front of {copy.op} {copy.name!r} "
                    f"({other.name!r}) and {show_scale(view, quantize)} behind it"
                )
                remedy = "give both sides one scale, or drop this quantizer"
                yield Finding("F8", "WARN", quantize.name, text, remedy=remedy)
                break


def _quantized_sources(
    view: GraphView, quantize: Node, backend: Backend
) -> Iterator[tuple[Node, Node]]:
    """Yield ``(copy, Q or DQ in front of it)`` for the copies behind which a Q stands.

    A sibling Q in front counts only if the copies keep every value: the parts of a Split may have
    scales of their own.
    """
    tensor, whole = quantize.input(0), True
    node = view.producer(tensor)
    while node is not None and node.op != "Concat" and is_copy(view, node, backend):
        tensor = node.input(0)
        whole = whole and node.op in WHOLE_COPIES
        source = view.producer(tensor)
        if node.op not in ("Identity", "Dropout", "Cast"):
            if source is not None and source.is_dq:
                yield node, source
            elif whole:
                for sibling in direct_quantizers(view, tensor):
                    yield node, sibling
        node = source


def check_pairs(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F8: a DQ has the scale of the Q whose codes it reads, also through copies of the codes."""
    for dequantize in view.nodes:
        source = view.producer(dequantize.input(0)) if dequantize.is_dq else None
        while source is not None and source.op in WHOLE_COPIES and source.op != "Concat":
            source = view.producer(source.input(0))
        if source is None or not source.is_q or same_scale(view, source, dequantize) is not False:
            continue
        text = (
            f"scale {show_scale(view, dequantize)}, but QuantizeLinear {source.name!r} wrote the "
            f"codes with {show_scale(view, source)}"
        )
        remedy = "give both the same scale"
        yield Finding("F8", "WARN", dequantize.name, text, remedy=remedy)


def check_concats(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F9: all inputs and the output of a Concat share one scale."""
    for node in view.nodes:
        if node.op != "Concat" or node.domain or view.is_constant(node.output):
            continue
        data = [name for name in node.inputs if name and not view.is_constant(name)]
        behind = [dq_behind(view, name, backend) for name in data]
        outputs = quantizers_after(view, node.output, backend, whole=True)
        ends = [one for one in behind if one is not None] + outputs
        if outputs:
            floats = [name for name, one in zip(data, behind, strict=True) if one is None]
            ends += [one for name in floats for one in _siblings(view, name, node)]
        differing = [one for one in ends[1:] if same_scale(view, ends[0], one) is False]
        if differing:
            scales = dict.fromkeys(show_scale(view, one) for one in ends)
            text = f"inputs and output of Concat have different scales: {', '.join(scales)}"
            remedy = "calibrate them together with one shared scale"
            yield Finding("F9", "WARN", node.name, text, remedy=remedy)
        elif None in behind and any(behind):
            float_input = data[behind.index(None)]
            text = f"Concat mixes quantized inputs with float input {float_input!r}"
            yield Finding("F9", "INFO", node.name, text, remedy="quantize all inputs or none")


def _siblings(view: GraphView, tensor: str, concat: Node) -> list[Node]:
    """Return other quantizers of a float Concat input, in front of copies that keep every value."""
    found = direct_quantizers(view, tensor)
    node = view.producer(tensor)
    while node is not None and node.op in WHOLE_COPIES and node.op != "Concat" and node != concat:
        tensor = node.input(0)
        found += direct_quantizers(view, tensor)
        node = view.producer(tensor)
    return found


def _real_tensor(view: GraphView, tensor: str) -> str:
    """Return the tensor in front of Identity and Dropout."""
    node = view.producer(tensor)
    while node is not None and node.op in IDENTITIES:
        tensor = node.input(0)
        node = view.producer(tensor)
    return tensor


def check_resizes(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F10: no quantizer for the sake of a Resize alone."""
    for node in view.nodes:
        source = view.producer(node.input(0)) if node.op in RESIZES else None
        if source is None or not source.is_dq:
            continue
        alone = all(reader.op in RESIZES for reader in view.consumers(source.output))
        useful = is_copy(view, node, backend) and _feeds_weighted(view, node.output, backend)
        if useful or not alone:
            continue
        if not quantizers_after(view, node.output, backend, through=RESIZES):
            text = f"input of {node.op} is quantized, no quantizer follows"
            remedy = "leave the input float: no Q is needed in front of a Resize"
            yield Finding("F10", "INFO", node.name, text, remedy=remedy)


def _feeds_weighted(view: GraphView, tensor: str, backend: Backend) -> bool:
    """Return whether a weighted operator reads ``tensor``, through copies."""
    todo, seen = [tensor], {tensor}
    while todo:
        for node in view.consumers(todo.pop()):
            if node.op in backend.weighted and not node.domain:
                return True
            if is_copy(view, node, backend):
                todo += [name for name in node.outputs if name not in seen]
                seen.update(node.outputs)
    return False


def check_shared_tensors(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F17: one tensor has one quantizer with one scale."""
    by_tensor: dict[str, list[Node]] = {}
    for one in activation_quantizers(view):
        by_tensor.setdefault(_real_tensor(view, one.input(0)), []).append(one)
    for tensor, (quantize, *rest) in by_tensor.items():
        maker = view.producer(tensor)
        if maker is not None and maker.op == "ConstantOfShape":
            continue  # one start state of several recurrent layers
        differing = [one for one in rest if same_scale(view, quantize, one) is False]
        if differing:
            scales = dict.fromkeys(show_scale(view, one) for one in (quantize, *differing))
            text = f"tensor {tensor!r} has quantizers with different scales: {', '.join(scales)}"
            remedy = "use one quantizer for all its readers"
            yield Finding("F17", "WARN", differing[0].name, text, remedy=remedy)
        elif rest:
            text = f"tensor {tensor!r} has {len(rest) + 1} quantizers with one scale"
            remedy = "use one quantizer for all its readers"
            yield Finding("F17", "INFO", rest[0].name, text, remedy=remedy)


LAYOUT_RULES = (
    Rule("F8", "copies share one scale", "[D][T] TensorRT, modelopt", check_copies),
    Rule("F8", "Q and DQ share one scale", "[D] TensorRT, Explicit quantization", check_pairs),
    Rule("F9", "Concat shares one scale", "[T] NVIDIA yolov7: 180 -> 207 qps", check_concats),
    Rule("F10", "no Q for a Resize", "[T] modelopt placement", check_resizes),
    Rule("F17", "one tensor, one quantizer", "[D] TensorRT, Q/DQ placement", check_shared_tensors),
)
