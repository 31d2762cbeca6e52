"""`bit_sensitivity`: what each layer loses at each bit width, alone in an else float model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qatkit.analysis.output_error import Reference
from qatkit.analysis.parts import Part, parts_of
from qatkit.analysis.probing import Probe, probing
from qatkit.errors import QatkitError
from qatkit.graph.plan import table
from qatkit.nn.weights import weights_of
from qatkit.prepare import weight_quantizers
from qatkit.progress import progress_bar
from qatkit.spec import QuantSpec

BitMetric = Literal["noise", "kl"] | Callable[[nn.Module, list[Any]], float]

_VERB = "bit_sensitivity"
_FLOAT_BITS = 32


@dataclass(frozen=True)
class LayerBits:
    """One layer.

    Attributes:
        part: the layer with its quantizers.
        weights: how many weights it has.
        macs: multiply-accumulate operations of the module for one sample; 0 for a function that
            multiplies with a parameter of its block, which a budget of BOPs then does not count.
        input_bits: width of its input, 32 where that is float.
        costs: pairs (bits, what the model loses), by rising bits.
    """

    part: Part
    weights: int
    macs: float
    input_bits: int
    costs: tuple[tuple[int, float], ...]

    @property
    def name(self) -> str:
        """Path of the layer."""
        return self.part.name


@dataclass(frozen=True)
class BitSensitivity:
    """What each layer loses at each bit width; print it.

    Attributes:
        metric: what ``costs`` are: ``"noise"``, ``"kl"`` or the name of a function.
        activations: whether the inputs of a layer had the width too, or its weights alone.
        layers: one entry for each layer with weights, in the order of the modules.
    """

    metric: str
    activations: bool
    layers: tuple[LayerBits, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> BitSensitivity:
        """Rebuild a table from `to_dict`, also after a trip through JSON."""
        layers = []
        for layer in fields["layers"]:
            part = dict(layer["part"])
            part |= {name: tuple(part[name]) for name in ("quantizers", "weights", "shared")}
            costs = tuple((int(bits), float(cost)) for bits, cost in layer["costs"])
            layers.append(LayerBits(**{**layer, "part": Part(**part), "costs": costs}))
        return cls(fields["metric"], fields["activations"], tuple(layers))

    def __str__(self) -> str:
        """Return a table with a line for each layer."""
        widths = sorted({bits for layer in self.layers for bits, _ in layer.costs})
        what = "weights and inputs" if self.activations else "weights"
        head = f"{len(self.layers)} layers, {self.metric} with the {what} of one alone quantized"
        rows: list[tuple[str, ...]] = [
            ("layer", "weights", "MACs", *(f"{bits} bits" for bits in widths))
        ]
        for layer in self.layers:
            costs = dict(layer.costs)
            cells = (f"{costs[b]:.4g}" if b in costs else "-" for b in widths)
            rows.append((layer.name, str(layer.weights), f"{layer.macs:.4g}", *cells))
        return "\n".join([head, "", *table(rows)])


def bit_sensitivity(
    model: nn.Module,
    data: Iterable[Any],
    bits: Sequence[int] = (2, 3, 4, 5, 6, 8),
    *,
    metric: BitMetric = "noise",
    activations: bool = False,
    batches: int | None = None,
    class_axis: int = 1,
    progress: bool = True,
) -> BitSensitivity:
    """Measure what the model loses with one layer quantized at each width and all others in float.

    Losses of this kind add up nearly, as long as they are small; `allocate_bits` adds them. Ranges
    of activations stay those of the calibration, weights have their own at each width.

    Everything is afterwards as before, also after an error.

    Args:
        model: a prepared and calibrated model.
        data: yields batches, as for `qatkit.calibrate`; they are kept in memory.
        bits: the widths to try, 2..16.
        metric: ``"noise"``: energy of the output error over that of the output; ``"kl"``:
            divergence of the softmax of the outputs; or a function of the model and the list of
            batches that returns a score, the higher the better: the cost is what the float model
            scores more, so that minus a loss gives the perturbation of the loss.
        activations: give the inputs of a layer the width too, not its weights alone.
        batches: use only so many; ``None`` for all.
        class_axis: the axis of the outputs that runs over classes, for the divergence.
        progress: show a progress bar if tqdm is installed and the output is a terminal.

    Returns:
        a frozen `BitSensitivity`, with the sizes of the layers.

    Raises:
        QatkitError: as for `qatkit.sensitivity`, or a width is no integer from 2 to 16.

    >>> import torch
    >>> from qatkit.nn import QuantLinear
    >>> net = nn.Sequential(QuantLinear(4, 4), QuantLinear(4, 2))
    >>> data = [torch.randn(8, 4)]
    >>> _ = net(data[0])  # ranges; or qatkit.calibrate
    >>> [(layer.weights, layer.macs) for layer in bit_sensitivity(net, data, (4, 8)).layers]
    [(16, 16.0), (8, 8.0)]
    """
    widths = _checked_widths(bits)
    if not callable(metric) and metric not in ("noise", "kl"):
        raise QatkitError(
            f"{_VERB}(metric={metric!r}): give 'noise', 'kl' or a function of (model, batches) "
            "that returns a number"
        )
    sizes = {weight.path: weight.seen.numel() for weight in weights_of(model)}
    parts = [part for part in parts_of(model, _VERB) if any(path in sizes for path in part.weights)]
    if not parts:
        raise QatkitError(f"{_VERB}: no layer of the model has quantized weights; prepare it")
    weights = set(weight_quantizers(model))
    with probing(model, data, batches, _VERB) as probe:
        with probe.only(()):
            with _counting(model) as counter:
                outputs = probe.outputs()
            reference = None if callable(metric) else Reference(outputs, class_axis, _VERB)
            score = probe.score(metric) if callable(metric) else 0.0
            if reference is not None and metric == "kl" and reference.error(outputs).kl is None:
                raise QatkitError(
                    f"{_VERB}(metric='kl'): no output has several classes along class_axis="
                    f"{class_axis}; give that axis, or metric='noise'"
                )
            macs = _macs(counter, model, probe.samples)
        layers = []
        for part in progress_bar(parts, _VERB, "layer", progress):
            chosen = part.quantizers if activations else part.weights
            costs = []
            for width in widths:
                with probe.only(chosen), probe.at_width(chosen, width):
                    costs.append((width, _cost(probe, reference, metric, score)))
            inputs = [
                probe.on[path].spec.num_bits for path in part.quantizers if path not in weights
            ]
            layers.append(
                LayerBits(
                    part,
                    sum(sizes.get(path, 0) for path in part.weights),
                    macs.get(part.name, 0.0),
                    max(inputs, default=_FLOAT_BITS),
                    tuple(costs),
                )
            )
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")
    return BitSensitivity(name, activations, tuple(layers))


def _cost(
    probe: Probe, reference: Reference | None, metric: BitMetric, float_score: float
) -> float:
    """Return what the model loses as it is switched; NaN counts as an infinite loss."""
    if callable(metric):
        cost = float_score - probe.score(metric)
    else:
        assert reference is not None
        error = reference.error(probe.outputs())
        cost = error.noise if metric == "noise" else math.inf if error.kl is None else error.kl
    return math.inf if math.isnan(cost) else cost


@contextmanager
def _counting(model: nn.Module) -> Iterator[FlopCounterMode]:
    with FlopCounterMode(display=False) as counter:
        yield counter


def _macs(counter: FlopCounterMode, model: nn.Module, samples: int) -> dict[str, float]:
    """Return the multiply-accumulate operations of each module for one sample."""
    root = type(model).__name__
    found = {}
    for name, counts in counter.get_flop_counts().items():
        if name == root or name.startswith(f"{root}."):
            found[name[len(root) + 1 :]] = sum(counts.values()) / 2 / max(1, samples)
    return found


def _checked_widths(bits: Sequence[int]) -> tuple[int, ...]:
    given = list(bits) if isinstance(bits, Iterable) and not isinstance(bits, str) else []
    if not given:
        raise QatkitError(f"{_VERB}(bits={bits!r}): give widths, for example (2, 4, 8)")
    for width in given:
        QuantSpec(num_bits=width)
    return tuple(sorted(set(given)))
