"""The schedule freezes at the configured epochs, and again when it is resumed."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError, QatkitTypeError
from qatkit.modes import quantizers
from qatkit.nn.batchnorm import statistics_are_frozen
from qatkit.prepare import prepare
from qatkit.training.oscillation import oscillation_loss
from qatkit.training.schedule import QATSchedule

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


def test_ti_is_the_default() -> None:
    for epochs in (1, 5, 10):
        assert repr(QATSchedule.ti(model(), epochs)) == repr(QATSchedule(model(), epochs))


def on(net: nn.Module) -> dict[str, bool]:
    return {path: quantizer.quantize for path, quantizer in quantizers(net)}


@pytest.mark.parametrize("weights_at", [0, 1, 3])
@pytest.mark.parametrize("activations_at", [0, 2])
def test_delay(weights_at: int, activations_at: int) -> None:
    net = model()
    schedule = QATSchedule(
        net, 3, quantize_weights_at=weights_at, quantize_activations_at=activations_at
    )
    for n in range(4):
        assert on(net) == {
            "0.weight_quantizer": n >= weights_at,
            "0.input_quantizer": n >= activations_at,
        }
        epoch(net)
        schedule.step()


def test_ranges_are_observed_during_the_delay_and_the_model_is_the_float_one() -> None:
    float_net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    net = copy.deepcopy(float_net)
    prepare(net, X)
    schedule = QATSchedule(net, 2, quantize_weights_at=1, quantize_activations_at=1)
    assert torch.equal(net(X), float_net(X))
    assert all(quantizer.calibrated for _, quantizer in quantizers(net))
    schedule.step()
    assert not torch.equal(net(X), float_net(X))


def test_a_delay_leaves_alone_what_was_off_and_what_is_switched_on_by_hand() -> None:
    net = model()
    net[0].weight_quantizer.quantize = False
    schedule = QATSchedule(net, 4, quantize_weights_at=2, quantize_activations_at=2)
    net[0].input_quantizer.quantize = True
    schedule.step()
    assert on(net) == {"0.weight_quantizer": False, "0.input_quantizer": True}
    schedule.step()
    assert on(net) == {"0.weight_quantizer": False, "0.input_quantizer": True}


def test_freezing_before_the_delay_is_over_leaves_out_what_has_no_range() -> None:
    net = model()
    schedule = QATSchedule(net, 4, freeze_ranges_at=0, quantize_activations_at=1)
    assert net[0].input_quantizer.observe == "training"
    assert net[0].weight_quantizer.observe == "never"
    net(X)
    schedule.step()
    assert net[0].input_quantizer.quantize
    assert not torch.equal(net[0].input_quantizer(X), X)


def test_steps_and_fractions() -> None:
    net = model()
    net(X)
    schedule = QATSchedule(
        net,
        2,
        steps_per_epoch=4,
        freeze_batch_norm_at=0.25,
        freeze_ranges_at=1.5,
        quantize_weights_at=0.5,
    )
    seen = [(statistics_are_frozen(net[1]), on(net)["0.weight_quantizer"], frozen(net)[1])]
    for _ in range(8):
        schedule.step()
        seen.append(
            (*[statistics_are_frozen(net[1])], on(net)["0.weight_quantizer"], frozen(net)[1])
        )
    assert [n for n in range(9) if seen[n][0]] == list(range(1, 9))
    assert [n for n in range(9) if seen[n][1]] == list(range(2, 9))
    assert [n for n in range(9) if seen[n][2]] == list(range(6, 9))
    assert (schedule.epoch, schedule.steps) == (2, 8)


def test_it_takes_a_wrapped_model_and_its_state_fits_the_bare_one() -> None:
    net = model()
    wrapped = QATSchedule(nn.DataParallel(net), 2, quantize_weights_at=1)
    bare = QATSchedule(model(), 2)
    bare.load_state_dict(wrapped.state_dict())
    assert bare.state_dict() == wrapped.state_dict()


def test_damping_grows_by_a_cosine() -> None:
    schedule = QATSchedule(model(), 4, damping=0.1)
    seen = []
    for _ in range(5):
        seen.append(schedule.damping)
        schedule.step()
    wanted = [0.05 * (1 - math.cos(math.pi * n / 4)) for n in range(5)]
    assert seen == pytest.approx(wanted)
    late = QATSchedule(model(), 4, damping=0.1, quantize_weights_at=2)
    late.step()
    assert late.damping_loss() == 0.0


def test_damping_loss_is_the_weighted_oscillation_loss() -> None:
    net = model()
    schedule = QATSchedule(net, 2, damping=0.5)
    assert schedule.damping_loss() == 0.0
    schedule.step()
    loss = schedule.damping_loss()
    assert torch.equal(torch.as_tensor(loss), 0.25 * oscillation_loss(net))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantize_weights_at": 4}, "nothing would be quantized"),
        ({"quantize_activations_at": -1}, "0 or more"),
        ({"freeze_ranges_at": 0.5}, "fractions need steps_per_epoch"),
        ({"steps_per_epoch": 0}, "1 or more"),
        ({"damping": -1.0}, "0 or more"),
        ({"damping": float("nan")}, "0 or more"),
        ({"bits": {}}, "from epoch 0 on"),
        ({"bits": {1: 8}}, "from epoch 0 on"),
        ({"bits": {0: 16, 4: 8}}, "none after epoch 3"),
        ({"bits": {0: 8, 1: 4}}, "end with 8"),
        ({"bits": {0: 9}}, "end with 8"),
        ({"bits": {0: 1}}, "from 2 to 16"),
        ({"bits": {0: "8"}}, "from 2 to 16"),
        ({"bits": {"0": 8}}, "integer number of epochs"),
        ({"bits": 8}, "dict from epoch to width"),
        ({"bits": {0: 8, "1": 8}}, "dict from epoch to width"),
    ],
)
def test_more_settings_are_checked(settings: Any, message: str) -> None:
    net = model()
    before = on(net)
    with pytest.raises(QatkitError, match=message):
        QATSchedule(net, 3, **settings)
    assert on(net) == before


def good() -> dict[str, Any]:
    schedule = QATSchedule(model(), 4, quantize_weights_at=3, bits={0: 8})
    schedule.step()
    return schedule.state_dict()


BROKEN = {
    "empty": lambda state: {},
    "none": lambda state: None,
    "list": lambda state: [1, 2],
    "one more": lambda state: {**state, "more": 1},
    "one less": lambda state: {name: state[name] for name in list(state)[1:]},
    "steps": lambda state: {**state, "steps": -1},
    "too many steps": lambda state: {**state, "steps": 5},
    "steps are no integer": lambda state: {**state, "steps": True},
    "epochs": lambda state: {**state, "epochs": "4"},
    "bits": lambda state: {**state, "bits": [[0, 4]]},
    "bits are no pairs": lambda state: {**state, "bits": [3]},
    "another quantizer": lambda state: {
        **state, "quantizers": {**state["quantizers"], "x": [True, "never", 8]}
    },
    "no quantizers": lambda state: {**state, "quantizers": None},
    "no switch": lambda state: {
        **state, "quantizers": {**state["quantizers"], "0.weight_quantizer": [1, "never", 8]}
    },
    "no mode": lambda state: {
        **state, "quantizers": {**state["quantizers"], "0.weight_quantizer": [True, "often", 8]}
    },
    "no width": lambda state: {
        **state, "quantizers": {**state["quantizers"], "0.weight_quantizer": [True, "never", 1]}
    },
    "batch norms": lambda state: {**state, "frozen_batch_norms": ["7"]},
    "held": lambda state: {**state, "held": {"weight": ["7"], "activation": []}},
    "held by no role": lambda state: {**state, "held": {}},
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_state_changes_nothing(kind: str) -> None:
    net = model()
    net(X)
    schedule = QATSchedule(net, 7)
    before = copy.deepcopy(schedule.state_dict())
    with pytest.raises(QatkitError, match=r"QATSchedule|QuantSpec"):
        schedule.load_state_dict(BROKEN[kind](good()))
    assert schedule.state_dict() == before
    assert frozen(net) == (False, False)
    schedule.load_state_dict(good())
    assert schedule.state_dict() == good()


def test_the_state_is_plain() -> None:
    state = good()
    assert json.loads(json.dumps(state)) == state
