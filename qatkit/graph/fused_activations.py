"""Activations that can do the work of the quantizer behind them.

Where one layer alone reads the result of a ReLU, clipping at 0 (and 6) and clipping at the ends of
the grid are one clip: a training step then saves a pass forward and one backward. What is computed
does not change, so this is only about speed (`qatkit.nn.fused_activation`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from qatkit.graph.capture import Capture, Value
from qatkit.graph.plan import FusedActivation, LayerPlan, QuantizerPlan, join_path
from qatkit.graph.structure import flatten
from qatkit.plain_numbers import knows_activation


def find_fused_activations(
    capture: Capture,
    layers: Iterable[LayerPlan],
    quantizers: Iterable[QuantizerPlan],
    values: Mapping[str, tuple[Value, ...]],
    groups: Iterable[tuple[str, ...]],
) -> tuple[FusedActivation, ...]:
    """Return the activations whose one reader is a layer with a quantizer of its own.

    Args:
        capture: the recorded run.
        layers: the layers of the plan.
        quantizers: the quantizers of the plan.
        values: what each activation quantizer reads, by path.
        groups: quantizers that share a scale; they are left alone.
    """
    plain = {layer.path for layer in layers if not layer.input_is_quantized}
    shared = {path for group in groups for path in group}
    returned = set(map(id, flatten(capture.outputs, Value)[1]))
    calls = Counter(call.name for call in capture.operators if call.module is not None)
    found = []
    for plan in quantizers:
        layer = plan.path.rpartition(".")[0]
        read = values.get(plan.path, ())
        if len(read) != 1 or plan.aliases or plan.path in shared or layer not in plain:
            continue
        producer = read[0].producer
        if (
            producer is None
            or type(producer.module) not in (nn.ReLU, nn.ReLU6)
            or calls[producer.name] > 1
            or any(value.consumers != [producer] for value in producer.writes)
            or id(read[0]) in returned
        ):
            continue
        readers = read[0].consumers
        owns = plan.path == join_path(layer, "input_quantizer")
        alone = [call.name for call in readers] == [layer] and calls[layer] == 1
        if owns and alone and knows_activation(plan.spec):
            found.append(FusedActivation(producer.name, plan.path))
    return tuple(found)
