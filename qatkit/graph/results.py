"""Rules F20 and F11: results and operands that an engine wants quantized to run in INT8 at all.

Some engines fuse a convolution only when a quantizer stands directly behind it, or behind an
activation that the quantizer makes superfluous: a ReLU in front of codes from 0.
"""

from __future__ import annotations

from collections.abc import Iterator

from qatkit.backend import Backend
from qatkit.graph.capture import Call, Capture, Value
from qatkit.graph.folds import find_folds
from qatkit.graph.kinds import module_name
from qatkit.graph.readers import Reading

_ACTIVATIONS = {
    "relu": "Relu",
    "relu6": "Clip",
    "hardtanh": "Clip",
    "clamp": "Clip",
    "leaky_relu": "LeakyRelu",
    "prelu": "PRelu",
    "elu": "Elu",
    "selu": "Selu",
    "celu": "Celu",
    "sigmoid": "Sigmoid",
    "hardsigmoid": "HardSigmoid",
    "hardswish": "HardSwish",
    "silu": "Swish",
    "gelu": "Gelu",
    "tanh": "Tanh",
    "mish": "Mish",
    "softplus": "Softplus",
}
_FLOAT_INPUTS = frozenset({"softmax", "log_softmax", "softmax2d", "logsoftmax"})

Reads = set[tuple[Call, Value]]
"""Which call reads which value through a quantizer."""


def read_results(reading: Reading) -> None:
    """F20: the result of an operator that runs in INT8 only with a quantizer behind it."""
    for call, value, reason in unread_results(
        reading.capture, reading.quantized, reading.reads, reading.backend
    ):
        reading.read_by_call(call, value, reason)


def read_operands(reading: Reading) -> None:
    """F11: the other operands where the engine wants all of them quantized."""
    for call, value, reason in unread_operands(reading.capture, reading.reads, reading.backend):
        reading.read_by_call(call, value, reason)


def unread_results(
    capture: Capture, quantized: set[Call], reads: Reads, backend: Backend
) -> Iterator[tuple[Call, Value, str]]:
    """Yield the calls that read the result of a quantized operator in float, and what they read.

    A result that leaves the model, or goes to a layer that stays float, is left alone.

    Args:
        capture: the recorded run.
        quantized: the weighted operators whose input and weight are quantized.
        reads: what is quantized so far.
        backend: the engine, for its operators whose result must be quantized.
    """
    if not backend.quantized_results:
        return
    folds = find_folds(capture)
    returned = set(capture.root.results)
    reads = set(reads)
    for call in capture.operators:
        whole = call in quantized or (call.kind in backend.copies and _all_read(call, reads))
        if not whole or call.kind not in backend.quantized_results:
            continue
        result = _behind_activation(_behind_norm(call, folds), backend, returned)
        ends = list(_readers(result, returned))
        readers = [end for end in ends if end is not None]
        if len(readers) < max(len(ends), 1) or _all_pass(readers, reads, backend):
            continue
        if any(_stays_float(reader, value, reads, backend) for reader, value in readers):
            continue
        if call not in quantized and not _worth_it(readers, reads, backend):
            continue
        for reader, value in readers:
            if (reader, value) not in reads:
                reads.add((reader, value))
                yield reader, value, f"F20: result of {call.kind}"


def unread_operands(
    capture: Capture, reads: Reads, backend: Backend
) -> Iterator[tuple[Call, Value, str]]:
    """Yield the calls with a quantized operand, and of each the operand that is float.

    Only where the engine wants all operands quantized, and the result is, too.
    """
    quantized = {value for _, value in reads}
    for call in capture.operators:
        operands = [value for value in dict.fromkeys(call.inputs) if not value.constant]
        if call.kind not in backend.quantized_operands or len(operands) < 2:
            continue
        image = len(call.results[0].shape) == 4
        if (
            image
            and not quantized.isdisjoint(operands)
            and _is_read(call.results[0], quantized, backend)
        ):
            for value in operands:
                if (call, value) not in reads:
                    yield call, value, f"F11: operand of {call.kind} between quantized layers"


def _behind_norm(call: Call, folds: dict[str, str]) -> Value:
    result = call.results[0]
    return result.consumers[0].results[0] if call.name in folds else result


def _behind_activation(value: Value, backend: Backend, returned: set[Value]) -> Value:
    """Return ``value`` behind the activation that fuses."""
    fusing = backend.activations | backend.smooth_activations
    while len(value.consumers) == 1 and value not in returned:
        call = value.consumers[0]
        if _ACTIVATIONS.get(_name(call)) not in fusing:
            break
        value = call.results[0]
    return value


def _readers(value: Value, returned: set[Value]) -> Iterator[tuple[Call, Value] | None]:
    """Yield the readers of a value, seen through identities; ``None`` where it leaves the model."""
    if value in returned:
        yield None
    for call in value.consumers:
        if call.kind == "Identity":
            yield from _readers(call.results[0], returned)
        else:
            yield call, value


def _all_read(call: Call, reads: Reads) -> bool:
    return all((call, value) in reads for value in call.inputs if not value.constant)


def _all_pass(readers: list[tuple[Call, Value]], reads: Reads, backend: Backend) -> bool:
    """Tell whether the one reader only copies, for quantizers that the engine moves before it."""
    call = readers[0][0]
    if len(readers) > 1 or call.kind not in backend.passes_quantizers:
        return False
    behind = [(reader, value) for value in call.results for reader in value.consumers]
    return bool(behind) and reads.issuperset(behind)


def _worth_it(readers: list[tuple[Call, Value]], reads: Reads, backend: Backend) -> bool:
    """Tell whether only such readers of a copy are float as run in INT8 with a quantizer."""
    return all(end in reads or end[0].kind in backend.quantized_results for end in readers)


def _stays_float(call: Call, value: Value, reads: Reads, backend: Backend) -> bool:
    if (call, value) in reads:
        return False
    return call.kind in (*backend.weighted, "ConvTranspose") or _name(call) in _FLOAT_INPUTS


def _is_read(value: Value, quantized: set[Value], backend: Backend) -> bool:
    """Tell whether a quantizer reads ``value``, at once or behind copies and activations."""
    if value in quantized:
        return True
    return any(
        _is_read(result, quantized, backend)
        for call in value.consumers
        if call.kind in (*backend.copies, "Activation")
        for result in call.results
    )


def _name(call: Call) -> str:
    return call.name if call.module is None else module_name(call.module)
