"""Rules for engines that fuse a weighted operator only with the Q behind it: F20 and F21."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qatkit.backend import Backend
from qatkit.export.lint.finding import Finding
from qatkit.export.lint.graph_view import GraphView, Node
from qatkit.export.lint.rule import Rule
from qatkit.export.lint.walks import is_int8, scale_of, weighted_behind, weighted_nodes

ENGINES = "[C] ONNX Runtime, QDQ selectors and ClipQuantFusion"
_ROUNDING = 1e-6


def follows_result(view: GraphView, dequantize: Node, backend: Backend) -> bool:
    """Return whether a DQ stands for a result that the engine wants quantized."""
    quantize = view.producer(dequantize.input(0))
    if quantize is None or not quantize.is_q:
        return False
    tensor = quantize.input(0)
    node = view.producer(tensor)
    fusing = backend.activations | backend.smooth_activations
    while node is not None and node.op in fusing:
        tensor = node.input(0)
        node = view.producer(tensor)
    if node is not None and node.op in backend.quantized_results:
        return True
    weighted = weighted_behind(view, tensor, backend)
    return weighted is not None and weighted.op in backend.quantized_results


def check_results(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F20: a quantizer reads the result of an operator that runs in INT8 only with one behind it.

    A result that leaves the graph, or goes to an operator that is float on purpose, is left alone.
    """
    for node in weighted_nodes(view, backend) if backend.fuses_by_result else ():
        if node.op not in backend.quantized_results or not is_int8(view, node, backend):
            continue
        readers = list(_readers(view, node.output, backend))
        slow = [reader for reader in readers if reader is not None and not reader.is_q]
        kept = any(_is_float(reader, backend) for reader in readers)
        if slow and not kept:
            text = f"result of {node.op} is read in float by {slow[0].op} {slow[0].name!r}"
            remedy = "quantize it for all its readers, or it runs in float"
            yield Finding("F20", "WARN", node.name, text, remedy=remedy)


def _is_float(reader: Node | None, backend: Backend) -> bool:
    return reader is None or reader.op in backend.float_inputs | backend.weighted


def _readers(view: GraphView, tensor: str, backend: Backend) -> Iterator[Node | None]:
    """Yield the readers of a result behind what fuses with it, ``None`` for a graph output."""
    fusing = backend.activations | backend.smooth_activations | {"Identity", "Dropout"}
    readers = view.consumers(tensor)
    if tensor in view.outputs:
        yield None
    elif len(readers) == 1 and readers[0].op in fusing | backend.passes_quantizers:
        yield from _readers(view, readers[0].output, backend)
    else:
        yield from readers


def check_superfluous_activations(view: GraphView, backend: Backend) -> Iterator[Finding]:
    """F21: the codes of a Q hold nothing that the activation in front of it cuts off."""
    for node in view.nodes if backend.fuses_by_result else ():
        activation = view.producer(node.input(0)) if node.is_q else None
        if activation is None or activation.op not in backend.activations:
            continue
        weighted = weighted_behind(view, activation.input(0), backend)
        if weighted is None or weighted.op not in backend.quantized_results:
            continue
        bounds, codes = _bounds(view, activation), _range(view, node)
        if bounds is None or codes is None:
            continue
        slack = _ROUNDING * max(abs(codes[0]), abs(codes[1]))
        if codes[0] < bounds[0] - slack or codes[1] > bounds[1] + slack:
            text = (
                f"codes stand for {codes[0]:.4g}..{codes[1]:.4g} and {activation.op} "
                f"{activation.name!r} cuts off at {bounds[0]:.4g}..{bounds[1]:.4g}: "
                f"{weighted.op} {weighted.name!r} runs in float"
            )
            remedy = "use 8-bit unsigned codes, with zero point 0, behind it"
            yield Finding("F21", "WARN", node.name, text, remedy=remedy)


def _bounds(view: GraphView, activation: Node) -> tuple[float, float] | None:
    """Return between which numbers an activation lets values pass, ``None`` if unknown."""
    if activation.op == "Relu":
        return 0.0, float("inf")
    if activation.op != "Clip":
        return None
    ends = []
    for position, key, default in ((1, "min", -np.inf), (2, "max", np.inf)):
        name = activation.input(position)
        value = view.array(name) if name else np.float32(activation.attribute(key, default))
        if value is None:
            return None
        ends.append(float(value))
    return ends[0], ends[1]


def _range(view: GraphView, quantize: Node) -> tuple[float, float] | None:
    """Return which numbers the lowest and the highest code of a Q stand for."""
    scale = scale_of(view, quantize)
    zero = view.array(quantize.input(2)) if quantize.input(2) else None
    if scale is None or scale.size != 1 or zero is None or zero.dtype.kind not in "iu":
        return None
    ends = np.iinfo(zero.dtype)
    center = int(zero.ravel()[0])
    return (ends.min - center) * float(scale[0]), (ends.max - center) * float(scale[0])


RESULT_RULES = (
    Rule("F20", "results quantized", ENGINES, check_results),
    Rule("F21", "activations superfluous", ENGINES, check_superfluous_activations),
)
