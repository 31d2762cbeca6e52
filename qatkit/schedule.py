"""When batch norms and ranges freeze in the course of quantization-aware training."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from qatkit.errors import QatkitError
from qatkit.freeze import freeze_batch_norm, freeze_known_ranges
from qatkit.modes import select_quantizers

_FIELDS = ("epoch", "epochs", "freeze_batch_norm_at", "freeze_ranges_at")


class QATSchedule:
    """Freeze the batch norms first, the ranges later, so that the weights settle on a fixed grid.

    Call `step` at the end of each epoch. Epochs count from 0; "freeze at n" means that epoch n and
    all after it run frozen, so that n = 0 freezes right here and n = ``epochs`` after the last one.
    By default, with T epochs, batch norms freeze at T // 2 - 1, but not before one epoch has run,
    and ranges at T // 2 + 1, at the latest after the last epoch:

    =============== === === === === === === ====
    T                1   2   3   4   5   6   10
    =============== === === === === === === ====
    batch norms at   1   1   1   1   1   2   4
    ranges at        1   2   2   3   3   4   6
    =============== === === === === === === ====

    Ranges of quantizers that have seen no data by then are not frozen; the log names them.

    Args:
        model: a prepared model.
        epochs: T, how many epochs the training has.
        freeze_batch_norm_at: first epoch with frozen batch norms, ``None`` for the default; a
            number above ``epochs`` never freezes.
        freeze_ranges_at: first epoch with frozen ranges, likewise.

    Attributes:
        epoch: how many epochs have ended.
        epochs: as given.
        freeze_batch_norm_at: first epoch with frozen batch norms.
        freeze_ranges_at: first epoch with frozen ranges.

    Raises:
        QatkitError: no prepared model, ``epochs`` below 1, or a negative epoch.

    Source: TI edgeai-modeloptimization, quantization-aware training (T // 2 - 1 and T // 2 + 1).

    >>> from qatkit.nn import QuantLinear
    >>> schedule = QATSchedule(QuantLinear(2, 2), 10)
    >>> schedule
    QATSchedule(epoch=0, epochs=10, freeze_batch_norm_at=4, freeze_ranges_at=6)
    """

    def __init__(
        self,
        model: nn.Module,
        epochs: int,
        *,
        freeze_batch_norm_at: int | None = None,
        freeze_ranges_at: int | None = None,
    ) -> None:
        """Start before epoch 0."""
        select_quantizers(model, "*", "QATSchedule")
        self.epochs = _count(epochs, "epochs", 1)
        if freeze_batch_norm_at is None:
            freeze_batch_norm_at = max(1, epochs // 2 - 1)
        if freeze_ranges_at is None:
            freeze_ranges_at = min(epochs, epochs // 2 + 1)
        self.freeze_batch_norm_at = _count(freeze_batch_norm_at, "freeze_batch_norm_at", 0)
        self.freeze_ranges_at = _count(freeze_ranges_at, "freeze_ranges_at", 0)
        self.epoch = 0
        self._model = model
        self._freeze_now()

    def step(self) -> None:
        """End an epoch: freeze what is due. Nothing happens after the last epoch."""
        if self.epoch < self.epochs:
            self.epoch += 1
            self._freeze_now()

    def state_dict(self) -> dict[str, int]:
        """Return the position and the settings."""
        return {name: getattr(self, name) for name in _FIELDS}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from `state_dict`: what was frozen is again, with the ranges that the model has.

        Load the state of the model first. Nothing is thawed.

        Args:
            state: what `state_dict` returned.

        Raises:
            QatkitError: the state is not one of a `QATSchedule`; nothing has changed then.
        """
        if not isinstance(state, Mapping) or set(state) != set(_FIELDS):
            found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise QatkitError(
                f"QATSchedule.load_state_dict: expects {', '.join(_FIELDS)} and got {found}; "
                "give what QATSchedule.state_dict() returned"
            )
        lowest = {"epochs": 1}
        checked = {name: _count(state[name], name, lowest.get(name, 0)) for name in _FIELDS}
        for name, value in checked.items():
            setattr(self, name, value)
        if self.epoch >= self.freeze_batch_norm_at:
            freeze_batch_norm(self._model).apply()
        if self.epoch >= self.freeze_ranges_at:
            freeze_known_ranges(self._model, keep_weight_ranges=True)

    def __repr__(self) -> str:
        """Show the position and the settings."""
        return f"QATSchedule({', '.join(f'{name}={getattr(self, name)}' for name in _FIELDS)})"

    def _freeze_now(self) -> None:
        if self.epoch == self.freeze_batch_norm_at:
            freeze_batch_norm(self._model).apply()
        if self.epoch == self.freeze_ranges_at:
            freeze_known_ranges(self._model)


def _count(value: object, name: str, lowest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise QatkitError(
            f"QATSchedule({name}={value!r}): give an integer number of epochs, {lowest} or more"
        )
    return value
