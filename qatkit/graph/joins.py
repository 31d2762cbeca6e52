"""Rules F6, F7 and F11: additions, gates and pools, which run in INT8 between quantizers."""

from __future__ import annotations

from qatkit.graph.capture import Call, Value
from qatkit.graph.reach import reaches_quantizer
from qatkit.graph.readers import Reading, function_path
from qatkit.graph.residual import Join, branch_end, is_join, place_join


def read_joins(reading: Reading) -> None:
    """F6: the skip input of every residual addition."""
    for call in reading.capture.operators:
        if not is_join(call):
            continue
        join = place_join(call, reading.quantized, reading.backend)
        if join.quantized and not _near_int8(reading, call, join):
            join = Join((), "F6: neither its operands nor its result get to an INT8 operator")
        if not join.quantized and len(call.inputs[0].shape) > 2:  # boxes and anchors are 2-D
            reading.skip(function_path(call), join.reason)
        for value in join.quantized:
            reading.read_by_function(call, value, join.reason)


def _near_int8(reading: Reading, call: Call, join: Join) -> bool:
    """Tell whether there is INT8 around an addition: else its operands can be of any precision."""
    ends = [branch_end(value, reading.quantized) for value in join.quantized]
    return any(ends) or any(
        reaches_quantizer(reading, value) for value in (*call.results, *join.quantized)
    )


def read_gates(reading: Reading) -> None:
    """F11: both inputs of a product that weighs the channels, as in squeeze-excitation."""
    for call in reversed(reading.capture.operators):
        if not _is_gate(call):
            continue
        if any(reading.is_read(value) for value in call.results):
            for value in call.inputs:
                reading.read_by_function(call, value, "F11: gate in front of a quantized layer")
        else:
            reading.skip(function_path(call), "F11: gate without a quantized layer behind it")


def read_pools(reading: Reading) -> None:
    """F7: the input of an average pool whose result is quantized again."""
    for call in reversed(reading.capture.operators):
        if not _is_pool(reading, call):
            continue
        if (call, call.inputs[0]) in reading.reads:
            continue
        if any(reading.is_read(value) for value in call.results):
            reason = f"F7: {call.kind} between quantized layers"
            reading.read_by_call(call, call.inputs[0], reason)
        else:
            where = function_path(call)
            reading.skip(where, f"F7: {call.kind} without a quantized layer behind it")


def _is_pool(reading: Reading, call: Call) -> bool:
    if call.kind not in reading.backend.needs_quantized_output or not call.inputs:
        return False
    before, after = call.inputs[0].shape, call.results[0].shape
    if any(size > length for length, size in zip(before, after, strict=False)):
        return False  # an adaptive pool to more than there is: copies, no average
    return call.kind != "ReduceMean" or (len(before) == 4 and _spatial_mean(before, after))


def _spatial_mean(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    return after in (before[:2], (*before[:2], 1, 1))


def _is_gate(call: Call) -> bool:
    """Tell whether a call multiplies a tensor by one number for each channel."""
    if call.kind != "Mul" or len(call.inputs) != 2 or any(v.constant for v in call.inputs):
        return False
    return any(_weighs(one, other) for one, other in (call.inputs, call.inputs[::-1]))


def _weighs(gate: Value, data: Value) -> bool:
    """Tell whether ``gate`` is (N, C, 1, ...) from an activation and ``data`` (N, C, ...)."""
    made = gate.producer is not None and gate.producer.kind == "Activation"
    same_rank = len(gate.shape) == len(data.shape) >= 3
    ones = all(size == 1 for size in gate.shape[2:])
    fits = same_rank and ones and gate.shape[:2] == data.shape[:2]
    return made and fits and gate.shape != data.shape
