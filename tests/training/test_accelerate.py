"""The helper with a real ``Accelerator``, where accelerate is installed."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qatkit
from qatkit.modes import quantizers
from qatkit.training.accelerate import prepare_qat

EXAMPLE = torch.zeros(1, 3, 8, 8)
pytestmark = pytest.mark.filterwarnings("ignore")


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    return model.append(nn.Linear(144, 3))


def loader() -> DataLoader[Any]:
    seed = torch.Generator().manual_seed(1)
    return DataLoader(
        TensorDataset(torch.randn(12, 3, 8, 8, generator=seed), torch.arange(12) % 3), 4
    )


def test_without_accelerate_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match="not installed: pip install accelerate"):
        prepare_qat(None, net(), EXAMPLE, epochs=1)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_train_save_and_resume(precision: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    wrapped, optimizer, data, schedule = prepare_qat(
        accelerator,
        model,
        EXAMPLE,
        optimizer,
        loader(),
        epochs=4,
        calibration_data=loader(),
        calibration_batches=2,
        schedule=lambda m, n: qatkit.QATSchedule(m, n, freeze_ranges_at=2),
    )
    assert model[0].input_quantizer.num_batches == 2

    def epoch() -> None:
        wrapped.train()
        for x, y in data:
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(wrapped(x), y))
            optimizer.step()
        schedule.step()

    epoch()
    accelerator.save_state(str(tmp_path / "state"))
    epoch()
    assert all(q.observe == "never" for _, q in quantizers(model))
    trained = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[0].weight.zero_()
    schedule.step()
    accelerator.load_state(str(tmp_path / "state"))
    assert schedule.epoch == 1
    assert not torch.equal(model[0].weight, trained["0.weight"])
    plain = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    assert plain is model
    copy.deepcopy(plain)


def test_something_else_is_refused() -> None:
    pytest.importorskip("accelerate")
    with pytest.raises(qatkit.QatkitError, match=r"a str; give an accelerate\.Accelerator"):
        prepare_qat("cpu", net(), EXAMPLE, epochs=1)
