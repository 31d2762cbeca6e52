"""Calibration by the histograms of all samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatkit.calibrate import calibrate, methods
from qatkit.errors import QatkitError
from qatkit.modes import disable_quantization, quantizers
from qatkit.nn import QuantLinear
from qatkit.observers import CALIBRATORS
from qatkit.prepare import prepare
from qatkit.quantizer import TensorQuantizer
from qatkit.spec import QuantSpec

X = torch.linspace(-3, 5, 2 * 3 * 6 * 6).reshape(2, 3, 6, 6)
HISTOGRAMS = [name for name in CALIBRATORS if name != "max"]
NAN = float("nan")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(torch.relu(self.bn(self.conv(image))).mean((2, 3)))


def prepared() -> nn.Module:
    return prepare(Net(), X)


def ends(quantizer: Any) -> tuple[float, float]:
    return tuple(float(end) for end in quantizer.range)  # type: ignore[return-value]


def state(model: nn.Module) -> dict[str, Any]:
    return {
        path: (m.training, m.observe, m.quantize, m.spec, len(m._forward_pre_hooks))
        for path, m in quantizers(model)
    } | {f"{path}.training": m.training for path, m in model.named_modules()}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_names() -> None:
    assert set(CALIBRATORS) <= set(methods())
    assert len(methods()) == len(set(methods()))


@pytest.mark.parametrize("method", CALIBRATORS)
def test_sets_all_ranges_and_leaves_the_rest(method: str) -> None:
    model = prepared().train()
    before = state(model)
    report = calibrate(model, [X, 2 * X, X / 2], method=method)
    assert state(model) == before
    assert not report.unreached
    assert (report.batches, report.samples) == (3, 6)
    for path, quantizer in quantizers(model):
        low, high = quantizer.range
        assert (low <= high).all(), path
        assert (high - low).min() > 0
    low, high = ends(model.conv.input_quantizer)
    assert -6 <= low < 0 < high <= 10
    assert model.conv.input_quantizer.num_batches == 3
    amax = model.conv.weight.detach().abs().amax((1, 2, 3))
    assert torch.equal(model.conv.weight_quantizer.amax, amax)


@pytest.mark.parametrize("method", [*HISTOGRAMS, "max"])
def test_the_next_layer_is_seen_unquantized(method: str) -> None:
    model = prepared().eval()
    calibrate(model, [X], method=method)
    with disable_quantization(model), torch.no_grad():
        h = torch.relu(model.bn(model.conv(X))).mean((2, 3))
    low, high = ends(model.fc.input_quantizer)
    assert h.min() <= low <= high <= h.max()
    if method == "max":
        assert high == h.max()


def test_percentile_and_coverage_reach_the_calibrator() -> None:
    model = nn.Sequential(QuantLinear(1, 1))
    x = torch.arange(1000.0)[:, None]
    found = []
    for p in (50.0, 90.0, 100.0):
        calibrate(model, [x], method="percentile", percentile=p)
        found.append(float(model[0].input_quantizer.amax))
    assert found == pytest.approx([500, 900, 999], abs=1)
    calibrate(model, [x], method="two-pointer", coverage=0.5)
    assert model[0].input_quantizer.amax < 600
    calibrate(model, [x], method="two-pointer", coverage=1.0)
    assert model[0].input_quantizer.amax == 999


def test_all_batches_count_alike() -> None:
    one, split = prepared().eval(), prepared().eval()
    split.load_state_dict(one.state_dict())
    x = torch.randn(16, 3, 6, 6)
    for method in ("percentile", "entropy", "kld", "mse", "sigma", "aciq", "octav", "two-pointer"):
        calibrate(one, [x], method=method)
        calibrate(split, [x[12:], x[:2], x[2:12]], method=method)
        assert ends(one.conv.input_quantizer) == ends(split.conv.input_quantizer), method


@pytest.mark.parametrize("method", HISTOGRAMS)
def test_odd_tensors(method: str) -> None:
    model = nn.Sequential(QuantLinear(2, 2))
    odd = torch.tensor([[NAN, 1.0], [float("inf"), -2.0]])
    report = calibrate(model, [torch.zeros(3, 2), odd, torch.zeros(0, 2)], method=method)
    assert dict(report.nonfinite)["0.input_quantizer"] == 2
    low, high = ends(model[0].input_quantizer)
    assert -2 <= low <= high <= 1
    calibrate(model, [torch.zeros(3, 2)], method=method)
    assert ends(model[0].input_quantizer) == (0, 0)


@pytest.mark.parametrize("method", HISTOGRAMS)
def test_a_failure_restores_everything(method: str) -> None:
    model = prepared()
    calibrate(model, [X], method="minmax")
    flags, tensors = state(model), buffers(model)

    def broken() -> Any:
        yield 5 * X
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        calibrate(model, broken(), method=method)
    assert state(model) == flags
    assert equal(buffers(model), tensors)


def test_unreached_quantizers_keep_their_range() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = QuantLinear(2, 2), QuantLinear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Unused()
    model.unused.input_quantizer.set_range(-3.0, 4.0)
    report = calibrate(model, [torch.ones(2, 2)], method="entropy")
    assert "unused.input_quantizer" in report.unreached
    assert ends(model.unused.input_quantizer) == (-3, 4)


def test_fixed_ranges_stay_fixed() -> None:
    layer = QuantLinear(2, 2, input_spec=QuantSpec(observer="fixed", fixed_range=(-7.0, 7.0)))
    calibrate(layer, [torch.ones(1, 2)], method="entropy")
    assert layer.input_quantizer.amax == 7


def test_one_range_per_channel_is_refused() -> None:
    layer = QuantLinear(2, 2)
    layer.input_quantizer = TensorQuantizer(QuantSpec(axis=-1), 2)
    flags, tensors = state(layer), buffers(layer)
    with pytest.raises(QatkitError, match=r"input_quantizer: .*'entropy'.* axis -1"):
        calibrate(layer, [torch.ones(1, 2)], method="entropy")
    assert state(layer) == flags
    assert equal(buffers(layer), tensors)


def test_the_same_module_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = QuantLinear(2, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x))

    model = Twice()
    calibrate(model, [torch.ones(1, 2)] * 2, method="percentile")
    assert model.fc.input_quantizer.num_batches == 4


@pytest.mark.parametrize(
    "setting", [{"percentile": 0}, {"percentile": 101}, {"coverage": 0}, {"coverage": "1"}]
)
def test_settings_are_checked(setting: dict[str, Any]) -> None:
    with pytest.raises(QatkitError, match=f"calibrate.{next(iter(setting))}="):
        calibrate(prepared(), [X], method="percentile", **setting)


def test_suggests_a_calibrator() -> None:
    with pytest.raises(QatkitError, match="did you mean 'percentile'"):
        calibrate(prepared(), [X], method="percentil")
