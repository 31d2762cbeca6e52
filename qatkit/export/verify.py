"""`verify_onnx`: does ONNX Runtime compute, from the file, the integers that the model computes?"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from qatkit.errors import MissingExtraError, QatkitError, shorten
from qatkit.export.inputs import to_cpu_float32
from qatkit.export.lowering import folded_layers
from qatkit.export.qdq import SUFFIX_DQ, SUFFIX_Q
from qatkit.graph.capture import split_inputs
from qatkit.graph.structure import tensors
from qatkit.modes import quantizers, require_module
from qatkit.quantizer import TensorQuantizer

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

MAX_SHARE = 1e-5
MAX_STEP = 1

Array = Any


@dataclass(frozen=True)
class QuantizerCheck:
    """One quantizer, computed by both from the same inputs.

    Attributes:
        name: path of the quantizer.
        codes: how many integers were compared.
        differing: how many differ.
        largest_step: the largest difference.
    """

    name: str
    codes: int
    differing: int
    largest_step: int


@dataclass(frozen=True)
class VerifyReport:
    """How far the file and the model agree.

    Attributes:
        quantizers: activations and weights, each computed by both from the same inputs.
        outputs: number of output values compared, each computed from the model's inputs alone.
        max_difference: largest difference of an output.
        relative_difference: root of the mean squared difference over that of the output.
        top1_agreement: share of equal arg-max along the last axis of the first output.
    """

    quantizers: tuple[QuantizerCheck, ...]
    outputs: int
    max_difference: float
    relative_difference: float
    top1_agreement: float

    @property
    def codes(self) -> int:
        """Number of integers compared."""
        return sum(check.codes for check in self.quantizers)

    @property
    def differing(self) -> int:
        """Number of integers that differ."""
        return sum(check.differing for check in self.quantizers)

    @property
    def largest_step(self) -> int:
        """Largest difference of an integer."""
        return max((check.largest_step for check in self.quantizers), default=0)

    @property
    def ok(self) -> bool:
        """At most 1 integer in 100,000 differs, by one step: so much the order of sums explains."""
        return self.differing <= self.codes * MAX_SHARE and self.largest_step <= MAX_STEP

    def __str__(self) -> str:
        """Return the verdict and the worst quantizers."""
        verdict = "verified" if self.ok else "NOT VERIFIED"
        lines = [
            f"{verdict}: {self.differing} of {self.codes} codes differ, "
            f"by at most {self.largest_step} step; "
            f"outputs differ by at most {self.max_difference:.3g} "
            f"(relative {self.relative_difference:.2g}), "
            f"top-1 equal for {100 * self.top1_agreement:.2f} %"
        ]
        if not self.ok:
            worst = sorted(self.quantizers, key=lambda check: -check.differing)[:5]
            lines += [
                f"  {check.name}: {check.differing} of {check.codes}, step {check.largest_step}"
                for check in worst
            ]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class _Seen:
    """What one call of a quantizer got and gave in the model."""

    source: Tensor
    result: Array
    codes: Array


def verify_onnx(path: str | os.PathLike[str], model: nn.Module, inputs: Any) -> VerifyReport:
    """Compare a file written by `export_onnx` with the model, in ONNX Runtime.

    Graph optimizations are off. Each quantizer is compared by itself: ONNX Runtime gets the model's
    own quantized tensors as the inputs of every layer (teacher forcing), so that one rounding does
    not spread. Then both run end to end.

    Args:
        path: the file.
        model: the prepared model that it was written from.
        inputs: what the model runs on, as for `qatkit.prepare`.

    Returns:
        a `VerifyReport`; print it, or ask for its ``ok``.

    Raises:
        MissingExtraError: onnx or onnxruntime is not installed.
        QatkitError: the file cannot be read, does not run, or was not written from this model.
    """
    require_module(model, "verify_onnx")
    proto = _load(path)
    clone = copy.deepcopy(model).eval().float().cpu()
    args, kwargs = split_inputs(inputs)
    args, kwargs = to_cpu_float32(args), to_cpu_float32(kwargs)
    with torch.no_grad(), _watch(clone) as seen, _one_line_errors(model):
        outputs = tensors(clone(*args, **kwargs))
    feeds = _feeds(proto, tensors((args, kwargs)), path)
    checks = [*_activations(proto, seen, feeds, path), *_weights(proto, clone)]
    end_to_end = _run(proto, feeds, path)
    return _report(checks, outputs, end_to_end)


@contextmanager
def _one_line_errors(model: nn.Module) -> Iterator[None]:
    """Say in one line that the inputs are wrong."""
    try:
        yield
    except QatkitError:
        raise
    except Exception as error:
        raise QatkitError(
            f"{type(model).__name__}: does not run on the inputs ({shorten(str(error))}); "
            "give what it was prepared with"
        ) from None


@contextmanager
def _watch(model: nn.Module) -> Iterator[dict[str, list[_Seen]]]:
    """Collect what each activation quantizer does, in order of its calls."""
    seen: dict[str, list[_Seen]] = {}
    handles = []

    def hook(quantizer: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        assert isinstance(quantizer, TensorQuantizer)
        calls = seen.setdefault(quantizer.name, [])
        if any(call.source is given[0] for call in calls):
            return
        codes = torch.round(result / quantizer.scale).to(torch.int32)
        calls.append(_Seen(given[0], result.numpy(), codes.numpy()))

    for path, quantizer in quantizers(model):
        quantizer.name = quantizer.name or path
        if quantizer.quantize and not quantizer.spec.per_channel:
            handles.append(quantizer.register_forward_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _activations(
    proto: ModelProto, seen: dict[str, list[_Seen]], feeds: dict[str, Array], path: Any
) -> list[QuantizerCheck]:
    """Feed the model's own quantized tensors to every layer and compare the codes of every Q."""
    from onnx import TensorProto, helper

    constants = {tensor.name for tensor in proto.graph.initializer}
    pairs: list[tuple[NodeProto, NodeProto, _Seen]] = []
    readers = {
        node.input[0]: node for node in proto.graph.node if node.op_type == "DequantizeLinear"
    }
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
    forced = copy.deepcopy(proto)
    given = {dq.output[0]: f"{dq.output[0]}.given" for _, dq, _ in pairs}
    for node in forced.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = given.get(name, name)
    del forced.graph.output[:]
    for q, dq, call in pairs:
        shape = [None] * call.result.ndim
        forced.graph.input.append(
            helper.make_tensor_value_info(given[dq.output[0]], TensorProto.FLOAT, shape)
        )
        forced.graph.output.append(
            helper.make_tensor_value_info(q.output[0], TensorProto.INT8, None)
        )
    feeds = feeds | {given[dq.output[0]]: call.result for _, dq, call in pairs}
    results = _run(forced, feeds, path) if pairs else []
    return [
        _compare(q.name.removesuffix(SUFFIX_Q), call.codes, codes)
        for (q, _, call), codes in zip(pairs, results, strict=True)
    ]


def _weights(proto: ModelProto, model: nn.Module) -> list[QuantizerCheck]:
    """Compare the codes that an engine gets from each weight with the model's."""
    from onnx import numpy_helper

    arrays = {tensor.name: tensor for tensor in proto.graph.initializer}
    expected = {f"{path}.weight_quantizer": layer for path, layer in folded_layers(model).items()}
    made_by = {node.output[0]: node for node in proto.graph.node}
    checks = []
    for node in proto.graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        name = node.name.removesuffix(SUFFIX_DQ).partition("#")[0]
        if name not in expected or expected[name].codes is None:
            continue
        codes_of = expected[name].codes
        assert codes_of is not None
        source = made_by.get(node.input[0])
        codes = (
            numpy_helper.to_array(arrays[node.input[0]])
            if source is None
            else _quantize(source, arrays)
        )
        wanted = codes_of.numpy()
        if any(_reads_transposed(reader, node.output[0]) for reader in proto.graph.node):
            wanted = wanted.T
        checks.append(_compare(name, wanted, codes))
    return checks


def _reads_transposed(reader: NodeProto, weight: str) -> bool:
    """Tell whether a node reads ``weight`` as (C_in, C_out), the other way than a linear layer."""
    if weight not in reader.input:
        return False
    swapped = any(attribute.name == "transB" and attribute.i for attribute in reader.attribute)
    return reader.op_type == "MatMul" or (reader.op_type == "Gemm" and not swapped)


def _quantize(node: NodeProto, arrays: dict[str, Any]) -> Array:
    """Do what QuantizeLinear does to a constant."""
    from onnx import numpy_helper

    data, scale = (numpy_helper.to_array(arrays[name]) for name in node.input[:2])
    axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
    if scale.ndim:
        scale = scale.reshape([-1 if d == axis % data.ndim else 1 for d in range(data.ndim)])
    return np.clip(np.rint(data / scale), -128, 127).astype(np.int8)


def _compare(name: str, expected: Array, found: Array) -> QuantizerCheck:
    if expected.shape != found.shape:
        raise QatkitError(
            f"{name}: is {found.shape} in the file and {expected.shape} in the model; "
            "verify with the model it was exported from"
        )
    step = np.abs(expected.astype(np.int64) - found.astype(np.int64))
    largest = int(step.max()) if step.size else 0
    return QuantizerCheck(name, int(step.size), int(np.count_nonzero(step)), largest)


def _report(
    checks: list[QuantizerCheck], expected: list[Tensor], found: list[Array]
) -> VerifyReport:
    pairs = [
        (a.detach().numpy().astype(np.float64), b) for a, b in zip(expected, found, strict=False)
    ]
    same = [(a, b) for a, b in pairs if a.shape == b.shape and a.size]
    differences = [np.abs(a - b) for a, b in same]
    square = sum(float((d**2).sum()) for d in differences)
    size = sum(float((a**2).sum()) for a, _ in same)
    agreement = 1.0
    if same and same[0][0].ndim > 1:
        agreement = float(np.mean(same[0][0].argmax(-1) == same[0][1].argmax(-1)))
    return VerifyReport(
        quantizers=tuple(checks),
        outputs=sum(a.size for a, _ in same),
        max_difference=max((float(d.max()) for d in differences), default=0.0),
        relative_difference=(square / size) ** 0.5 if size else 0.0,
        top1_agreement=agreement,
    )


def _load(path: Any) -> ModelProto:
    try:
        import onnx
    except ImportError:
        raise MissingExtraError("onnx", "onnx") from None
    try:
        return onnx.load(os.fspath(path))
    except FileNotFoundError:
        raise QatkitError(f"{path}: no such file; export the model first") from None
    except Exception as error:
        raise QatkitError(
            f"{path}: is no ONNX file ({shorten(str(error))}); export the model again"
        ) from None


def _feeds(proto: ModelProto, given: list[Tensor], path: Any) -> dict[str, Array]:
    constants = {tensor.name for tensor in proto.graph.initializer}
    names = [value.name for value in proto.graph.input if value.name not in constants]
    if len(names) != len(given):
        raise QatkitError(
            f"{path}: takes {len(names)} tensors and inputs hold {len(given)}; "
            "give the inputs it was exported with"
        )
    return {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)}


def _run(proto: ModelProto, feeds: dict[str, Array], path: Any) -> list[Array]:
    """Run a model in ONNX Runtime with graph optimizations off."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("onnxruntime", "onnx") from None
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return list(session.run(None, feeds))
    except Exception as error:
        raise QatkitError(
            f"{path}: does not run in ONNX Runtime ({shorten(str(error), 200)}); "
            "run export_onnx(verify=False) and inspect the file"
        ) from None
