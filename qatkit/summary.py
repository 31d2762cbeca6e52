"""`summary`: what is quantized in a model, and the state that each quantizer is in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from qatkit.graph.plan import table
from qatkit.modes import quantizers, require_module
from qatkit.nn.batchnorm import batch_norms, statistics_are_frozen
from qatkit.nn.weights import weights_of
from qatkit.prepare import weight_quantizers
from qatkit.quantizer import TensorQuantizer


@dataclass(frozen=True)
class QuantizerSummary:
    """One quantizer.

    Attributes:
        path: where it is registered.
        aliases: under how many other paths it stands.
        role: ``"weight"`` or ``"activation"``.
        bits: width of a code.
        observer: name of the observer.
        axis: the axis with one scale for each index, ``None`` for one scale.
        enabled: whether it quantizes.
        frozen: whether no forward changes its range.
        calibrated: whether it has a range; a weight that is not frozen needs none.
        min: smallest lower end of its ranges, ``None`` without a range.
        max: largest upper end.
        scale: largest scale.
    """

    path: str
    aliases: int
    role: str
    bits: int
    observer: str
    axis: int | None
    enabled: bool
    frozen: bool
    calibrated: bool
    min: float | None
    max: float | None
    scale: float | None

    @property
    def state(self) -> str:
        """The state in words."""
        words = ["on" if self.enabled else "off"]
        words += ["frozen"] if self.frozen else []
        words += [] if self.calibrated else ["uncalibrated"]
        return ", ".join(words)


@dataclass(frozen=True)
class Fold:
    """A batch norm that is folded into the weight that the quantizer sees.

    Attributes:
        layer: path of the layer.
        batch_norm: path of the batch norm, ``None`` if it is not inside this model.
        frozen: whether its statistics are frozen.
    """

    layer: str
    batch_norm: str | None
    frozen: bool


@dataclass(frozen=True)
class Summary:
    """All quantizers of a model; print it.

    Attributes:
        model: name of the model's class.
        quantizers: one entry for each quantizer.
        folds: one entry for each layer with a batch norm folded in.
        batch_norms: how many batch norms with running statistics there are.
        frozen_batch_norms: how many of them are frozen.
    """

    model: str
    quantizers: tuple[QuantizerSummary, ...]
    folds: tuple[Fold, ...]
    batch_norms: int
    frozen_batch_norms: int

    def __str__(self) -> str:
        """Return the totals, and a table with a line for each quantizer."""
        norms = f"{self.frozen_batch_norms} of {self.batch_norms} batch norms frozen"
        if not self.quantizers:
            return (
                f"{self.model}: no quantizers, {norms}; "
                "qatkit.prepare(model, example_inputs) puts quantizers in"
            )
        weights = sum(q.role == "weight" for q in self.quantizers)
        head = (
            f"{self.model}: {weights} weight and {len(self.quantizers) - weights} activation "
            f"quantizers, {sum(not q.enabled for q in self.quantizers)} off, "
            f"{sum(q.frozen for q in self.quantizers)} frozen, "
            f"{sum(not q.calibrated for q in self.quantizers)} uncalibrated; "
            f"{len(self.folds)} batch norms folded, {norms}"
        )
        names = ("quantizer", "shared", "bits", "observer", "state", "min", "max", "scale")
        columns = (*names, "batch norm")
        folds = {f"{fold.layer}.weight_quantizer".lstrip("."): fold for fold in self.folds}
        rows = [_row(q, folds.get(q.path)) for q in self.quantizers]
        return "\n".join([head, "", *table([columns, *rows])])


def summary(model: nn.Module) -> Summary:
    """Return the quantizers of a model and their states; nothing is changed.

    Args:
        model: any model; a float model gives an empty summary that says how to prepare it.

    Returns:
        a frozen `Summary`; print it.

    Raises:
        QatkitError: the model is not a ``torch.nn.Module``.

    >>> from qatkit.nn import QuantLinear
    >>> print(summary(nn.Sequential(QuantLinear(2, 2))))
    Sequential: 1 weight and 1 activation quantizers, 0 off, 0 frozen, 1 uncalibrated; ...
    <BLANKLINE>
    quantizer           shared  bits  observer        state             min  max  scale  batch norm
    0.input_quantizer   -       8     shrink          on, uncalibrated  -    -    -      -
    0.weight_quantizer  -       8     minmax, axis 0  on                -    -    -      -
    """
    require_module(model, "summary")
    found = list(weights_of(model))
    weights = {id(each) for each in weight_quantizers(model).values()}
    times: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        times[id(module)] = times.get(id(module), 0) + 1
    entries = tuple(
        _summarize(
            path, each, times[id(each)] - 1, "weight" if id(each) in weights else "activation"
        )
        for path, each in quantizers(model)
    )
    paths = {id(module): path for path, module in model.named_modules()}
    folds = tuple(
        Fold(paths[id(weight.owner)], paths.get(id(norm)), statistics_are_frozen(norm))
        for weight in found
        if weight.layer is not None and (norm := weight.layer.batch_norm) is not None
    )
    norms = [norm for _, norm in batch_norms(model)]
    frozen = sum(statistics_are_frozen(norm) for norm in norms)
    return Summary(type(model).__name__, entries, folds, len(norms), frozen)


def _summarize(path: str, quantizer: TensorQuantizer, aliases: int, role: str) -> QuantizerSummary:
    spec = quantizer.spec
    frozen = quantizer.observe == "never"
    known = quantizer.has_range
    low, high = quantizer.range
    return QuantizerSummary(
        path=path,
        aliases=aliases,
        role=role,
        bits=spec.num_bits,
        observer=spec.observer,
        axis=spec.axis,
        enabled=quantizer.quantize,
        frozen=frozen,
        calibrated=known or (spec.memory == "latest" and not frozen),
        min=low.min().item() if known else None,
        max=high.max().item() if known else None,
        scale=quantizer.scale.max().item() if known else None,
    )


def _row(entry: QuantizerSummary, fold: Fold | None) -> tuple[str, ...]:
    observer = entry.observer if entry.axis is None else f"{entry.observer}, axis {entry.axis}"
    shared = f"x{entry.aliases + 1}" if entry.aliases else "-"
    numbers = (entry.min, entry.max, entry.scale)
    cells = ("-" if number is None else f"{number:.4g}" for number in numbers)
    norm = "-" if fold is None else (fold.batch_norm or "outside") + ", frozen" * fold.frozen
    return (entry.path, shared, str(entry.bits), observer, entry.state, *cells, norm)
