"""Teacher forcing: every layer of a file computes from the model's own quantized tensors."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.export.codes import FOUR_BITS, Constants, compare_codes
from qatkit.export.onnx_runtime import Array, run_onnx
from qatkit.export.qdq import SUFFIX_DQ, split_rows
from qatkit.export.verify_report import QuantizerCheck
from qatkit.kernels.portable import along
from qatkit.modes import quantizers
from qatkit.nn.weights import weights_of
from qatkit.quantizer import TensorQuantizer

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto

_SELECTING = frozenset({"NonMaxSuppression", "NonZero", "TopK", "Unique"})


@dataclass(frozen=True, eq=False)
class Seen:
    """What one call of a quantizer got and gave in the model, and its scale, to broadcast.

    The codes are those less the zero point.
    """

    source: Tensor
    result: Array
    codes: Array
    scale: Array


@dataclass(frozen=True, eq=False)
class Forced:
    """What a file computes under teacher forcing.

    Attributes:
        checks: each quantizer call, in the file and in the model.
        outputs: the outputs of the file.
    """

    checks: tuple[QuantizerCheck, ...]
    outputs: list[Array]


@contextmanager
def watch(model: nn.Module) -> Iterator[dict[str, list[Seen]]]:
    """Collect what each quantizer does, in order of its calls; of parameters only the name.

    What a layer quantizes of a parameter may be a part of it.
    """
    seen: dict[str, list[Seen]] = {}
    weights = {id(weight.quantizer) for weight in weights_of(model)}
    handles = []

    def hook(quantizer: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        assert isinstance(quantizer, TensorQuantizer)
        calls = seen.setdefault(quantizer.name, [])
        if id(quantizer) in weights or any(call.source is given[0] for call in calls):
            return
        scale = torch.as_tensor(along(quantizer.scale, result, quantizer.spec.axis))
        codes = torch.round(result / scale).to(torch.int32)
        kept = result.numpy().copy()  # an activation behind it may write to the result
        calls.append(Seen(given[0], kept, codes.numpy(), scale.numpy()))

    for path, quantizer in quantizers(model):
        quantizer.name = quantizer.name or path
        if quantizer.quantize:
            handles.append(quantizer.register_forward_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def as_in_file(seen: dict[str, list[Seen]], proto: ModelProto) -> dict[str, list[Seen]]:
    """Merge calls on equal tensors where the file has fewer: it drops copies such as ``clone``."""
    nodes = (node for node in proto.graph.node if node.op_type == "DequantizeLinear")
    in_file = Counter(quantizer_of(node)[0] for node in nodes)
    merged = {}
    for name, calls in seen.items():
        distinct: list[Seen] = []
        for call in calls:
            if not any(torch.equal(call.source, other.source) for other in distinct):
                distinct.append(call)
        merged[name] = distinct if len(calls) > in_file[name] else calls
    return merged


def run_forced(
    proto: ModelProto, seen: dict[str, list[Seen]], feeds: dict[str, Array], path: Any
) -> Forced:
    """Run a file with the model's own quantized tensors in the place of its own.

    Args:
        proto: the file.
        seen: what the model's quantizers did, see `watch`.
        feeds: the inputs.
        path: for messages.

    Raises:
        QatkitError: the file has a quantizer that the model has not.
    """
    from onnx import helper

    calls = _pairs(proto, seen, path)
    constants = Constants(proto)
    forced = copy.deepcopy(proto)
    given = {dq.output[0]: f"{dq.output[0]}.given" for _, dq, _ in calls}
    for node in forced.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = given.get(name, name)
    for q, dq, call in calls:
        shape = [None] * call.result.ndim
        kind = helper.np_dtype_to_tensor_dtype(constants[dq.input[1]].dtype)
        forced.graph.input.append(helper.make_tensor_value_info(given[dq.output[0]], kind, shape))
        forced.graph.output.append(_expose_codes(forced, q, constants))
    feeds = feeds | {
        given[dq.output[0]]: call.result.astype(constants[dq.input[1]].dtype)
        for _, dq, call in calls
    }
    results = run_onnx(forced, feeds, path)
    own = len(proto.graph.output)
    picked = _selected(forced)
    checks = [
        _selected_check(dq, codes, call)
        if q.input[0] in picked and codes.shape != call.codes.shape
        else dataclasses.replace(
            compare_codes(dq, codes, call.codes, call.scale, constants),
            selected=q.input[0] in picked,
        )
        for (q, dq, call), codes in zip(calls, results[own:], strict=True)
    ]
    return Forced(tuple(checks), results[:own])


def _expose_codes(forced: ModelProto, q: NodeProto, constants: Constants) -> ValueInfoProto:
    """Return the graph output that holds the codes of a Q; those of 4 bits become float32."""
    from onnx import TensorProto, helper, numpy_helper

    zero = constants[q.input[2]]
    if zero.dtype.name not in FOUR_BITS:
        kind = helper.np_dtype_to_tensor_dtype(zero.dtype)
        return helper.make_tensor_value_info(q.output[0], kind, None)
    name, one = f"{q.output[0]}.codes", f"{q.output[0]}.one"
    scale = np.ones(zero.shape, np.float32)
    forced.graph.initializer.append(numpy_helper.from_array(scale, one))
    forced.graph.node.append(
        helper.make_node("DequantizeLinear", [q.output[0], one, q.input[2]], [name], name)
    )
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def _selected(forced: ModelProto) -> set[str]:
    """Return the names of the tensors that depend on a selection by value."""
    names: set[str] = set()
    for node in forced.graph.node:
        if node.op_type in _SELECTING or not names.isdisjoint(node.input):
            names.update(node.output)
    return names


def _selected_check(dq: NodeProto, codes: Array, call: Seen) -> QuantizerCheck:
    """Return the check of a tensor that has another number of elements in the file."""
    size = int(call.codes.size)
    return QuantizerCheck(dq.name.removesuffix(SUFFIX_DQ), size, size, 0, selected=True)


def selects(proto: ModelProto) -> bool:
    """Tell whether a file picks elements by value, so that a last bit can change its outputs."""
    return any(node.op_type in _SELECTING for node in proto.graph.node)


def call_of(dq: NodeProto, seen: dict[str, list[Seen]], path: Any) -> Seen:
    """Return the call of the model's quantizer that a DequantizeLinear belongs to.

    Raises:
        QatkitError: there is none.
    """
    name, index = quantizer_of(dq)
    calls = seen.get(name, [])
    if index >= len(calls):
        raise QatkitError(
            f"{path}: its quantizer {name!r} is not in the model; "
            "verify with the model it was exported from"
        )
    return calls[index]


def quantizer_of(dq: NodeProto) -> tuple[str, int]:
    """Return the name of the quantizer that a DequantizeLinear belongs to, and which call it is."""
    name, _, number = dq.name.removesuffix(SUFFIX_DQ).partition("#")
    return split_rows(name)[0], int(number or 0)


def _pairs(
    proto: ModelProto, seen: dict[str, list[Seen]], path: Any
) -> list[tuple[NodeProto, NodeProto, Seen]]:
    """Return each Q of an activation, its DQ, and the call of the model's quantizer."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    readers = {
        node.input[0]: node for node in proto.graph.node if node.op_type == "DequantizeLinear"
    }
    pairs = []
    for node in proto.graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] in constants:
            continue
        dq = readers[node.output[0]]
        pairs.append((node, dq, call_of(dq, seen, path)))
    return pairs
