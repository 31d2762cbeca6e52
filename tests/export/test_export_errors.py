"""What cannot be exported says so in one line, and leaves everything as it was."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qatkit
from qatkit import QatkitError, QuantConfig, QuantSpec
from qatkit.nn import QuantLinear

X = torch.randn(2, 3, 8, 8)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)
    )


def ready(model, x=X, config=None):
    qatkit.prepare(model, x, config)
    qatkit.calibrate(model, [x], progress=False)
    return model


def exported(model, path, x=X, **more):
    return qatkit.export_onnx(model, x, path, **more)


def fails(model, path, message, x=X, **more):
    """Export must fail in one line; model, files and PyTorch's settings are as they were."""
    before = snapshot(model) if isinstance(model, nn.Module) else None
    there = contents(Path(path).parent)
    with pytest.raises(QatkitError, match=message) as error:
        qatkit.export_onnx(model, x, path, **more)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    assert contents(Path(path).parent) == there
    if before is not None:
        unchanged(before, snapshot(model))


def contents(folder):
    if not folder.is_dir():
        return None
    return {p.name: p.read_bytes() if p.is_file() else None for p in folder.iterdir()}


def snapshot(model):
    from torch.onnx._internal.torchscript_exporter import registration

    known = {
        name: sorted(group._functions) + sorted(group._functions._overrides)
        for name, group in registration.registry._registry.items()
    }
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "flags": [module.training for module in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "grad": [p.requires_grad for p in model.parameters()],
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "registry": known,
        "random": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
        "exporting": torch.onnx.is_in_onnx_export(),
        "threads": torch.get_num_threads(),
    }


def unchanged(before, after):
    for name in before:
        if name == "state":
            assert before[name].keys() == after[name].keys()
            assert all(torch.equal(value, after[name][key]) for key, value in before[name].items())
        elif name == "random":
            assert torch.equal(before[name], after[name])
        else:
            assert before[name] == after[name], name


@pytest.mark.parametrize("training", [True, False])
def test_success_changes_nothing_either(tmp_path, training):
    model = ready(network()).train(training)
    exported(model, tmp_path / "warm.onnx")
    before = snapshot(model)
    exported(model, tmp_path / "a.onnx")
    unchanged(before, snapshot(model))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "warm.onnx"]


def test_uncalibrated_quantizer_is_named(tmp_path):
    model = qatkit.prepare(network(), X)
    fails(model, tmp_path / "a.onnx", "0.input_quantizer: has no range; run qatkit.calibrate")
    qatkit.calibrate(model, [X], progress=False)
    model[4].input_quantizer.reset_range()
    fails(model, tmp_path / "a.onnx", "4.input_quantizer: has no range")
    qatkit.disable_quantization(model, "4.input_quantizer").apply()
    exported(model, tmp_path / "a.onnx", lint=False)


def test_an_uncalibrated_quantizer_that_is_not_reached_is_no_obstacle(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.aux = nn.Conv2d(3, 4, 1), QuantLinear(2, 2)

        def forward(self, x):
            return self.aux(x) if x.dim() == 2 else self.f(x)

    net = Net()
    aux, net.aux = net.aux, nn.Identity()
    ready(net)
    net.aux = aux
    exported(net, tmp_path / "a.onnx")


def test_without_quantizers(tmp_path):
    fails(network(), tmp_path / "a.onnx", r"has no quantizers; call qatkit.prepare")


@pytest.mark.parametrize("model", [None, "model.pt", nn.Linear, {}])
def test_no_module(tmp_path, model):
    fails(model, tmp_path / "a.onnx", "nn.Module")


@pytest.mark.parametrize("opset", [9, 11, 12, 24, "13", 13.0, None, True])
def test_opset(tmp_path, opset):
    fails(ready(network()), tmp_path / "a.onnx", "give 13..23", opset=opset)


@pytest.mark.parametrize("weights", ["int4", None, 8])
def test_weights(tmp_path, weights):
    fails(ready(network()), tmp_path / "a.onnx", "give 'float' or 'int8'", weights=weights)


def test_paths(tmp_path):
    model = ready(network())
    fails(model, tmp_path, "is a folder")
    fails(model, tmp_path / "missing" / "a.onnx", "cannot be written")
    (tmp_path / "file").write_text("")
    fails(model, tmp_path / "file" / "a.onnx", "cannot be written")


def test_unwritable_directory(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("runs as root")
        fails(ready(network()), folder / "a.onnx", "cannot be written")
    finally:
        folder.chmod(0o700)


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    def opened(path, mode="r", *args, **kwargs):
        return Full() if "w" in mode else real(path, mode, *args, **kwargs)

    real = Path.open
    model = ready(network())
    monkeypatch.setattr(Path, "open", opened)
    fails(model, tmp_path / "a.onnx", "No space left on device")


class GridSample(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        grid = x.new_zeros(2, 8, 8, 2)
        return F.grid_sample(self.f(x), grid, "bicubic", align_corners=False)


class NoSymbol(GridSample):
    def forward(self, x):
        return torch.linalg.svdvals(self.f(x))


class Raises(GridSample):
    def forward(self, x):
        y = self.f(x)
        if torch.onnx.is_in_onnx_export():
            raise ValueError("not for export\nat all")
        return y


def test_an_operator_that_opset_13_cannot_express_names_the_one_that_can(tmp_path):
    model = ready(GridSample())
    fails(model, tmp_path / "a.onnx", "opset 13 cannot express it.*grid_sampler.*16")
    assert exported(model, tmp_path / "a.onnx", opset=16).verify.ok


def test_an_operator_that_no_opset_has(tmp_path):
    fails(ready(NoSymbol()), tmp_path / "a.onnx", "cannot express|exporter fails")


def test_an_exception_of_the_users_code(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"the file before")
    fails(ready(Raises()), path, "not for export")
    assert path.read_bytes() == b"the file before"


@pytest.mark.parametrize("inputs", [torch.zeros(2, 5, 8, 8), (X, X), {"wrong": X}, None, "x", ()])
def test_wrong_inputs(tmp_path, inputs):
    fails(ready(network()), tmp_path / "a.onnx", "Sequential: does not run|got NoneType", x=inputs)


def test_a_failing_verification_leaves_the_file_before(tmp_path, monkeypatch):
    from qatkit.export import exporter

    def broken(*args, **kwargs):
        raise QatkitError("verify: broken on purpose")

    path = tmp_path / "a.onnx"
    path.write_bytes(b"the file before")
    monkeypatch.setattr(exporter, "verify_onnx", broken)
    fails(ready(network()), path, "broken on purpose")
    assert path.read_bytes() == b"the file before"


def test_grids_that_tensorrt_refuses(tmp_path):
    wide = QuantConfig(activation=QuantSpec(num_bits=12))
    fails(ready(network(), config=wide), tmp_path / "a.onnx", "input_quantizer: codes up to 2047")
    layer = QuantLinear(4, 4, input_spec=QuantSpec(symmetric=False, signed=False))
    model = nn.Sequential(layer)
    qatkit.calibrate(model, [torch.randn(3, 4)], progress=False)
    fails(model, tmp_path / "a.onnx", "zero point", x=torch.randn(3, 4))


def test_interrupts_are_not_swallowed_and_leave_nothing(tmp_path):
    class Interrupted(Raises):
        def forward(self, x):
            if torch.onnx.is_in_onnx_export():
                raise KeyboardInterrupt
            return self.f(x)

    model = ready(Interrupted())
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        exported(model, tmp_path / "a.onnx")
    unchanged(before, snapshot(model))
    assert list(tmp_path.iterdir()) == []
