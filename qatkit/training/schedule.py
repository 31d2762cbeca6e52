"""`QATSchedule`: what changes in a model in the course of quantization-aware training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.freeze import freeze_batch_norm, freeze_known_ranges
from qatkit.modes import quantizers, select_quantizers
from qatkit.prepare import weight_quantizers
from qatkit.training.bit_widths import Rescaled, own_widths, require_last, set_stage
from qatkit.training.oscillation import oscillation_loss
from qatkit.training.switches import check_switches, set_switches, switches
from qatkit.training.timetable import Position, Timetable, stages
from qatkit.training.wrappers import unwrapped

_ROLES = ("weight", "activation")
_TIMES = tuple(field.name for field in fields(Timetable))
_KEYS = {"steps", "held", "quantizers", "frozen_batch_norms", *_TIMES}


class QATSchedule:
    """Change a model as the training goes by: what is quantized, how finely, and what is frozen.

    Call `step` at the end of each epoch. Epochs count from 0; "at n" means that epoch n and all
    after it run so: n = 0 is right here and n = ``epochs`` after the last one. With
    ``steps_per_epoch`` call `step` after each optimizer step instead, and n may be a fraction.

    Batch norms freeze first, ranges later, so that the weights settle on a fixed grid. By default,
    with T epochs, batch norms freeze at T // 2 - 1, but not before one epoch has run, and ranges at
    T // 2 + 1, at the latest after the last epoch (`QATSchedule.ti`):

    =============== === === === === === === ====
    T                1   2   3   4   5   6   10
    =============== === === === === === === ====
    batch norms at   1   1   1   1   1   2   4
    ranges at        1   2   2   3   3   4   6
    =============== === === === === === === ====

    Ranges of quantizers that have seen no data by then are not frozen; the log names them.

    A quantizer has in each stage of ``bits`` the width of the stage or its own, whichever is wider,
    and the range that it has learned so far; codes from 0 are not widened beyond 7 bits, which have
    the step of 8 signed ones.

    Args:
        model: a prepared model, or a wrapper around it.
        epochs: T, how many epochs the training has.
        freeze_batch_norm_at: first epoch with frozen batch norms, ``None`` for the default; a
            number above ``epochs`` never freezes.
        freeze_ranges_at: first epoch with frozen ranges, likewise.
        quantize_weights_at: first epoch with quantized weights; their ranges are estimated before.
        quantize_activations_at: first epoch with quantized activations, likewise.
        bits: widths by their first epoch, for example ``{0: 8, 3: 6, 6: 4}``; the last one is the
            smallest width of the config, so that the model ends as it is exported.
        damping: weight of `damping_loss` at the end; it grows from 0 by a cosine.
        steps_per_epoch: how many calls of `step` an epoch has.

    Attributes:
        steps: how often `step` was called.
        timetable: the settings, as a frozen value.

    Raises:
        QatkitError: no prepared model, ``epochs`` below 1, a negative epoch, or widths that do not
            end with the one of the config.

    Source: TI edgeai-modeloptimization, quantization-aware training (T // 2 - 1 and T // 2 + 1);
        Krishnamoorthi 2018 (arXiv:1806.08342), section 3.2.3 (delay, freezing).

    >>> from qatkit.nn import QuantLinear
    >>> schedule = QATSchedule(QuantLinear(2, 2), 10)
    >>> schedule
    QATSchedule(epoch=0, epochs=10, freeze_batch_norm_at=4, freeze_ranges_at=6)
    >>> from qatkit.spec import QuantSpec
    >>> layer = QuantLinear(2, 2, weight_spec=QuantSpec(num_bits=4))
    >>> schedule = QATSchedule(layer, 2, bits={0: 8, 1: 4}, steps_per_epoch=10)
    >>> layer.weight_quantizer.spec.num_bits, layer.input_quantizer.spec.num_bits
    (8, 8)
    >>> for _ in range(10):
    ...     schedule.step()
    >>> layer.weight_quantizer.spec.num_bits, layer.input_quantizer.spec.num_bits
    (4, 8)
    """

    def __init__(
        self,
        model: nn.Module,
        epochs: int,
        *,
        freeze_batch_norm_at: Position | None = None,
        freeze_ranges_at: Position | None = None,
        quantize_weights_at: Position = 0,
        quantize_activations_at: Position = 0,
        bits: Mapping[Position, int] | None = None,
        damping: float = 0.0,
        steps_per_epoch: int = 1,
    ) -> None:
        """Start before epoch 0."""
        select_quantizers(model, "*", "QATSchedule")
        norms_at, ranges_at = _defaults(epochs)
        self.timetable = Timetable(
            epochs,
            norms_at if freeze_batch_norm_at is None else freeze_batch_norm_at,
            ranges_at if freeze_ranges_at is None else freeze_ranges_at,
            quantize_weights_at,
            quantize_activations_at,
            stages(bits),
            damping,
            steps_per_epoch,
        )
        self.steps = 0
        self._model = unwrapped(model)
        self._widths = own_widths(self._model)
        self._check_widths(self.timetable)
        self._held = {role: self._hold(role) for role in _ROLES}
        self._rescaled: list[Rescaled] = []
        self._change()

    @classmethod
    def ti(cls, model: nn.Module, epochs: int, *, steps_per_epoch: int = 1) -> QATSchedule:
        """Return the schedule of TI's edgeai-modeloptimization by name; it is the default.

        >>> from qatkit.nn import QuantLinear
        >>> QATSchedule.ti(QuantLinear(2, 2), 6)
        QATSchedule(epoch=0, epochs=6, freeze_batch_norm_at=2, freeze_ranges_at=4)
        """
        return cls(model, epochs, steps_per_epoch=steps_per_epoch)

    @property
    def epoch(self) -> int:
        """How many epochs have ended."""
        return self.steps // self.timetable.steps_per_epoch

    @property
    def epochs(self) -> int:
        """How many epochs the training has."""
        return self.timetable.epochs

    @property
    def freeze_batch_norm_at(self) -> Position:
        """First epoch with frozen batch norms."""
        return self.timetable.freeze_batch_norm_at

    @property
    def freeze_ranges_at(self) -> Position:
        """First epoch with frozen ranges."""
        return self.timetable.freeze_ranges_at

    @property
    def damping(self) -> float:
        """The weight of `damping_loss` now."""
        return self.timetable.damping_after(self.steps)

    def step(self) -> None:
        """End an epoch, or a step: change what is due. Nothing happens after the last one."""
        if self.steps < self.timetable.steps:
            self.steps += 1
            self._rescaled = []
            self._change()

    def damping_loss(self) -> Tensor | float:
        """Return what to add to the loss: `oscillation_loss` by its weight of now, 0.0 for none."""
        weight = self.damping
        return weight * oscillation_loss(self._model) if weight else 0.0

    def apply_to(self, model: nn.Module) -> None:
        """Bring another copy of the model, such as the average of its weights, to this state.

        Quantizers are on or off, frozen and as wide as here. Ranges are not copied.

        Raises:
            QatkitError: it is another model; it is then as it was.
        """
        other, state = unwrapped(model), switches(self._model)
        check_switches(other, state, "QATSchedule.apply_to")
        set_switches(other, state)

    def state_dict(self) -> dict[str, Any]:
        """Return position, settings, and the state of each quantizer and batch norm but tensors."""
        held = {role: list(paths) for role, paths in self._held.items()}
        times = self.timetable.to_dict()
        return {"steps": self.steps, **times, "held": held, **switches(self._model)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`: the settings are those of the state, the model is as it was.

        Quantizers are on or off, frozen and as wide as then, also where they were switched by hand.
        Ranges and weights are in the state of the model, to be loaded before or right after.

        Args:
            state: what `state_dict` returned.

        Raises:
            QatkitError: the state is not one of a `QATSchedule`, or not of this model; nothing has
                changed then.
        """
        where = "QATSchedule.load_state_dict"
        if not isinstance(state, Mapping) or set(state) != _KEYS:
            found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise QatkitError(
                f"{where}: expects {', '.join(sorted(_KEYS))} and got {found}; "
                "give what QATSchedule.state_dict() returned"
            )
        timetable = Timetable.from_dict({name: state[name] for name in _TIMES})
        self._check_widths(timetable)
        check_switches(self._model, state, where)
        steps, held = state["steps"], state["held"]
        whole = isinstance(steps, int) and not isinstance(steps, bool)
        if not (whole and 0 <= steps <= timetable.steps and _fits(held, state["quantizers"])):
            raise QatkitError(
                f"{where}: steps={steps!r} of {timetable.steps}, held={held!r}; "
                "give what QATSchedule.state_dict() returned"
            )
        self.timetable, self.steps = timetable, steps
        self._held = {role: list(held[role]) for role in _ROLES}
        for change in self._rescaled:  # the model had its state before this schedule was made
            change.undo()
        self._rescaled = []
        set_switches(self._model, state)

    def __repr__(self) -> str:
        """Show the position and the settings that are not left out by default."""
        shown: dict[str, Any] = {"epoch": self.epoch, "epochs": self.epochs}
        for field in fields(Timetable):
            value = getattr(self.timetable, field.name)
            if field.default is MISSING or value != field.default:
                shown[field.name] = dict(value) if field.name == "bits" else value
        return f"QATSchedule({', '.join(f'{name}={value}' for name, value in shown.items())})"

    def _check_widths(self, timetable: Timetable) -> None:
        if timetable.bits is not None:
            require_last(self._widths, timetable.bits[-1][1])

    def _hold(self, role: str) -> list[str]:
        """Switch off what has to wait; return the paths."""
        if self._step_of(f"quantize_{role}s_at") == 0:
            return []
        weights = {id(each) for each in weight_quantizers(self._model).values()}
        held = {
            path: each
            for path, each in quantizers(self._model)
            if each.quantize and (id(each) in weights) == (role == "weight")
        }
        for quantizer in held.values():
            quantizer.quantize = False
        return list(held)

    def _change(self) -> None:
        """Do what is due at this step."""
        for role in _ROLES:
            if self.steps >= self._step_of(f"quantize_{role}s_at"):
                self._release(role)
        stage = self.timetable.bits_after(self.steps)
        if stage is not None and stage != self.timetable.bits_after(self.steps - 1):
            self._rescaled = set_stage(self._model, self._widths, stage)
        if self.steps == self._step_of("freeze_batch_norm_at"):
            freeze_batch_norm(self._model).apply()
        if self.steps == self._step_of("freeze_ranges_at"):
            freeze_known_ranges(self._model)

    def _release(self, role: str) -> None:
        """Switch on what has waited."""
        held = set(self._held[role])
        self._held[role] = []
        for path, quantizer in quantizers(self._model):
            if path in held:
                quantizer.quantize = True

    def _step_of(self, name: str) -> int:
        return self.timetable.step_of(getattr(self.timetable, name))


def _defaults(epochs: object) -> tuple[int, int]:
    """Return when batch norms and ranges freeze by default; what is no number is checked later."""
    if not isinstance(epochs, int):
        return 0, 0
    return max(1, epochs // 2 - 1), max(0, min(epochs, epochs // 2 + 1))


def _fits(held: object, known: Mapping[str, Any]) -> bool:
    """Tell whether the quantizers that wait are given by role and are known ones."""
    if not isinstance(held, Mapping) or set(held) != set(_ROLES):
        return False
    return all(
        isinstance(paths, list | tuple) and set(paths) <= set(known) for paths in held.values()
    )
