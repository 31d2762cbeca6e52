"""Move padding with zeros into the convolutions behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto


def absorb_pads(graph: GraphProto) -> None:
    """Add the widths of each Pad with zeros to the convolutions that alone read it, in place.

    Only the axes behind the channels can be padded so. A Pad of no width goes.
    """
    from onnx import numpy_helper

    constants: dict[str, Any] = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {output.name for output in graph.output}
    absorbed = []
    for pad in graph.node:
        if pad.op_type != "Pad" or pad.output[0] in outputs:
            continue
        given: list[Any] = [constants.get(name) for name in pad.input[1:] if name]
        mode = next((a.s for a in pad.attribute if a.name == "mode"), b"constant")
        if None in given or len(given) not in (1, 2) or mode != b"constant":
            continue
        widths, *value = (numpy_helper.to_array(tensor) for tensor in given)
        behind = readers.get(pad.output[0], [])
        if (value and value[0].any()) or not _can_absorb(widths, behind, pad.output[0]):
            continue
        for reader in behind:
            if widths.any():
                _widen(reader, widths)
            for i, name in enumerate(reader.input):
                if name == pad.output[0]:
                    reader.input[i] = pad.input[0]
        absorbed.append(pad)
    for pad in absorbed:
        graph.node.remove(pad)


def _can_absorb(widths: Any, readers: list[NodeProto], name: str) -> bool:
    if not widths.any():
        return bool(readers)
    half = len(widths) // 2
    spatial = not any(widths[[0, 1, half, half + 1]]) and (widths >= 0).all()
    return bool(spatial and readers) and all(
        node.op_type == "Conv"
        and list(node.input).count(name) == 1
        and node.input[0] == name
        and not any(a.name == "auto_pad" and a.s != b"NOTSET" for a in node.attribute)
        for node in readers
    )


def _widen(conv: NodeProto, widths: Any) -> None:
    """Add the widths of the spatial axes to the attribute ``pads``."""
    from onnx import helper

    half = len(widths) // 2
    more = [*widths[2:half], *widths[half + 2 :]]
    have = next((list(a.ints) for a in conv.attribute if a.name == "pads"), [0] * len(more))
    kept = [attribute for attribute in conv.attribute if attribute.name != "pads"]
    sums = [int(a) + int(b) for a, b in zip(have, more, strict=True)]
    del conv.attribute[:]
    conv.attribute.extend([*kept, helper.make_attribute("pads", sums)])
