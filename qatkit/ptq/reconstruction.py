"""`reconstruct`: learn how to round the weights, block by block (AdaRound, BRECQ, QDrop)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.nn.weights import Weight
from qatkit.progress import progress_bar
from qatkit.ptq.learned_step import LearnedStep, can_learn
from qatkit.ptq.learned_vector import LearnedVector, vectors_of
from qatkit.ptq.norms import norms_of
from qatkit.ptq.reference import reference_of
from qatkit.ptq.report import Change, PtqReport
from qatkit.ptq.restoring import restoring
from qatkit.ptq.rounding import SoftRounding, StraightRounding, write_codes
from qatkit.ptq.runs import Runs
from qatkit.ptq.samples import Samples, distance, energy, mixed
from qatkit.ptq.units import Granularity, Unit, find_units
from qatkit.ptq.weight_ranges import pin_range
from qatkit.spec import suggest

Rounding = Literal["adaround", "adaquant"]
ROUNDINGS: Mapping[str, type[SoftRounding | StraightRounding]] = {
    "adaround": SoftRounding,
    "adaquant": StraightRounding,
}

_STEP_LR = 3e-3
"""Learning rate of the logarithm of the step of an activation."""
_VECTOR_LR = 2e-3
"""Learning rate of a bias, in units of what is usual for its layer."""
_WARM_UP = 0.2
"""Share of the steps in which nothing pushes the weights to a grid point."""
_STEEPEST, _FLATTEST = 20.0, 2.0
"""The power of the push, from its beginning to the end."""
_GOOD_ENOUGH = 1e-4
"""A block with a smaller relative error has nothing to gain."""


@dataclass(frozen=True)
class Settings:
    """How to learn; the arguments of `reconstruct` of these names."""

    rounding: Rounding = "adaround"
    steps: int = 500
    batch_size: int = 32
    lr: float = 2e-2
    drop: float = 0.5
    push: float = 1.0

    def __post_init__(self) -> None:
        """Check every field."""
        if self.rounding not in ROUNDINGS:
            hint = suggest(str(self.rounding), tuple(ROUNDINGS))
            raise QatkitError(f"reconstruct(rounding={self.rounding!r}): {hint}")
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise QatkitError(f"reconstruct({name}={value!r}): give a positive integer")
        for name, most in (("lr", math.inf), ("push", math.inf), ("drop", 1.0)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0 <= value <= most and math.isfinite(value)):
                wanted = "0 or more" if most > 1 else "a share from 0 to 1"
                raise QatkitError(f"reconstruct({name}={value!r}): give {wanted}")


def reconstruct(
    model: nn.Module,
    data: Iterable[Any],
    *,
    blocks: Granularity | Sequence[str] = "auto",
    rounding: Rounding = "adaround",
    steps: int = 500,
    batch_size: int = 32,
    lr: float = 2e-2,
    drop: float = 0.5,
    push: float = 1.0,
    reference: nn.Module | None = None,
    batches: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PtqReport:
    """Learn for each block how to round its weights, so that it returns what the float block does.

    Block after block in the order of execution: it reads what the quantized blocks before it give
    and is to return what it returns in the float model, ``min |block(x_q) - float_block(x)|^2``.
    Learned are the rounding of each weight (``adaround``: up or down; ``adaquant``: any grid
    point), the steps of the activations inside, the biases, and the scales of batch norms that
    integers do not depend on. While learning, elements of the input and of the activations stay in
    float at random (QDrop). A block that gets no better on the data stays as it was.

    The result is in the model itself: each weight is put on its grid point (``adaquant``: as near
    to it as rounding needs) and its range frozen, so that rounding to nearest gives the learned
    integer in export, in a checkpoint and at the start of further training. A second call goes on
    from there; give it the float model as ``reference``.

    Args:
        model: a prepared and calibrated model.
        data: batches as for `qatkit.calibrate`; all of it is kept in memory, with the inputs and
            outputs of one block.
        blocks: ``"auto"``: blocks around residual joins, their siblings of the same class, and the
            layers outside of them; ``"layers"``: each layer alone (AdaRound); or paths of modules,
            ``""`` for the whole model, and the layers outside of them.
        rounding: ``"adaround"`` or ``"adaquant"``.
        steps: how many steps to learn each block.
        batch_size: samples in a step; where the first axis of what a block reads does not count
            samples, a step takes one batch of the data.
        lr: learning rate of the rounding, for Adam with a cosine to zero; ``adaquant`` in steps of
            the grid.
        drop: share of the elements that stay in float while learning, 0..1.
        push: weight of the push towards grid points, of ``adaround``.
        reference: a float model with the same paths to reproduce; ``None`` for the model itself
            without quantization, as it is now.
        batches: use only so many; ``None`` for all.
        seed: order of the samples and choice of the elements; no global generator changes.
        progress: show a progress bar if tqdm is installed and the output is a terminal.

    Returns:
        for each block its squared error over the energy of the float output.

    Raises:
        QatkitError: no quantizers, no data, a setting out of its range, or an unknown block. The
            model is then as before.

    Source: Nagel et al. 2020 (arXiv:2004.10568), AdaRound; Li et al. 2021 (arXiv:2102.05426),
        BRECQ; Wei et al. 2022 (arXiv:2203.05740), QDrop; Hubara et al. 2020 (arXiv:2006.10518),
        AdaQuant.

    >>> import qatkit
    >>> from qatkit.config import WEIGHT
    >>> x = torch.randn(64, 32) @ torch.randn(32, 32)
    >>> config = qatkit.QuantConfig(weight=WEIGHT.replace(num_bits=3))
    >>> net = qatkit.prepare(nn.Sequential(nn.Linear(32, 4)), x, config)
    >>> _ = qatkit.calibrate(net, [x], progress=False)
    >>> change = reconstruct(net, [x]).changes[0]
    >>> change.after < change.before
    True
    """
    settings = Settings(rounding, steps, batch_size, lr, drop, push)
    runs = Runs.read(model, data, batches, "reconstruct")
    exact = runs.of(reference_of(model, reference, "reconstruct"))
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    changes = []
    with restoring(model), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        units, norms = find_units(runs, blocks), norms_of(model)
        for weight in (weight for unit in units for weight in unit.weights):
            if weight.quantizer.quantize:
                pin_range(weight)
        before: tuple[Unit, Samples] | None = None
        for unit in progress_bar(units, "reconstructing", "block", progress):
            twin = unit.of(exact.model)
            samples = _inputs(runs, exact, unit, twin, before).with_targets(twin)
            changes.append(_learn(unit, samples, norms, settings))
            before = unit, samples
    return PtqReport("reconstruct", "squared error of the output over its energy", tuple(changes))


def _inputs(
    runs: Runs, exact: Runs, unit: Unit, twin: Unit, before: tuple[Unit, Samples] | None
) -> Samples:
    """Run both models up to a unit, or go on from the unit before it."""
    if before is not None and unit.follows:
        return before[1].onward(before[0])
    return Samples.of(
        exact.inputs(twin.entry, unit.calls),
        runs.inputs(unit.entry, unit.calls),
        runs.sizes(unit.calls),
    ).shuffled()


def error_of(unit: Unit, samples: Samples) -> float:
    """Return the squared error of the quantized unit over the energy of the exact result."""
    wrong = total = 0.0
    with torch.no_grad():
        for exact, quantized in samples.parts():
            wrong += float(distance(unit(*quantized.args, **quantized.kwargs), exact.output))
            total += energy(exact.output)
    return wrong / total if total > 0 else wrong


@dataclass(frozen=True, eq=False)
class _Learned:
    """What is learned in one unit."""

    weights: list[tuple[Weight, SoftRounding | StraightRounding]]
    steps: list[LearnedStep]
    vectors: list[LearnedVector]

    @classmethod
    def of(cls, unit: Unit, norms: Mapping[nn.Module, Any], settings: Settings) -> _Learned:
        """Start at what the unit is now."""
        weights = [weight for weight in unit.weights if weight.quantizer.quantize]
        rounding = ROUNDINGS[settings.rounding]
        return cls(
            [(weight, rounding(weight)) for weight in weights],
            [LearnedStep(each, settings.drop) for each in unit.activations if can_learn(each)],
            vectors_of(weights, norms),
        )

    def stand_ins(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return pairs of a quantizer and what takes its place."""
        pairs: list[tuple[nn.Module, nn.Module]] = [(w.quantizer, s) for w, s in self.weights]
        return [*pairs, *((step.quantizer, step) for step in self.steps)]

    def optimizer(self, settings: Settings) -> torch.optim.Optimizer:
        """Return Adam over all of it."""
        groups = [
            {"params": [soft.v for _, soft in self.weights], "lr": settings.lr},
            {"params": [step.growth for step in self.steps], "lr": _STEP_LR},
            {"params": [vector.change for vector in self.vectors], "lr": _VECTOR_LR},
        ]
        return torch.optim.Adam([group for group in groups if group["params"]])

    def write(self) -> int:
        """Put it into the model; return how many integers changed."""
        changed = sum(write_codes(w, soft.codes(), soft.aim()) for w, soft in self.weights)
        for step in self.steps:
            step.quantizer.set_range(*step.range())
        return changed


def _learn(
    unit: Unit, samples: Samples, norms: Mapping[nn.Module, Any], settings: Settings
) -> Change:
    before = error_of(unit, samples)
    learned = _Learned.of(unit, norms, settings)
    if before < _GOOD_ENOUGH or not learned.weights:
        return Change(unit.path, before, before, "kept: good enough")
    tensors = [getattr(weight.owner, weight.name) for weight, _ in learned.weights]
    tensors += [vector.parameter for vector in learned.vectors]
    old = [(tensor, tensor.detach().clone()) for tensor in tensors]
    ranges = [(s.quantizer, [end.clone() for end in s.quantizer.range]) for s in learned.steps]
    with _standing_in(unit, learned.stand_ins()):
        _descend(unit, samples, learned, settings)
    changed = learned.write()
    after = error_of(unit, samples)
    if after < before:
        total = sum(soft.v.numel() for _, soft in learned.weights)
        return Change(unit.path, before, after, f"{changed} of {total} codes changed")
    with torch.no_grad():
        for tensor, value in old:
            tensor.copy_(value)
    for quantizer, ends in ranges:
        quantizer.set_range(*ends)
    return Change(unit.path, before, before, "kept: no better")


def _descend(unit: Unit, samples: Samples, learned: _Learned, settings: Settings) -> None:
    """Learn; the weights are between grid points until the end, with adaround."""
    optimizer = learned.optimizer(settings)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    scale = 1.0 / max(samples.mean_energy(), 1e-30)
    leaves: list[Tensor] = [t for group in optimizer.param_groups for t in group["params"]]
    wanted = [*leaves[: len(leaves) - len(learned.vectors)]]
    wanted += [vector.parameter for vector in learned.vectors]
    for vector in learned.vectors:
        vector.parameter.requires_grad_(True)
    for step in range(settings.steps):
        exact, quantized = samples.choose(settings.batch_size)
        given = mixed(exact, quantized, settings.drop)
        with torch.enable_grad():
            error = distance(unit(*given.args, **given.kwargs), exact.output)
            loss = error * (scale / samples.count(exact))
            power = _power(step / settings.steps)
            if power is not None and settings.push > 0:
                parts = [soft.undecided(power) for _, soft in learned.weights]
                loss = loss + settings.push * torch.stack(parts).sum()
            grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad
        for vector in learned.vectors:
            vector.scale_gradient()
        optimizer.step()
        cosine.step()
        for vector in learned.vectors:
            vector.write()


def _power(share: float) -> float | None:
    """Return the power of the push after a share of the steps, ``None`` for no push yet."""
    if share < _WARM_UP:
        return None
    done = (share - _WARM_UP) / (1.0 - _WARM_UP)
    return _FLATTEST + (_STEEPEST - _FLATTEST) * 0.5 * (1.0 + math.cos(math.pi * done))


@contextmanager
def _standing_in(unit: Unit, pairs: list[tuple[nn.Module, nn.Module]]) -> Iterator[None]:
    """Put other modules in the place of quantizers, wherever in the unit they stand."""
    wanted = {id(old): new for old, new in pairs}
    places = [
        (module, name, child)
        for part in unit.chain
        for module in part.modules()
        for name, child in module._modules.items()
        if id(child) in wanted
    ]
    try:
        for module, name, child in places:
            module._modules[name] = wanted[id(child)]
        yield
    finally:
        for module, name, child in places:
            module._modules[name] = child
