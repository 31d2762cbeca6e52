"""Calibration: what it takes as data, what it leaves behind, and what it refuses."""

from __future__ import annotations

import copy
import logging
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qatkit.calibrate import CalibrationReport, calibrate
from qatkit.errors import QatkitError, QatkitTypeError
from qatkit.freeze import freeze_ranges
from qatkit.modes import disable_quantization, quantizers
from qatkit.nn import QuantLinear
from qatkit.prepare import prepare
from qatkit.spec import QuantSpec

X = torch.linspace(-3, 5, 2 * 3 * 6 * 6).reshape(2, 3, 6, 6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(torch.relu(self.bn(self.conv(image))).mean((2, 3)))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = QuantLinear(2, 2)
        self.b = QuantLinear(2, 2)

    def forward(self, left: Tensor, right: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.a(left) + self.b(right)
        return y if scale is None else y * scale


def prepared() -> nn.Module:
    return prepare(Net(), X)


def state(model: nn.Module) -> dict[str, Any]:
    """Return everything that calibration must not leave changed but for ranges."""
    return {
        path: (m.training, m.observe, m.quantize, m.spec, len(m._forward_pre_hooks))
        for path, m in quantizers(model)
    } | {f"{path}.training": m.training for path, m in model.named_modules()}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


Pair = namedtuple("Pair", "image label")


@pytest.mark.parametrize(
    "batch",
    [X, (X, 1), [X, torch.zeros(2)], (X,), Pair(X, 0), {"image": X, "label": 1}, (X, "text", None)],
    ids=["tensor", "tuple", "list", "single", "namedtuple", "dict", "odd targets"],
)
def test_forms_of_a_batch(batch: Any) -> None:
    model, wanted = prepared(), prepared()
    wanted.load_state_dict(model.state_dict())
    calibrate(wanted, [X])
    report = calibrate(model, [batch])
    assert equal(buffers(model), buffers(wanted))
    assert (report.batches, report.samples) == (1, 2)


@pytest.mark.parametrize("example", [X, {"image": X}], ids=["by position", "by name"])
def test_a_rewritten_model_gets_its_input_as_in_the_example(example: Any) -> None:
    model = prepare(Net(), example)
    for batch in (X, (X, 1), {"image": X, "label": 1}):
        assert calibrate(model, [batch]).samples == 2


def test_several_arguments() -> None:
    model, left, right = Two(), torch.ones(3, 2), torch.full((3, 2), -2.0)
    for batch in ((left, right), [left, right, "target"], {"right": right, "left": left, "y": 0}):
        assert calibrate(model, [batch]).samples == 3
        assert model.a.input_quantizer.max_val == 1
        assert model.b.input_quantizer.min_val == -2
    with pytest.raises(QatkitTypeError, match=r"batch 0 is a tuple of 1, Two.forward takes 2"):
        calibrate(model, [(left,)])
    with pytest.raises(QatkitTypeError, match=r"keys 'left', .* requires right"):
        calibrate(model, [{"left": left}])


def test_a_forward_that_does_not_tell_its_arguments() -> None:
    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.module = model

        def forward(self, *inputs: Any, **kwargs: Any) -> Any:
            return self.module(*inputs, **kwargs)

    assert calibrate(Wrapper(prepared()), [(X, 0)]).samples == 2


def test_data_loader_and_batches() -> None:
    model = prepared()
    loader = DataLoader(TensorDataset(X.repeat(4, 1, 1, 1), torch.zeros(8)), batch_size=2)
    assert calibrate(model, loader).samples == 8
    report = calibrate(model, loader, batches=2)
    assert (report.batches, report.samples) == (2, 4)


def test_takes_no_more_than_asked_from_an_iterator() -> None:
    pulled = []

    def data() -> Iterator[Tensor]:
        for i in range(10):
            pulled.append(i)
            yield X

    calibrate(prepared(), data(), batches=3)
    assert pulled == [0, 1, 2]


def test_twice_is_once() -> None:
    model = prepared()
    calibrate(model, [X, 2 * X])
    first = buffers(model)
    calibrate(model, [X, 2 * X])
    assert equal(buffers(model), first)


def test_modes_and_flags_are_restored() -> None:
    model = prepared().train()
    model.bn.eval()
    calibrate(model, [X])
    freeze_ranges(model).apply()
    disable_quantization(model, "conv").apply()
    before, tensors = state(model), buffers(model)
    calibrate(model, [X])
    assert state(model) == before
    after = buffers(model)
    assert equal(
        {k: v for k, v in tensors.items() if "quantizer" not in k},
        {k: v for k, v in after.items() if "quantizer" not in k},
    )


def test_the_models_own_train_is_not_called() -> None:
    class Fussy(Net):
        def train(self, mode: bool = True) -> Fussy:
            raise AssertionError("called")

    model = Fussy()
    model.training = True
    calibrate(prepare(Net(), X), [X])
    child = prepare(Net(), X)
    child.train = model.train  # type: ignore[method-assign]
    calibrate(child, [X])


def broken() -> Iterator[Any]:
    yield X
    raise OSError("disk gone")


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], QatkitError, "no batches"),
        (iter(()), QatkitError, "no batches"),
        (broken(), OSError, "disk gone"),
        ([X, "text"], QatkitTypeError, "batch 1 is a str without a tensor"),
        ([X, 3], QatkitTypeError, "batch 1 is a int"),
        ([()], QatkitTypeError, "batch 0 is a tuple of 0"),
        ([("a", X)], QatkitTypeError, "without a tensor"),
        ([{"img": X, "y": 1}], QatkitTypeError, "keys 'img', 'y', Net.forward takes image and"),
        ([X, X[:, :1]], QatkitError, r"Net: does not run on batch 1, \(2, 1, 6, 6\) torch.float32"),
        (X, QatkitTypeError, "data is a Tensor"),
        ({"image": X}, QatkitTypeError, "data is a dict"),
        (None, QatkitTypeError, "data is a NoneType"),
    ],
)
def test_bad_data_loses_nothing(data: Any, error: type[Exception], message: str) -> None:
    model = prepared().train()
    calibrate(model, [X])
    flags, tensors = state(model), buffers(model)
    calibrated = [quantizer.calibrated for _, quantizer in quantizers(model)]
    with pytest.raises(error, match=message) as caught:
        calibrate(model, data)
    assert "\n" not in str(caught.value)
    assert state(model) == flags
    assert equal(buffers(model), tensors)
    assert [quantizer.calibrated for _, quantizer in quantizers(model)] == calibrated


def test_a_failure_leaves_an_uncalibrated_model_uncalibrated() -> None:
    model = prepared()
    with pytest.raises(OSError, match="disk gone"):
        calibrate(model, broken())
    assert not any(quantizer.calibrated for _, quantizer in quantizers(model))


@pytest.mark.parametrize("batches", [0, -1, 1.5, True, "2"])
def test_batches_is_checked(batches: Any) -> None:
    with pytest.raises(QatkitError, match="give a positive integer"):
        calibrate(prepared(), [X], batches=batches)


@pytest.mark.parametrize("method", ["minmx", "fixed", "entropi", 3, ["minmax"]])
def test_method_is_checked(method: Any) -> None:
    with pytest.raises(QatkitError, match=r"unknown method, .*choose one of"):
        calibrate(prepared(), [X], method=method)


def test_suggests_a_method() -> None:
    with pytest.raises(QatkitError, match="did you mean 'minmax'"):
        calibrate(prepared(), [X], method="minmx")


@pytest.mark.parametrize("model", [3, None, Net, [Net()]])
def test_model_is_checked(model: Any) -> None:
    with pytest.raises(QatkitTypeError, match=r"not a torch\.nn\.Module"):
        calibrate(model, [X])


def test_a_float_model_is_refused() -> None:
    with pytest.raises(QatkitError, match=r"Net has no quantizers, call qatkit\.prepare"):
        calibrate(Net(), [X])


def test_method_is_for_the_activations_of_this_run() -> None:
    model = prepared()
    specs = [quantizer.spec for _, quantizer in quantizers(model)]
    calibrate(model, [X, 3 * X], method="average")
    assert model.conv.input_quantizer.max_val.item() == pytest.approx(10)
    assert [quantizer.spec for _, quantizer in quantizers(model)] == specs
    calibrate(model, [X, 3 * X], method="minmax")
    assert model.conv.input_quantizer.max_val.item() == 15
    amax = model.conv.weight.detach().abs().amax((1, 2, 3))
    assert torch.equal(model.conv.weight_quantizer.amax, amax)


def test_fixed_ranges_stay_fixed() -> None:
    layer = QuantLinear(2, 2, input_spec=QuantSpec(observer="fixed", fixed_range=(-7.0, 7.0)))
    calibrate(layer, [torch.ones(1, 2)], method="minmax")
    assert layer.input_quantizer.amax == 7


def test_ranges_are_those_of_the_unquantized_model() -> None:
    model = prepared().eval()
    calibrate(model, [X], method="minmax")
    with disable_quantization(model), torch.no_grad():
        h = torch.relu(model.bn(model.conv(X))).mean((2, 3))
    assert torch.equal(model.fc.input_quantizer.max_val, h.max())


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = QuantLinear(2, 2)
        self.idle = QuantLinear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.idle(x) if self.training else self.used(x)


def test_unreached_quantizers_keep_their_range(caplog: pytest.LogCaptureFixture) -> None:
    model = Branches()
    model.idle.input_quantizer.set_range(-4.0, 4.0)
    with caplog.at_level(logging.WARNING):
        report = calibrate(model, [torch.ones(1, 2)])
    assert report.unreached == ("idle.input_quantizer", "idle.weight_quantizer")
    assert "no data reached idle.input_quantizer" in caplog.text
    assert model.idle.input_quantizer.amax == 4
    assert model.idle.input_quantizer.calibrated
    assert not model.idle.weight_quantizer.calibrated
    assert "saw nothing" in str(report)


def test_nonfinite_values_are_counted_once_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    model = QuantLinear(2, 2)
    odd = torch.tensor([[1.0, float("nan")], [float("inf"), -2.0]])
    with caplog.at_level(logging.WARNING):
        report = calibrate(model, [odd, odd])
    assert report.nonfinite == (("input_quantizer", 4),)
    assert len(caplog.records) == 1
    assert "ignored 4 NaN or Inf" in str(report)
    assert (report.ranges[0].min, report.ranges[0].max) == (-2, 1)


def test_a_sum_that_overflows_is_no_infinity() -> None:
    report = calibrate(QuantLinear(2, 2), [torch.full((1, 2), 3e38)])
    assert report.nonfinite == ()
    assert report.ranges[0].max == pytest.approx(3e38)


def test_report_reads_well() -> None:
    report = calibrate(prepared(), [X])
    text = str(report)
    assert text.startswith("5 ranges from 1 batches, 2 samples; 0 quantizers unreached, 0 saw NaN")
    assert {entry.path for entry in report.ranges} == {
        *(f"{layer}.{role}_quantizer" for layer in ("conv", "fc") for role in ("input", "weight")),
        "mean_quantizer",
    }
    assert all(entry.path in text for entry in report.ranges)
    with pytest.raises(AttributeError):
        report.batches = 3  # type: ignore[misc]
    assert isinstance(report, CalibrationReport)


def test_progress_bar_only_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate(prepared(), [X], progress=True)
    assert capsys.readouterr() == ("", "")


def test_works_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    assert calibrate(prepared(), (X for _ in range(2))).batches == 2


def test_a_compiled_model() -> None:
    model = prepared().eval()
    wanted = copy.deepcopy(model)
    calibrate(wanted, [X])
    model.compile(backend="eager", fullgraph=True)
    with disable_quantization(model), torch.no_grad():
        model(X)
    calibrate(model, [X])
    assert equal(buffers(model), buffers(wanted))
