"""The damping loss against a float64 oracle, the tracker against the algorithm as a plain loop."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.freeze import freeze_ranges
from qatkit.modes import disable_quantization
from qatkit.nn import QuantLinear
from qatkit.nn.weights import weights_of
from qatkit.spec import QuantSpec
from qatkit.training.bit_widths import set_num_bits
from qatkit.training.oscillation import OscillationTracker, oscillation_loss
from tests.training.nets import PER_TENSOR, W4A4, net, same, sgd, state, step


def layer(scale: float = 0.1, num_bits: int = 3) -> QuantLinear:
    """Return a layer whose weight has a frozen grid of steps ``scale``."""
    spec = QuantSpec(num_bits=num_bits, observer="minmax", memory="latest")
    made = QuantLinear(4, 3, weight_spec=spec)
    end = scale * spec.quant_max
    made.weight_quantizer.set_range(-end, end)
    made.weight_quantizer.observe = "never"
    return made


@pytest.mark.parametrize("config", [W4A4, PER_TENSOR], ids=["per channel", "per tensor, folded"])
@pytest.mark.parametrize("frozen", [False, True])
def test_loss_and_gradient(config: Any, frozen: bool) -> None:
    model = net(config)
    optimizer = sgd(model)
    for index in range(2):
        step(model, optimizer, index)
    if frozen:
        freeze_ranges(model).apply()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.3)  # some weights are outside of the range now
    before = state(model)
    model.zero_grad()
    loss = oscillation_loss(model)
    loss.backward()
    wanted = 0.0
    for weight in weights_of(model):
        seen = weight.seen.detach().double().numpy()
        spec = weight.quantizer.spec
        found = weight.quantizer.grid_for(weight.seen)
        assert found is not None
        scale = found[0].double().numpy()
        scale = scale.reshape(-1, *[1] * (seen.ndim - 1)) if spec.axis == 0 else scale
        codes = np.clip(np.round(seen / scale), spec.quant_min, spec.quant_max)
        clipped = np.clip(seen, spec.quant_min * scale, spec.quant_max * scale)
        wanted += ((codes * scale - clipped) ** 2).sum()
        inside = np.abs(seen - clipped) < 1e-7
        fold = None if weight.layer is None else weight.layer.weight_fold_scale()
        gradient = -2 * (codes * scale - clipped) * inside
        gradient = gradient * (1.0 if fold is None else fold.double().numpy())
        given = getattr(weight.owner, weight.name).grad.double().numpy()
        edge = np.abs(np.abs(seen) - spec.quant_max * scale) < 1e-6  # clamp's own choice
        assert np.allclose(given[~edge], gradient[~edge], atol=1e-6)
    assert loss.item() == pytest.approx(wanted, rel=1e-4)
    assert loss.item() > 0
    assert same(state(model), before)


def test_what_is_off_or_does_not_train_counts_nothing() -> None:
    model = net()
    with disable_quantization(model):
        assert oscillation_loss(model).item() == 0.0
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert oscillation_loss(model).item() == 0.0


def test_damping_pulls_the_weights_to_the_centers() -> None:
    made = layer()
    nn.init.uniform_(made.weight, -0.25, 0.25)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    first = oscillation_loss(made).item()
    for _ in range(100):
        optimizer.zero_grad()
        oscillation_loss(made).backward()
        optimizer.step()
    assert oscillation_loss(made).item() < 1e-6 < first


def set_codes(made: QuantLinear, codes: Tensor) -> None:
    with torch.no_grad():
        made.weight.copy_(codes * 0.1)


def plain_loop(history: list[np.ndarray[Any, Any]], m: float, threshold: float) -> Any:
    """Return the frozen codes, NaN where there are none: algorithm 1 weight by weight."""
    shape = history[0].shape
    result = np.full(shape, np.nan)
    for at in np.ndindex(shape):
        previous, direction, frequency = history[0][at], 0, 0.0
        average = float(previous)
        for codes in history[1:]:
            change = int(np.sign(codes[at] - previous))
            flips = change != 0 and change == -direction
            frequency = m * flips + (1 - m) * frequency
            direction = change or direction
            average = m * codes[at] + (1 - m) * average
            previous = codes[at]
            if frequency > threshold:
                result[at] = np.round(average)
                break
    return result


def test_the_tracker_does_what_the_algorithm_says() -> None:
    made, random = layer(), np.random.default_rng(3)
    history = [random.integers(-3, 4, (3, 4)) for _ in range(12)]
    tracker = OscillationTracker(made, threshold=0.35, momentum=0.1)
    for codes in history:
        set_codes(made, torch.from_numpy(codes))
        tracker.step()
    wanted = plain_loop(history, 0.1, 0.35)
    frozen = ~np.isnan(wanted)
    assert 0 < frozen.mean() < 1
    assert tracker.frozen == pytest.approx(frozen.mean())
    codes = np.round(made.weight.detach().numpy() / 0.1)
    assert np.array_equal(codes[frozen], wanted[frozen])
    assert np.array_equal(codes[~frozen], history[-1][~frozen])


def test_a_frozen_weight_stays_on_its_code_whatever_the_optimizer_does() -> None:
    model = net(PER_TENSOR)
    tracker = OscillationTracker(model, threshold=1e-9, momentum=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for index in range(8):
        step(model, optimizer, index)
        tracker.step()
    assert 0 < tracker.frozen < 1
    assert tracker.oscillating >= tracker.frozen / 2
    held = copy.deepcopy(tracker.state_dict())
    step(model, optimizer, 9)
    tracker.step()
    now = tracker.state_dict()
    for path, saved in held["weights"].items():
        kept = now["weights"][path]["codes"][saved["frozen"]]
        assert torch.equal(kept, saved["codes"][saved["frozen"]])


def test_without_a_threshold_it_only_counts() -> None:
    model = net()
    tracker = OscillationTracker(model, threshold=math.inf, momentum=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for index in range(6):
        step(model, optimizer, index)
        before = state(model)
        tracker.step()
        assert same(state(model), before)
    assert tracker.frozen == 0
    assert tracker.oscillating > 0


def test_another_width_starts_anew() -> None:
    made = layer()
    tracker = OscillationTracker(made, threshold=0.01, momentum=1.0)
    for n in (0, 1, 0, 1):
        set_codes(made, torch.full((3, 4), n))
        tracker.step()
    assert tracker.frozen == 1.0
    set_num_bits(made.weight_quantizer, 5)
    tracker.step()
    assert tracker.frozen == 0.0


def test_resume() -> None:
    runs = []
    for resume in (False, True):
        model = net()
        tracker = OscillationTracker(model, threshold=0.05, momentum=0.2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for index in range(8):
            if resume and index == 4:
                saved = tracker.state_dict()
                tracker = OscillationTracker(model)
                tracker.load_state_dict(saved)
            step(model, optimizer, index)
            tracker.step()
        runs.append((state(model), tracker.frozen))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1] > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": 0},
        {"threshold": math.nan},
        {"momentum": 0},
        {"momentum": 1.5},
        {"threshold": True},
    ],
)
def test_settings_are_checked(settings: Any) -> None:
    with pytest.raises(QatkitError, match=r"OscillationTracker\((threshold|momentum)="):
        OscillationTracker(layer(), **settings)


def test_illegal_input() -> None:
    with pytest.raises(QatkitError, match=r"call qatkit\.prepare"):
        oscillation_loss(nn.Linear(2, 2))
    with pytest.raises(QatkitError, match=r"call qatkit\.prepare"):
        OscillationTracker(nn.Linear(2, 2))
    made = layer()
    tracker = OscillationTracker(made)
    tracker.step()
    good = tracker.state_dict()
    for bad in (
        {},
        None,
        {**good, "weights": {"x": {}}},
        {
            **good,
            "weights": {
                "weight_quantizer": {**good["weights"]["weight_quantizer"], "codes": torch.zeros(1)}
            },
        },
    ):
        with pytest.raises(QatkitError, match=r"OscillationTracker\.load_state_dict"):
            tracker.load_state_dict(bad)
    tracker.load_state_dict(good)
