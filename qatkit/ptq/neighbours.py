"""Which layer's result goes straight into which other layer, through what keeps channels apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qatkit.copying import deepcopy
from qatkit.graph.capture import Call, Value, capture
from qatkit.graph.kinds import module_name
from qatkit.modes import disable_quantization
from qatkit.nn.quantized import QuantizedWeight
from qatkit.ptq.norms import norms_of
from qatkit.ptq.runs import Runs
from qatkit.quantizer import TensorQuantizer

_CHANNELWISE = frozenset({"Identity", "MaxPool", "AveragePool"})
_HOMOGENEOUS = frozenset({"relu", "leaky_relu", "prelu"})
_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm"})


@dataclass(frozen=True, eq=False)
class Pair:
    """Two layers, the second of which alone reads the result of the first.

    Attributes:
        first: path of the layer that makes the tensor.
        second: path of the layer that reads it.
        relu6: paths of the layers of ReLU6 between, an empty path for a function.
        activations: names of the activations between, in order.
        quantizers: paths of the quantizers between.
    """

    first: str
    second: str
    relu6: tuple[str, ...]
    activations: tuple[str, ...]
    quantizers: tuple[str, ...]

    def __str__(self) -> str:
        """Name both."""
        return f"{self.first} -> {self.second}"


def find_pairs(runs: Runs) -> list[Pair]:
    """Return all such pairs in the order of execution, from one run on the first batch.

    Between the two layers may be the batch norm that belongs to the first, pooling without padding
    values, dropout, and ReLU, ReLU6, LeakyReLU or PReLU. Both layers run once.
    """
    found = capture(silent_twin(runs.model), runs.data()[0])
    layers = {p: m for p, m in runs.model.named_modules() if isinstance(m, QuantizedWeight)}
    owners = [(call, _owner(call, layers)) for call in found.operators if call.kind in _LAYERS]
    times: dict[str, int] = {}
    for _, owner in owners:
        times[owner] = times.get(owner, 0) + 1
    readers = {call: owner for call, owner in owners if owner and times[owner] == 1}
    returned = set(found.root.results)
    paths = {id(module): path for path, module in runs.model.named_modules()}
    norms = norms_of(runs.model)
    pairs = []
    for call, owner in readers.items():
        norm = norms.get(layers[owner])
        if norm is not None and norm.weight is None:
            continue  # nothing takes the division
        pair = _follow(call, owner, paths.get(id(norm)), readers, returned)
        if pair is not None:
            pairs.append(pair)
    return pairs


def _follow(
    call: Call,
    first: str,
    norm: str | None,
    readers: dict[Call, str],
    returned: set[Value],
) -> Pair | None:
    """Go from a layer to the next one, ``None`` if something between mixes channels or branches."""
    relu6: list[str] = []
    names: list[str] = []
    quantizers: list[str] = []
    value = call.results[0]
    while True:
        following = value.consumers
        if value in returned or len(following) != 1:
            return None
        call = following[0]
        if call in readers and value is call.inputs[0]:
            if norm is not None:
                return None
            return Pair(first, readers[call], tuple(relu6), tuple(names), tuple(quantizers))
        if value is not call.data[0] or len(call.results) != 1 or call.writes[1:]:
            return None
        name = _function(call)
        if call.kind == "BatchNormalization":
            if norm is None or norm not in _paths_around(call):
                return None
            norm = None
        elif isinstance(call.module, TensorQuantizer):
            quantizers.append(call.name)
        elif name == "relu6" or name == "hardtanh":
            if name == "hardtanh" and not _is_relu6(call):
                return None
            relu6.append(call.name if call.module is not None else "")
            names.append("relu6")
        elif name in _HOMOGENEOUS:
            names.append(name)
        elif call.kind not in _CHANNELWISE or call.results[0].shape[:2] != value.shape[:2]:
            return None
        value = call.results[0]


def _is_relu6(call: Call) -> bool:
    """Tell whether a hard tanh, which ReLU6 is made of, is one."""
    module: Any = call.module
    return module is not None and (module.min_val, module.max_val) == (0.0, 6.0)


def _function(call: Call) -> str:
    """Return the name of what a call computes."""
    return call.name if call.module is None else module_name(call.module)


def _paths_around(call: Call) -> set[str]:
    own = {call.name} if call.module is not None else set()
    return own | {around.name for around in call.ancestors()}


def _owner(call: Call, layers: dict[str, QuantizedWeight]) -> str:
    """Return the path of the quantized layer that computes a call, empty for none."""
    if call.parent is not None and call.parent.name in layers:
        return call.parent.name
    return call.name if call.module is not None and call.name in layers else ""


def silent_twin(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose quantizers hand everything through."""
    twin = deepcopy(model)
    disable_quantization(twin).apply()
    for module in twin.modules():
        if isinstance(module, TensorQuantizer):
            module.observe = "never"
    return twin


def times_inputs(layer: QuantizedWeight, weight: Tensor, factor: Tensor) -> Tensor:
    """Return ``weight`` with the part that reads input channel i multiplied by ``factor[i]``."""
    groups = int(getattr(layer, "groups", 1))
    if layer.output_axis == 0:  # (groups * out, in, ...)
        view = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        return (view * factor.reshape(groups, 1, -1, 1)).reshape(weight.shape)
    return weight * factor.reshape(-1, *[1] * (weight.dim() - 1))  # transposed: (in, out, ...)


def largest_of_inputs(layer: QuantizedWeight, weight: Tensor) -> Tensor:
    """Return the largest magnitude in ``weight`` of what reads each input channel."""
    groups = int(getattr(layer, "groups", 1))
    if layer.output_axis == 0:
        view = weight.abs().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        return view.amax((1, 3)).flatten()
    return weight.abs().flatten(1).amax(1)


def largest_of_outputs(layer: QuantizedWeight, weight: Tensor) -> Tensor:
    """Return the largest magnitude in ``weight`` of what makes each output channel."""
    if layer.output_axis == 0:
        return weight.abs().flatten(1).amax(1)
    groups = int(getattr(layer, "groups", 1))
    view = weight.abs().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return view.amax((1, 3)).flatten()


def on_inputs(layer: QuantizedWeight, weight: Tensor, x: Tensor) -> Tensor:
    """Return what the layer makes of an input that is ``x`` (C_in,) everywhere, per output channel.

    The kernel is summed, borders are left out of account.
    """
    groups = int(getattr(layer, "groups", 1))
    if layer.output_axis == 0:
        view = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).sum(3)
        return (view @ x.reshape(groups, -1, 1)).flatten()
    view = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).sum(3)
    return (x.reshape(groups, 1, -1) @ view).flatten()
