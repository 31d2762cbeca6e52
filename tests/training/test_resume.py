"""A run that is interrupted and resumed is, bit by bit, the run without the interruption."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qatkit
from qatkit.config import ACTIVATION, WEIGHT, QuantConfig
from qatkit.modes import quantizers
from qatkit.training.oscillation import OscillationTracker
from qatkit.training.schedule import QATSchedule
from tests.training.nets import Net, net, same, sgd, state, step

STEPS = 4
EPOCHS = 6
UNSIGNED = QuantConfig(
    weight=WEIGHT.replace(num_bits=3, axis=None),
    activation=ACTIVATION.replace(num_bits=3),
    first_last_bits=8,
    unsigned_activations=True,
)
EVERYTHING: dict[str, Any] = {
    "steps_per_epoch": STEPS,
    "quantize_weights_at": 0.5,
    "quantize_activations_at": 1,
    "bits": {0: 8, 1.75: 6, 3: 3},
    "freeze_batch_norm_at": 4,
    "freeze_ranges_at": 4.5,
    "damping": 0.01,
}


class Run:
    """Everything that a training holds."""

    def __init__(self, model: nn.Module, settings: dict[str, Any]) -> None:
        self.model = model
        self.schedule = QATSchedule(model, EPOCHS, **settings)
        self.tracker = OscillationTracker(model, threshold=0.1, momentum=0.1)
        self.optimizer = sgd(model)
        self.rates = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, EPOCHS * STEPS)
        self.parts = (self.schedule, self.tracker, self.optimizer, self.rates)

    def train(self, first: int, last: int) -> None:
        for index in range(first, last):
            step(self.model, self.optimizer, index, self.schedule.damping_loss)
            self.tracker.step()
            self.rates.step()
            self.schedule.step()


def outcome(run: Run) -> tuple[dict[str, torch.Tensor], Any]:
    specs = {path: (each.spec, each.observe, each.quantize) for path, each in quantizers(run.model)}
    return state(run.model), (specs, run.schedule.state_dict())


@pytest.fixture(scope="module")
def whole() -> tuple[dict[str, torch.Tensor], Any]:
    run = Run(net(UNSIGNED), EVERYTHING)
    run.train(0, EPOCHS * STEPS)
    assert run.tracker.frozen > 0
    return outcome(run)


@pytest.mark.parametrize("at", [1, 6, 13, 19])
@pytest.mark.parametrize("how", ["state_dict", "qatkit.save"])
def test_resume(whole: Any, at: int, how: str, tmp_path: Path) -> None:
    """All are in the middle of epochs, each in another phase."""
    first = Run(net(UNSIGNED), EVERYTHING)
    first.train(0, at)
    file = io.BytesIO()
    saved = {"model": first.model.state_dict(), "parts": [p.state_dict() for p in first.parts]}
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    if how == "state_dict":
        model = net(UNSIGNED, seed=9)
        model.load_state_dict(loaded["model"])
        resumed = Run(model, EVERYTHING)
    else:
        pytest.importorskip("safetensors")
        qatkit.save(first.model, tmp_path / "model.safetensors")
        model = qatkit.load(Net(), tmp_path / "model.safetensors").train()
        resumed = Run(model, {})  # the settings are in the state
    for part, each in zip(resumed.parts, loaded["parts"], strict=True):
        part.load_state_dict(each)  # type: ignore[attr-defined]
    resumed.train(at, EPOCHS * STEPS)
    tensors, rest = outcome(resumed)
    assert same(tensors, whole[0])
    assert rest == whole[1]
