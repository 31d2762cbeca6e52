"""Averages of the weights of a prepared model: torch's, and one by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import qatkit
from qatkit.modes import quantizers
from qatkit.nn.batchnorm import batch_norms, statistics_are_frozen
from qatkit.training.batch_norm import reestimate_batch_norm
from qatkit.training.schedule import QATSchedule
from tests.training.nets import PER_TENSOR, W4A4, X, batch, net, sgd, state, step

DECAY = 0.7


class ByHand:
    """An average of parameters, as many training scripts have it; buffers are copied."""

    def __init__(self, model: nn.Module) -> None:
        self.module = copy.deepcopy(model).eval()

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        for average, value in zip(self.module.parameters(), model.parameters(), strict=True):
            average.lerp_(value, 1 - DECAY)
        for average, value in zip(self.module.buffers(), model.buffers(), strict=True):
            average.copy_(value)


def average(kind: str, model: nn.Module) -> Any:
    if kind == "by hand":
        return ByHand(model)
    return AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=kind == "with buffers"
    )


def settings(model: nn.Module) -> Any:
    of_quantizers = [(p, q.spec, q.observe, q.quantize) for p, q in quantizers(model)]
    return of_quantizers, [statistics_are_frozen(norm) for _, norm in batch_norms(model)]


@pytest.mark.parametrize("config", [W4A4, PER_TENSOR], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("kind", ["parameters", "with buffers", "by hand"])
def test_an_average_trains_along_and_is_exported(kind: str, config: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = net(config)
    schedule = QATSchedule(model, 4, bits={0: 6, 2: 4}, quantize_activations_at=1)
    mean = average(kind, model)  # before the first forward: it has no ranges yet
    optimizer = sgd(model)
    wanted = {name: value.detach().clone().double() for name, value in model.named_parameters()}
    for index in range(6):
        step(model, optimizer, index)
        mean.update_parameters(model)
        first = index == 0 and kind != "by hand"  # torch's starts with the weights of the first
        for name, value in model.named_parameters():
            new = value.detach().double()
            wanted[name] = new if first else wanted[name] * DECAY + new * (1 - DECAY)
        schedule.step()
    for name, value in mean.module.named_parameters():
        assert torch.allclose(value.double(), wanted[name], atol=1e-5), name
    schedule.apply_to(mean.module)
    assert settings(mean.module) == settings(model)
    assert all(
        quantizer.calibrated
        for _, quantizer in quantizers(mean.module)
        if quantizer.spec.memory != "latest"
    )
    reestimate_batch_norm(mean.module, [batch(n)[0] for n in range(3)])
    report = qatkit.export_onnx(mean.module.eval(), X, tmp_path / "mean.onnx")
    assert report.verify is not None
    assert report.verify.ok


def test_a_copy_is_a_model_of_its_own() -> None:
    model = net(PER_TENSOR)
    optimizer = sgd(model)
    step(model, optimizer, 0)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.eval()(X), model.eval()(X))
    before = state(twin)
    model.train()
    step(model, optimizer, 1)
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())
    ours = {id(module) for module in model.modules()}
    for _, quantizer in quantizers(twin):
        assert not {id(peer) for peer in quantizer.peers} & ours


def test_an_average_trains_on_with_its_own_ranges() -> None:
    model = net()
    mean = AveragedModel(model)
    step(model, sgd(model), 0)
    mean.update_parameters(model)
    step(mean.module.train(), sgd(mean.module), 1)
    assert mean.module.conv.input_quantizer.num_batches == 2
    assert model.conv.input_quantizer.num_batches == 1


def test_apply_to_another_model_is_refused() -> None:
    schedule = QATSchedule(net(), 4)
    other = qatkit.prepare(nn.Sequential(nn.Linear(3, 3)), torch.ones(1, 3))
    with pytest.raises(
        qatkit.QatkitError, match=r"QATSchedule\.apply_to: the state and Sequential"
    ):
        schedule.apply_to(other)
