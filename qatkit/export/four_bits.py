"""The ONNX pass that stores codes of at most 4 bits as INT4 and UINT4.

Before opset 21 there is no such type: the codes are int8, and a Clip in front of each Q keeps to
the narrow grid. Here the types become 4 bits wide. Where the grid fills the type the Clip goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from qatkit.export.qdq import SUFFIX_CLIP, SUFFIX_DQ, SUFFIX_Q, split_rows
from qatkit.modes import quantizers
from qatkit.spec import QuantSpec

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

FIRST_OPSET = 21
"""The first one whose Q and DQ know the types (P9)."""

INT4_CODES = (-8, 7)
UINT4_CODES = (0, 15)


def specs_of(model: nn.Module) -> dict[str, QuantSpec]:
    """Return the spec of each quantizer by the name that its nodes have."""
    return {each.name or path or "quantizer": each.spec for path, each in quantizers(model)}


def to_four_bits(model: ModelProto, specs: Mapping[str, QuantSpec]) -> None:
    """Narrow the types of the codes that fit 4 bits, in place; all values stay the same.

    Codes around another zero point than 0 keep their type.

    Args:
        model: a Q/DQ file of opset 21 or more.
        specs: those of the quantizers, see `specs_of`.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    narrowed: dict[str, TensorProto] = {}
    filled: list[NodeProto] = []
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 3:
            continue
        spec = specs[_quantizer(node)]
        grid = spec.quant_min, spec.quant_max
        kind = _type_of(grid)
        if kind is None or _has_zero_point(constants[node.input[2]]):
            continue
        for name in (node.input[0], node.input[2]):
            stored = constants.get(name)
            if stored is not None and (name == node.input[2] or node.op_type != "QuantizeLinear"):
                narrowed[name] = narrowed.get(name) or _narrow(stored, kind)
        clip = makers.get(node.input[0])
        if clip is not None and clip.name == _clip_of(node) and grid in (INT4_CODES, UINT4_CODES):
            filled.append(node)
    for name, tensor in narrowed.items():
        constants[name].CopyFrom(tensor)
    del graph.value_info[:]
    _remove_clips(graph, filled, makers)


def count_simulated(model: ModelProto, specs: Mapping[str, QuantSpec]) -> dict[int, int]:
    """Return how many quantizers in a file have a narrower grid than the type of their codes.

    Returns:
        by the bits of the grid, in descending order.
    """
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    bits = [
        specs[_quantizer(node)].num_bits
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
        and specs[_quantizer(node)].num_bits < _bits_of(kinds[node.input[2]])
    ]
    return {width: bits.count(width) for width in sorted(set(bits), reverse=True)}


def _bits_of(kind: int) -> int:
    from onnx import TensorProto

    return 4 if kind in (TensorProto.INT4, TensorProto.UINT4) else 8


def _quantizer(node: NodeProto) -> str:
    """Return the name of the quantizer that a node belongs to."""
    name = node.name.removesuffix(SUFFIX_Q).removesuffix(SUFFIX_DQ)
    return split_rows(name.partition("#")[0])[0]


def _clip_of(node: NodeProto) -> str:
    """Return what the Clip that keeps a Q to its grid is called."""
    return f"{node.name.removesuffix(SUFFIX_Q)}{SUFFIX_CLIP}"


def _type_of(grid: tuple[int, int]) -> int | None:
    from onnx import TensorProto

    low, high = grid
    if low >= UINT4_CODES[0] and high <= UINT4_CODES[1] and high > INT4_CODES[1]:
        return int(TensorProto.UINT4)
    return int(TensorProto.INT4) if low >= INT4_CODES[0] and high <= INT4_CODES[1] else None


def _has_zero_point(tensor: TensorProto) -> bool:
    from onnx import numpy_helper

    return bool(numpy_helper.to_array(tensor).any())


def _narrow(tensor: TensorProto, kind: int) -> TensorProto:
    """Return the same integers in another type."""
    from onnx import helper, numpy_helper

    codes = numpy_helper.to_array(tensor).flatten().tolist()
    return helper.make_tensor(tensor.name, kind, list(tensor.dims), codes)


def _remove_clips(
    graph: GraphProto, behind: list[NodeProto], makers: Mapping[str, NodeProto]
) -> None:
    """Let Q nodes read what the Clip in front of them reads, and drop the Clips."""
    gone = set()
    for node in behind:
        clip = makers[node.input[0]]
        node.input[0] = clip.input[0]
        gone.add(clip.name)
    kept = [node for node in graph.node if node.op_type != "Clip" or node.name not in gone]
    del graph.node[:]
    graph.node.extend(kept)
