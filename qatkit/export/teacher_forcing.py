"""Teacher forcing: every layer of a file computes from the model's own quantized tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.export.onnx_runtime import Array, run_onnx
from qatkit.export.qdq import SUFFIX_Q
from qatkit.modes import quantizers
from qatkit.quantizer import TensorQuantizer

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_SELECTING = frozenset({"NonMaxSuppression", "NonZero", "TopK", "Unique"})


@dataclass(frozen=True, eq=False)
class Seen:
    """What one call of a quantizer got and gave in the model."""

    source: Tensor
    result: Array
    codes: Array


@dataclass(frozen=True, eq=False)
class Forced:
    """What a file computes under teacher forcing.

    Attributes:
        codes: for each quantizer call its name, the codes of the model, and those of the file.
        outputs: the outputs of the file.
    """

    codes: tuple[tuple[str, Array, Array], ...]
    outputs: list[Array]


@contextmanager
def watch(model: nn.Module) -> Iterator[dict[str, list[Seen]]]:
    """Collect what each activation quantizer does, in order of its calls."""
    seen: dict[str, list[Seen]] = {}
    handles = []

    def hook(quantizer: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        assert isinstance(quantizer, TensorQuantizer)
        calls = seen.setdefault(quantizer.name, [])
        if any(call.source is given[0] for call in calls):
            return
        codes = torch.round(result / quantizer.scale).to(torch.int32)
        calls.append(Seen(given[0], result.numpy(), codes.numpy()))

    for path, quantizer in quantizers(model):
        quantizer.name = quantizer.name or path
        if quantizer.quantize and not quantizer.spec.per_channel:
            handles.append(quantizer.register_forward_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


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
    from onnx import TensorProto, helper

    calls = _pairs(proto, seen, path)
    forced = copy.deepcopy(proto)
    given = {dq.output[0]: f"{dq.output[0]}.given" for _, dq, _ in calls}
    for node in forced.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = given.get(name, name)
    for q, dq, call in calls:
        shape = [None] * call.result.ndim
        forced.graph.input.append(
            helper.make_tensor_value_info(given[dq.output[0]], TensorProto.FLOAT, shape)
        )
        forced.graph.output.append(
            helper.make_tensor_value_info(q.output[0], TensorProto.INT8, None)
        )
    feeds = feeds | {given[dq.output[0]]: call.result for _, dq, call in calls}
    results = run_onnx(forced, feeds, path)
    own = len(proto.graph.output)
    names = [q.name.removesuffix(SUFFIX_Q) for q, _, _ in calls]
    expected = [call.codes for _, _, call in calls]
    return Forced(tuple(zip(names, expected, results[own:], strict=True)), results[:own])


def selects(proto: ModelProto) -> bool:
    """Tell whether a file picks elements by value, so that a last bit can change its outputs."""
    return any(node.op_type in _SELECTING for node in proto.graph.node)


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
        name, _, number = node.name.removesuffix(SUFFIX_Q).partition("#")
        calls = seen.get(name, [])
        index = int(number or 0)
        if index >= len(calls):
            raise QatkitError(
                f"{path}: its quantizer {name!r} is not in the model; "
                "verify with the model it was exported from"
            )
        pairs.append((node, readers[node.output[0]], calls[index]))
    return pairs
