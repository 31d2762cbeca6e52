"""Dead channels, zero gammas and constant images give no NaN, whatever observes and trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qatkit
from qatkit.config import ACTIVATION, WEIGHT, QuantConfig
from qatkit.modes import quantizers
from qatkit.nn.batchnorm import batch_norms
from qatkit.spec import OBSERVER_NAMES
from qatkit.training.oscillation import OscillationTracker
from qatkit.training.schedule import QATSchedule
from tests.training.nets import X, batch, net, sgd

OBSERVERS = tuple(name for name in OBSERVER_NAMES if name != "fixed")


def config(observer: str, **weight: Any) -> QuantConfig:
    return QuantConfig(
        weight=WEIGHT.replace(num_bits=4, **weight),
        activation=ACTIVATION.replace(num_bits=4, observer=observer),
    )


def dead_channels(model: Any) -> None:
    """Zero some channels, and all of one layer."""
    with torch.no_grad():
        model.conv.weight[:3].zero_()
        model.layer1.conv1.weight.zero_()
        model.fc.weight[2].zero_()


def zero_gammas(model: Any) -> None:
    """Let a branch begin as zero, as recipes do, and some channels of another."""
    with torch.no_grad():
        model.layer1.bn2.weight.zero_()
        model.bn.weight[:4].zero_()


def zero_variance(model: Any) -> None:
    for _, norm in batch_norms(model):
        norm.running_var.zero_()


def nothing(model: Any) -> None:
    """Leave the model as it is."""


MODELS = {
    "dead channels": dead_channels,
    "gamma 0": zero_gammas,
    "variance 0": zero_variance,
    "as it is": nothing,
}
BATCHES = {
    "images": lambda index: batch(index)[0],
    "constant": lambda index: torch.full((8, 3, 8, 8), 0.7),
    "zero": lambda index: torch.zeros(8, 3, 8, 8),
    "huge": lambda index: batch(index)[0] * 1e18,
    "tiny": lambda index: batch(index)[0] * 1e-30,
}


def finite(model: nn.Module) -> list[str]:
    """Return the names of what is not finite in parameters, buffers and gradients."""
    gradients = {f"{n}.grad": p.grad for n, p in model.named_parameters() if p.grad is not None}
    found: dict[str, Tensor] = {**model.state_dict(), **gradients}
    return [name for name, value in found.items() if not bool(torch.isfinite(value).all())]


@pytest.mark.parametrize("data", BATCHES)
@pytest.mark.parametrize("change", MODELS)
@pytest.mark.parametrize("axis", [0, None], ids=["per channel", "per tensor"])
def test_training_stays_finite(change: str, data: str, axis: int | None) -> None:
    model = net(config("shrink", axis=axis))
    MODELS[change](model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    schedule = QATSchedule(model, 3, bits={0: 8, 1: 4}, damping=1e-3)
    tracker = OscillationTracker(model, threshold=0.01, momentum=0.5)
    for index in range(3):
        x, classes = BATCHES[data](index), batch(index)[1]
        output = model(x)
        assert bool(torch.isfinite(output).all())
        loss = F.cross_entropy(output, classes) + schedule.damping_loss()
        optimizer.zero_grad()
        loss.backward()
        assert finite(model) == []
        optimizer.step()
        tracker.step()
        schedule.step()
    assert finite(model) == []
    assert bool(torch.isfinite(model.eval()(BATCHES[data](0))).all())


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("change", ["dead channels", "gamma 0"])
def test_every_observer(observer: str, change: str) -> None:
    model = net(config(observer))
    MODELS[change](model)
    optimizer = sgd(model)
    for data in BATCHES.values():
        output = model(data(0))
        loss = F.cross_entropy(output, batch(0)[1])
        optimizer.zero_grad()
        loss.backward()
        assert finite(model) == [], observer


@pytest.mark.parametrize("change", MODELS)
def test_calibrated_and_exported(change: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = net("tensorrt-int8")
    MODELS[change](model)
    qatkit.calibrate(model, [BATCHES["constant"](0), BATCHES["images"](0)])
    assert all(bool((each.scale > 0).all()) for _, each in quantizers(model))
    report = qatkit.export_onnx(model.eval(), X, tmp_path / "net.onnx")
    assert report.verify is not None
    assert report.verify.ok


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_batch_norms_after_constant_images(constant: float) -> None:
    model = net()
    x = torch.full((4, 3, 8, 8), constant)
    model(x)
    qatkit.reestimate_batch_norm(model, [x, x])
    assert finite(model) == []
    assert bool(torch.isfinite(model.eval()(x)).all())
