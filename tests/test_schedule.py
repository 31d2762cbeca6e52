"""The schedule freezes at the configured epochs, and again when it is resumed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError, QatkitTypeError
from qatkit.modes import quantizers
from qatkit.nn.batchnorm import statistics_are_frozen
from qatkit.prepare import prepare
from qatkit.schedule import QATSchedule

X = torch.linspace(-2, 3, 4 * 3 * 6 * 6).reshape(4, 3, 6, 6)


def model() -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    prepare(net, X)
    return net.train()


def frozen(net: nn.Sequential) -> tuple[bool, bool]:
    """Return whether the batch norm and whether all ranges are frozen."""
    modes = {quantizer.observe for _, quantizer in quantizers(net)}
    return statistics_are_frozen(net[1]), modes == {"never"}


def buffers(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def epoch(net: nn.Module) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.zero_grad()
    net(X).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("epochs", "norms_at", "ranges_at"),
    [(1, 1, 1), (2, 1, 2), (3, 1, 2), (4, 1, 3), (5, 1, 3), (6, 2, 4), (10, 4, 6), (50, 24, 26)],
)
def test_defaults(epochs: int, norms_at: int, ranges_at: int) -> None:
    net = model()
    schedule = QATSchedule(net, epochs)
    for n in range(epochs):
        assert frozen(net) == (n >= norms_at, n >= ranges_at)
        net(X)
        schedule.step()
    assert frozen(net) == (True, True)


def test_own_epochs_and_zero() -> None:
    net = model()
    net(X)
    schedule = QATSchedule(net, 4, freeze_batch_norm_at=3, freeze_ranges_at=0)
    seen = [frozen(net)]
    for _ in range(4):
        schedule.step()
        seen.append(frozen(net))
    assert seen == [(False, True)] * 3 + [(True, True)] * 2


def test_never() -> None:
    net = model()
    net(X)
    schedule = QATSchedule(net, 2, freeze_batch_norm_at=3, freeze_ranges_at=3)
    for _ in range(5):
        schedule.step()
    assert frozen(net) == (False, False)
    assert schedule.epoch == 2


def test_steps_after_the_end_do_nothing() -> None:
    net = model()
    net(X)
    schedule = QATSchedule(net, 1)
    schedule.step()
    before = schedule.state_dict()
    schedule.step()
    assert schedule.state_dict() == before


def test_what_is_thawed_by_hand_stays_thawed() -> None:
    net = model()
    net(X)
    schedule = QATSchedule(net, 9, freeze_batch_norm_at=0, freeze_ranges_at=1)
    schedule.step()
    net[0].input_quantizer.observe = "training"
    schedule.step()
    assert net[0].input_quantizer.observe == "training"


def test_a_quantizer_that_saw_nothing_does_not_stop_the_training(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = model()
    schedule = QATSchedule(net, 1)
    schedule.step()
    assert "0.input_quantizer" in caplog.text
    assert net[0].input_quantizer.observe == "training"


def test_resume() -> None:
    first = model()
    schedule = QATSchedule(first, 4, freeze_batch_norm_at=1, freeze_ranges_at=2)
    for _ in range(3):
        epoch(first)
        schedule.step()
    again = model()
    again.load_state_dict(first.state_dict())
    resumed = QATSchedule(again, 4)
    resumed.load_state_dict(schedule.state_dict())
    assert repr(resumed) == repr(schedule)
    assert frozen(again) == (True, True)
    for net, each in ((first, schedule), (again, resumed)):
        epoch(net)
        each.step()
    a, b = buffers(first), buffers(again)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(first.eval()(X), again.eval()(X))


def test_repr() -> None:
    expected = "QATSchedule(epoch=0, epochs=10, freeze_batch_norm_at=4, freeze_ranges_at=6)"
    assert repr(QATSchedule(model(), 10)) == expected


@pytest.mark.parametrize("epochs", [0, -1, 2.0, True, "3", None])
def test_epochs_are_checked(epochs: Any) -> None:
    with pytest.raises(QatkitError, match=r"QATSchedule\(epochs=.*1 or more"):
        QATSchedule(model(), epochs)


@pytest.mark.parametrize("name", ["freeze_batch_norm_at", "freeze_ranges_at"])
@pytest.mark.parametrize("value", [-1, 1.5, False, "2"])
def test_settings_are_checked(name: str, value: Any) -> None:
    with pytest.raises(QatkitError, match=rf"QATSchedule\({name}=.*0 or more"):
        QATSchedule(model(), 3, **{name: value})


def test_model_is_checked() -> None:
    with pytest.raises(QatkitTypeError, match=r"not a torch\.nn\.Module"):
        QATSchedule(3, 3)  # type: ignore[arg-type]
    with pytest.raises(QatkitError, match=r"call qatkit\.prepare"):
        QATSchedule(nn.Linear(2, 2), 3)


GOOD = {"epoch": 2, "epochs": 4, "freeze_batch_norm_at": 0, "freeze_ranges_at": 0}


@pytest.mark.parametrize(
    "state",
    [{}, None, {**GOOD, "more": 1}, {**GOOD, "epoch": -1}, {**GOOD, "epochs": "4"}, [1, 2]],
)
def test_a_broken_state_changes_nothing(state: Any) -> None:
    net = model()
    net(X)
    schedule = QATSchedule(net, 7)
    before = schedule.state_dict()
    with pytest.raises(QatkitError, match="QATSchedule"):
        schedule.load_state_dict(state)
    assert schedule.state_dict() == before
    assert frozen(net) == (False, False)
