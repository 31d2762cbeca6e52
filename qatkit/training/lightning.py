"""Quantization-aware training in Lightning: a callback of a ``Trainer``.

``QATCallback`` becomes a ``lightning.pytorch.Callback`` when it is first asked for, so that this
module imports without Lightning.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import nn

from qatkit.calibrate import calibrate
from qatkit.config import QuantConfig
from qatkit.errors import MissingExtraError, QatkitError
from qatkit.modes import quantizers
from qatkit.prepare import prepare, weight_quantizers
from qatkit.training.schedule import QATSchedule


class _QATCallback:
    """Prepare a model before the strategy wraps it, calibrate it, and step its schedule.

    The model is prepared in place when ``fit`` sets up, before a checkpoint is loaded into it. When
    training starts, and no range came from a checkpoint, it is calibrated on the training data, on
    each rank on its part of it. The schedule steps with the epochs and is saved and restored with
    the checkpoints of the trainer.

    Args:
        example_inputs: as for `qatkit.prepare`.
        config: as there; ``None`` for the default.
        model: path of the model inside of the ``LightningModule``; ``""`` for all of it.
        calibration_batches: how many training batches to calibrate on; 0 not to calibrate.
        schedule: makes the schedule out of the model and the number of epochs.
        on_end: called with the trained model on the first rank, for example to export it.

    Attributes:
        schedule: the `qatkit.QATSchedule`, once training has started.

    Raises:
        QatkitError: in ``fit``: there is no module of that path, or the trainer has no number of
            epochs.
        MissingExtraError: Lightning is not installed.
    """

    def __init__(
        self,
        example_inputs: Any,
        config: QuantConfig | str | None = None,
        *,
        model: str = "model",
        calibration_batches: int = 8,
        schedule: Callable[[nn.Module, int], QATSchedule] = QATSchedule,
        on_end: Callable[[nn.Module], object] | None = None,
    ) -> None:
        """Remember what to do."""
        self.schedule: QATSchedule | None = None
        self._inputs, self._config = example_inputs, config
        self._path, self._batches = model, calibration_batches
        self._make_schedule, self._on_end = schedule, on_end
        self._saved: dict[str, Any] | None = None

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Prepare the model."""
        if stage == "fit":
            prepare(self._model(pl_module), self._inputs, self._config)

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Calibrate a model without ranges and make the schedule, or continue the saved one."""
        model, epochs = self._model(pl_module), trainer.max_epochs
        if epochs is None or epochs < 1:
            raise QatkitError(f"QATCallback: max_epochs is {epochs}; give the Trainer a number")
        if self._batches and not _has_ranges(model):
            calibrate(model, trainer.train_dataloader, batches=self._batches, progress=False)
        self.schedule = self._make_schedule(model, epochs)
        if self._saved is not None:
            self.schedule.load_state_dict(self._saved)

    def on_train_epoch_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Step as often as epochs have ended."""
        self._step(trainer.current_epoch)

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """End the last epoch and hand over the model."""
        self._step(trainer.current_epoch)
        if self._on_end is not None and trainer.is_global_zero:
            self._on_end(self._model(pl_module))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the schedule."""
        return {} if self.schedule is None else {"schedule": self.schedule.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a schedule until there is one."""
        self._saved = state_dict.get("schedule")

    def _step(self, epoch: int) -> None:
        assert self.schedule is not None
        for _ in range(self.schedule.epoch, min(epoch, self.schedule.epochs)):
            self.schedule.step()

    def _model(self, pl_module: nn.Module) -> nn.Module:
        try:
            return pl_module.get_submodule(self._path)
        except AttributeError:
            raise QatkitError(
                f"QATCallback(model={self._path!r}): {type(pl_module).__name__} has no such "
                "module; give the path of the model, or '' for the whole module"
            ) from None


def _has_ranges(model: nn.Module) -> bool:
    weights = weight_quantizers(model)
    return all(each.has_range for path, each in quantizers(model) if path not in weights)


@cache
def _callback() -> type[_QATCallback]:
    """Return the class with Lightning's base; it is made once."""
    try:
        from lightning.pytorch import Callback
    except ImportError:
        raise MissingExtraError("lightning") from None
    members = {"__module__": __name__, "__doc__": _QATCallback.__doc__}
    return type("QATCallback", (_QATCallback, Callback), members)


if TYPE_CHECKING:
    QATCallback = _QATCallback


def __getattr__(name: str) -> object:
    """Make the callback at its first use."""
    if name != "QATCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _callback()
