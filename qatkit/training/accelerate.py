"""Quantization-aware training with Hugging Face's accelerate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from qatkit.calibrate import calibrate
from qatkit.config import QuantConfig
from qatkit.errors import MissingExtraError, QatkitTypeError
from qatkit.prepare import prepare
from qatkit.training.schedule import QATSchedule


def prepare_qat(
    accelerator: Any,
    model: nn.Module,
    example_inputs: Any,
    *objects: Any,
    epochs: int,
    config: QuantConfig | str | None = None,
    calibration_data: Any = None,
    calibration_batches: int | None = None,
    schedule: Callable[[nn.Module, int], QATSchedule] = QATSchedule,
) -> tuple[Any, ...]:
    """Prepare a float model with qatkit, then all objects with accelerate, in the right order.

    The quantizers are put in before accelerate moves and wraps the model, the ranges are estimated
    after it, on each process on its part of the data. The schedule is registered, so that
    ``accelerator.save_state`` and ``load_state`` take it along; call its ``step`` at the end of
    each epoch. Export ``accelerator.unwrap_model(model, keep_fp32_wrapper=False)``.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        model: a float model.
        example_inputs: as for `qatkit.prepare`.
        *objects: what else ``accelerator.prepare`` gets: optimizers, data loaders ...
        epochs: how many epochs the training has.
        config: as for `qatkit.prepare`.
        calibration_data: a data loader to calibrate on, which is split over the processes; ``None``
            not to calibrate.
        calibration_batches: use only so many of its batches on each process.
        schedule: makes the schedule out of the model and the number of epochs.

    Returns:
        ``(model, *objects, schedule)``: the wrapped model, the prepared objects and a
        `qatkit.QATSchedule`.

    Raises:
        QatkitError: as for `qatkit.prepare` and `qatkit.calibrate`; no ``Accelerator`` is given.
        MissingExtraError: accelerate is not installed.
    """
    try:
        from accelerate import Accelerator
    except ImportError:
        raise MissingExtraError("accelerate") from None
    if not isinstance(accelerator, Accelerator):
        raise QatkitTypeError(
            f"prepare_qat: accelerator is a {type(accelerator).__name__}; "
            "give an accelerate.Accelerator"
        )
    prepare(model, example_inputs, config)
    prepared = accelerator.prepare(model, *objects)
    wrapped, *others = prepared if objects else (prepared,)
    if calibration_data is not None:
        data = accelerator.prepare_data_loader(calibration_data)
        calibrate(
            model,
            data,
            batches=calibration_batches,
            progress=accelerator.is_local_main_process,
        )
    steps = schedule(model, epochs)
    accelerator.register_for_checkpointing(steps)
    return (wrapped, *others, steps)
