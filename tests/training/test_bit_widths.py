"""Widths go down stage by stage, ranges stay, and the end is the model that the config asks for."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import qatkit
from qatkit.config import ACTIVATION, WEIGHT, QuantConfig, Rule
from qatkit.errors import QatkitError
from qatkit.modes import quantizers
from qatkit.nn import QuantLinear
from qatkit.quantizer import TensorQuantizer
from qatkit.spec import QuantSpec
from qatkit.training.bit_widths import set_num_bits
from qatkit.training.schedule import QATSchedule
from tests.training.nets import W4A4, X, net, same, sgd, state, step


def widths(model: nn.Module) -> dict[str, int]:
    return {path: quantizer.spec.num_bits for path, quantizer in quantizers(model)}


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(),
        QuantSpec(symmetric=False),
        QuantSpec(signed=False),
        QuantSpec(power_of_two=True),
        QuantSpec(observer="fixed", fixed_range=(-1.5, 2.0)),
    ],
)
def test_the_range_stays_and_codes_are_those_of_the_new_width(spec: QuantSpec) -> None:
    x = torch.linspace(-1, 3, 50)
    quantizer = TensorQuantizer(spec)
    for _ in range(3):
        quantizer(x)
    before = state(quantizer)
    set_num_bits(quantizer, 4)
    assert same(state(quantizer), before)
    fresh = TensorQuantizer(spec.replace(num_bits=4))
    fresh.load_state_dict(before)
    assert torch.equal(quantizer.eval()(x), fresh.eval()(x))
    assert len(quantizer(x).unique()) <= 16


def test_without_a_range_there_is_none_afterwards() -> None:
    quantizer = TensorQuantizer(QuantSpec())
    set_num_bits(quantizer, 4)
    assert not quantizer.calibrated


def learned(num_bits: int) -> TensorQuantizer:
    """Return a quantizer that keeps the step of its grid."""
    return TensorQuantizer(QuantSpec(num_bits=num_bits, observer="lsq"))


def test_a_range_that_is_kept_as_a_scale_stays_too() -> None:
    quantizer = learned(8)
    quantizer.set_range(-63.5, 63.5)
    quantizer.num_batches.fill_(7)
    set_num_bits(quantizer, 4)
    assert quantizer.range[1].item() == pytest.approx(63.5)
    assert quantizer.scale.item() == pytest.approx(63.5 / 7)
    assert quantizer.num_batches.item() == 7


def test_a_learned_range_of_a_weight_starts_anew() -> None:
    spec = QuantSpec(num_bits=8, observer="lsq", memory="latest", narrow_range=True)
    layer = QuantLinear(64, 1, weight_spec=spec).train()
    x = torch.ones(2, 64)
    layer(x)
    assert layer.weight_quantizer.amax > 0.9 * layer.weight.abs().max()
    set_num_bits(layer.weight_quantizer, 2)
    layer(x)
    assert layer.weight_quantizer.calibrated
    assert layer.weight_quantizer.amax < 0.8 * layer.weight.abs().max()


def with_steps() -> QuantLinear:
    made = QuantLinear(4, 2)
    made.weight_quantizer = learned(4)
    made.input_quantizer = learned(4)
    return made


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("order", ["model, schedule", "schedule, model", "model first"])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_scale_that_is_resumed_is_that_of_the_state(
    steps: int, order: str, calibrated: bool
) -> None:
    def calibrate(made: QuantLinear) -> None:
        for _, quantizer in quantizers(made):
            quantizer.set_range(-1.0, 1.0)

    first = with_steps()
    calibrate(first)
    schedule = QATSchedule(first, 3, bits={0: 8, 1: 6, 2: 4}, freeze_ranges_at=9)
    for _ in range(steps):
        with torch.no_grad():
            first.weight_quantizer.step.mul_(1.25)  # type: ignore[operator]
        schedule.step()
    again = with_steps()
    if calibrated:
        calibrate(again)
    if order == "model first":
        again.load_state_dict(first.state_dict())
    resumed = QATSchedule(again, 3, bits={0: 8, 1: 6, 2: 4}, freeze_ranges_at=9)
    if order == "model, schedule":
        again.load_state_dict(first.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    if order == "schedule, model":
        again.load_state_dict(first.state_dict())
    assert same(state(again), state(first))
    assert widths(again) == widths(first)
    schedule.step()
    resumed.step()
    assert same(state(again), state(first))


def test_stages_leave_wider_and_narrower_quantizers_theirs() -> None:
    config = QuantConfig(
        weight=WEIGHT.replace(num_bits=3),
        activation=ACTIVATION.replace(num_bits=5),
        first_last_bits=8,
        rules=(Rule("layer2", num_bits=6), Rule("layer1.conv2", enabled=False)),
    )
    model = net(config)
    own = widths(model)
    schedule = QATSchedule(model, 6, bits={0: 8, 1: 6, 2: 4, 4: 3})
    for n, stage in enumerate((8, 6, 4, 4, 3, 3, 3)):
        assert widths(model) == {path: max(width, stage) for path, width in own.items()}, n
        schedule.step()
    assert widths(model) == own


def test_quantizers_of_one_scale_keep_one_grid() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1))
    qatkit.prepare(model, X, W4A4)
    schedule = QATSchedule(model, 2, bits={0: 8, 1: 8})
    for _ in range(3):
        for _, quantizer in quantizers(model):
            assert all(peer.spec.grid == quantizer.spec.grid for peer in quantizer.peers)
        schedule.step()


def test_unsigned_activations_stop_at_seven_bits() -> None:
    config = QuantConfig(
        weight=WEIGHT.replace(num_bits=4),
        activation=ACTIVATION.replace(num_bits=4),
        unsigned_activations=True,
    )
    model = net(config)
    unsigned = [path for path, each in quantizers(model) if not each.spec.signed]
    assert unsigned
    QATSchedule(model, 3, bits={0: 8, 1: 6, 2: 4})
    found = widths(model)
    assert {found[path] for path in unsigned} == {7}
    assert {found[path] for path in found if path not in unsigned} == {8}


def test_a_model_that_is_pickled_in_between_knows_its_own_widths() -> None:
    model = net()
    schedule = QATSchedule(model, 2, bits={0: 8, 1: 4})
    again = copy.deepcopy(model)
    resumed = QATSchedule(again, 2, bits={0: 8, 1: 4})
    resumed.load_state_dict(schedule.state_dict())
    resumed.step()
    assert min(widths(again).values()) == 4


def test_the_last_width_is_the_one_of_the_config() -> None:
    with pytest.raises(QatkitError, match=r"the last width is 6 and 'layer1\.conv1.* has 4"):
        QATSchedule(net(), 2, bits={0: 8, 1: 6})


def test_layers_by_hand() -> None:
    layer = QuantLinear(4, 2, weight_spec=QuantSpec(num_bits=3), input_spec=QuantSpec(num_bits=3))
    schedule = QATSchedule(layer, 2, bits={0: 5, 1: 3})
    assert set(widths(layer).values()) == {5}
    schedule.step()
    assert set(widths(layer).values()) == {3}


def test_the_export_is_that_of_a_model_that_had_its_widths_all_along(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = net()
    schedule = QATSchedule(model, 3, bits={0: 8, 1: 6, 2: 4})
    optimizer = sgd(model)
    for index in range(3):
        step(model, optimizer, index)
        schedule.step()
    plain = net()
    plain.load_state_dict(model.state_dict())
    plain_schedule = QATSchedule(plain, 3)
    plain_schedule.load_state_dict(schedule.state_dict() | {"bits": None})
    files = [tmp_path / "annealed.onnx", tmp_path / "plain.onnx"]
    for each, path in zip((model, plain), files, strict=True):
        report = qatkit.export_onnx(each.eval(), X, path)
        assert report.verify is not None
        assert report.verify.ok
    assert files[0].read_bytes() == files[1].read_bytes()
