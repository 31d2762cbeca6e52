"""`verify_onnx` must find a file that computes something else."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import qatkit
from qatkit import QatkitError
from qatkit.export import codes
from qatkit.export.onnx_file import OnnxFile

X = torch.randn(4, 3, 8, 8)


def network(width=8):
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36 * width, 4),
    )
    model(X)
    model.eval()
    qatkit.prepare(model, X)
    qatkit.calibrate(model, [X], progress=False)
    return model


@pytest.fixture
def pair(tmp_path):
    model = network()
    path = tmp_path / "a.onnx"
    qatkit.export_onnx(model, X, path)
    return path, model


def tamper(path, name, change):
    proto = onnx.load(path)
    tensor = next(t for t in proto.graph.initializer if t.name.endswith(name))
    array = numpy_helper.to_array(tensor).copy()
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(change(array), array.dtype), tensor.name))
    onnx.save(proto, path)


def test_agrees(pair):
    report = qatkit.verify_onnx(*pair, X)
    assert report.ok
    assert len(report.quantizers) == 4
    assert report.outputs == 16
    assert report.top1_agreement == 1.0
    assert "verified" in str(report)
    assert "NOT" not in str(report)


def one_more(array):
    array.flat[0] += 0.1 + abs(array).max()
    return array


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("0.input_quantizer.scale", lambda a: a * 1.01),
        ("4.input_quantizer.scale", lambda a: a * 0.9),
        ("0.weight_quantizer.scale", lambda a: a * np.where(np.arange(a.size) == 3, 1.1, 1)),
        ("4.weight_quantizer.scale", lambda a: a * 1.05),
        ("0.weight_quantizer.weight", one_more),
        ("4.weight_quantizer.weight", lambda a: -a),
        ("0.input_quantizer.zero_point", lambda a: a + 90),
        ("bias", lambda a: a + 0.5),
    ],
)
def test_a_changed_file_is_found(pair, name, change):
    path, model = pair
    tamper(path, name, change)
    report = qatkit.verify_onnx(path, model, X)
    assert not report.ok
    assert "NOT VERIFIED" in str(report)


def test_a_changed_bias_of_the_last_layer_is_found(pair):
    path, model = pair
    proto = onnx.load(path)
    gemm = next(node for node in proto.graph.node if node.op_type == "Gemm")
    tamper(path, gemm.input[2], lambda a: a + 1)
    assert not qatkit.verify_onnx(path, model, X).ok


def test_int8_weights_that_were_changed_are_found(tmp_path):
    model = network()
    path = tmp_path / "a.onnx"
    qatkit.export_onnx(model, X, path, weights="int8")
    tamper(path, "4.weight_quantizer.codes", lambda a: np.roll(a, 1))
    assert not qatkit.verify_onnx(path, model, X).ok


def test_a_model_that_has_trained_on_is_found(pair):
    path, model = pair
    with torch.no_grad():
        model[0].weight += 0.05 * torch.randn_like(model[0].weight)
    assert not qatkit.verify_onnx(path, model, X).ok


def test_a_scale_of_the_model_that_changed_is_found(pair):
    path, model = pair
    model[0].input_quantizer.set_range(-1, 1)
    assert not qatkit.verify_onnx(path, model, X).ok


@pytest.mark.parametrize("other", ["wider", "other names", "float", "not a module"])
def test_another_model(pair, other):
    path = pair[0]
    if other == "wider":
        model = network(16)
    elif other == "other names":
        model = nn.ModuleDict({"net": network()})["net"]
        model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 4)))
        qatkit.prepare(model, X)
        qatkit.calibrate(model, [X], progress=False)
    elif other == "float":
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 4))
    else:
        model = None
    with pytest.raises(QatkitError) as error:
        qatkit.verify_onnx(path, model, X)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "inputs", [(X, X), torch.randn(4, 5, 8, 8), {"x": X}, torch.randn(4, 3, 9, 9)]
)
def test_other_inputs(pair, inputs):
    with pytest.raises(QatkitError) as error:
        qatkit.verify_onnx(*pair, inputs)
    assert "\n" not in str(error.value)


def test_no_file(tmp_path, pair):
    with pytest.raises(QatkitError, match="no such file"):
        qatkit.verify_onnx(tmp_path / "missing.onnx", pair[1], X)
    (tmp_path / "text.onnx").write_text("no ONNX")
    with pytest.raises(QatkitError, match="is no ONNX file"):
        qatkit.verify_onnx(tmp_path / "text.onnx", pair[1], X)


def test_the_model_is_left_alone(pair):
    path, model = pair
    model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    qatkit.verify_onnx(path, model, X)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_a_layer_that_runs_on_a_copy_too(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.d = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.c(x) + self.c(x.clone()), self.c(self.d(x))

    x = torch.randn(2, 3, 5, 5)
    model = qatkit.prepare(Twice(), x)
    qatkit.calibrate(model, [x], progress=False)
    assert qatkit.export_onnx(model, x, tmp_path / "a.onnx", lint=False).verify.ok


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (7, 3, 2)])
def test_codes_are_compared_in_parts_as_at_once(shape, monkeypatch):
    from onnx import helper, numpy_helper

    monkeypatch.setattr(codes, "_PART", 4)
    axis = 1 if len(shape) > 1 else None
    scale = np.asarray([0.5, 0.25, 2.0] if axis else 0.5, np.float32)
    names = {"scale": scale, "zero": np.zeros(scale.shape, np.int8)}
    graph = helper.make_graph([], "g", [], [])
    graph.initializer.extend(numpy_helper.from_array(one, name) for name, one in names.items())
    dq = helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], "a", axis=1)
    rng = np.random.default_rng(0)
    expected = rng.integers(-128, 128, shape).astype(np.int32)
    off = rng.integers(-1, 2, shape)
    found = np.clip(expected + off, -128, 127).astype(np.int8)
    step = scale.reshape([-1 if d == 1 else 1 for d in range(len(shape))]) if axis else scale
    given = (np.asarray(one) for one in (found, expected, step))
    check = codes.compare_codes(dq, *given, codes.Constants(OnnxFile(helper.make_model(graph))))
    gap = np.abs(found.astype(int) - expected)
    assert check.codes == gap.size
    assert (check.differing, check.largest_step) == (np.count_nonzero(gap), gap.max(initial=0))


class Picks(nn.Module):
    """A head on the features of the highest scores."""

    def __init__(self):
        super().__init__()
        self.score, self.head = nn.Linear(6, 1), nn.Linear(6, 3)

    def forward(self, x):
        order = self.score(x)[:, 0].topk(4).indices
        return self.head(x[order] * 2)


def test_what_is_picked_by_value_is_not_judged(tmp_path):
    x = torch.randn(8, 6)
    model = qatkit.prepare(Picks().eval(), x)
    qatkit.calibrate(model, [x], progress=False)
    report = qatkit.export_onnx(model, x, tmp_path / "a.onnx", dynamic_batch=False).verify
    picked = {check.name for check in report.quantizers if check.selected}
    assert picked == {"head.input_quantizer"}
    assert report.ok
    checks = [
        dataclasses.replace(check, differing=check.codes, largest_step=9)
        if check.selected
        else check
        for check in report.quantizers
    ]
    other = dataclasses.replace(report, quantizers=tuple(checks))
    assert other.ok
    assert "behind a selection by value, not judged: 24 of 24" in str(other)
    checks[0] = dataclasses.replace(checks[0], differing=checks[0].codes)
    assert not dataclasses.replace(report, quantizers=tuple(checks)).ok
