"""The callback in a real ``Trainer``, where Lightning is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import qatkit
from qatkit.modes import quantizers
from qatkit.training import lightning as module

EXAMPLE = torch.zeros(1, 3, 8, 8)
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning has advice about loggers and workers


def test_without_lightning_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    module._callback.cache_clear()
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(ImportError, match="not installed: pip install lightning"):
        _ = module.QATCallback
    assert issubclass(qatkit.errors.MissingExtraError, qatkit.QatkitError)


def parts() -> tuple[Any, Any]:
    """Return Lightning and a module that trains a small model."""
    pl = pytest.importorskip("lightning.pytorch")

    class Task(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
            self.model.extend([nn.Flatten(), nn.Linear(144, 3)])

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.model(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    return pl, Task


def loader() -> DataLoader[Any]:
    seed = torch.Generator().manual_seed(1)
    return DataLoader(
        TensorDataset(torch.randn(12, 3, 8, 8, generator=seed), torch.arange(12) % 3), 4
    )


def trainer(pl: Any, folder: Path, epochs: int, *callbacks: Any, **more: Any) -> Any:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **more,
    )


def four(model: nn.Module, _: int) -> qatkit.QATSchedule:
    return qatkit.QATSchedule(model, 4, freeze_batch_norm_at=1, freeze_ranges_at=2)


@pytest.mark.slow
def test_a_run_and_a_resumed_one_agree(tmp_path: Path) -> None:
    pl, task = parts()
    ended: list[nn.Module] = []
    straight = task()
    callback = module.QATCallback(EXAMPLE, schedule=four, on_end=ended.append)
    trainer(pl, tmp_path, 4, callback, enable_checkpointing=False).fit(straight, loader())
    assert ended == [straight.model]
    assert callback.schedule is not None
    assert callback.schedule.epoch == 4
    assert all(q.observe == "never" for _, q in quantizers(straight.model))

    first = task()
    run = trainer(pl, tmp_path, 2, module.QATCallback(EXAMPLE, schedule=four))
    run.fit(first, loader())
    assert type(first.model[0]).__name__ == "QuantConv2d"
    run.save_checkpoint(tmp_path / "half.ckpt")
    second = task()
    resumed = module.QATCallback(EXAMPLE, schedule=four)
    trainer(pl, tmp_path, 4, resumed).fit(second, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert resumed.schedule is not None
    assert resumed.schedule.epoch == 4
    for (key, one), other in zip(
        straight.state_dict().items(), second.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), key


def test_wrong_use_is_refused(tmp_path: Path) -> None:
    pl, task = parts()
    with pytest.raises(qatkit.QatkitError, match="net"):
        trainer(pl, tmp_path, 1, module.QATCallback(EXAMPLE, model="net")).fit(task(), loader())
    with pytest.raises(qatkit.QatkitError, match="max_epochs is -1"):
        trainer(pl, tmp_path, -1, module.QATCallback(EXAMPLE), max_steps=1).fit(task(), loader())
