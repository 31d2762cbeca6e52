"""Models that the exporter once got wrong, or that `verify_onnx` once passed."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import qatkit
from qatkit import QatkitError, QuantConfig, QuantSpec
from qatkit.config import WEIGHT
from qatkit.export.inputs import batch_axes
from qatkit.export.weights import fold_layer
from qatkit.nn import QuantConv2d
from qatkit.quantizer import TensorQuantizer

X = torch.randn(2, 4, 9, 9)


def settle(model):
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.uniform_(-0.5, 0.5)
        norm.running_var.uniform_(0.3, 2.0)
        with torch.no_grad():
            norm.weight.uniform_(-1.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
    return model.eval()


def calibrated(model, x=X, config=None):
    qatkit.prepare(settle(model), x, config)
    qatkit.calibrate(model, [x], progress=False)
    return model


def exported(model, path, x=X, **more):
    """Export; the file must be right."""
    report = qatkit.export_onnx(model, x, path, **more)
    assert report.verify.ok, str(report)
    assert report.verify.relative_difference < 1e-5, str(report)
    return onnx.load(path)


class TwoNames(nn.Module):
    """A batch norm under two names, of which the second one is called."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
        self.block = nn.Sequential(self.conv, self.bn, nn.ReLU())
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.head(self.block(x))


def test_batch_norm_under_two_names_is_applied_once(tmp_path):
    proto = exported(calibrated(TwoNames()), tmp_path / "a.onnx")
    assert [n.op_type for n in proto.graph.node if n.op_type in ("Mul", "Add")] == []


class ByHand(nn.Module):
    """A hand-built layer with a fold: there is no plan."""

    def __init__(self, axis):
        super().__init__()
        self.conv = QuantConv2d(4, 6, 3, weight_spec=WEIGHT.replace(axis=axis))
        self.bn = nn.BatchNorm2d(6)
        self.conv.fold(self.bn)

    def forward(self, x):
        return self.bn(self.conv(x))


def by_hand(axis):
    model = settle(ByHand(axis))
    model.conv.input_quantizer.set_range(-3, 3)
    return model


@pytest.mark.parametrize("axis", [0, None, 1, -4])
def test_hand_built_fold(tmp_path, axis):
    proto = exported(by_hand(axis), tmp_path / "a.onnx")
    assert [n.op_type for n in proto.graph.node if n.op_type in ("Mul", "Add")] == []


def test_hand_built_fold_of_a_batch_norm_outside_the_model(tmp_path):
    with pytest.raises(QatkitError, match="is not in the model"):
        qatkit.export_onnx(by_hand(None).conv, X, tmp_path / "a.onnx")
    exported(by_hand(0).conv, tmp_path / "b.onnx")


@pytest.mark.parametrize("axis", [None, 0, 1, -3])
@pytest.mark.parametrize("narrow", [True, False])
def test_batch_norm_behind_a_weight_that_was_quantized_without_it(tmp_path, axis, narrow):
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    model = calibrated(model, config=QuantConfig(fold_batch_norm=False))
    layer = model[0]
    layer.attach_weight(WEIGHT.replace(axis=axis, narrow_range=narrow))
    with torch.no_grad():
        layer.weight_quantizer(layer.weight)
        high = layer.weight_quantizer.scale * 60
        layer.weight_quantizer.set_range(-high, high)
        layer.weight_quantizer.observe = "never"
    norm = fold_layer(layer, model[1]).batch_norm
    assert norm is (model[1] if narrow and axis in (None, 0) else None)
    for weights in ("float", "int8"):
        exported(model, tmp_path / "a.onnx", weights=weights)


def test_negative_axis_counts_from_the_front():
    layer = QuantConv2d(4, 6, 3, weight_spec=WEIGHT.replace(axis=-4))
    assert layer.weight_quantizer.spec.axis == 0
    with pytest.raises(QatkitError, match="the weight has 4 axes"):
        QuantConv2d(4, 6, 3, weight_spec=WEIGHT.replace(axis=4))


class Product(nn.Module):
    """A quantized constant: some of it beyond its range."""

    def __init__(self, spec):
        super().__init__()
        channels = None if spec.axis is None else 5
        self.left, self.right = (
            TensorQuantizer(spec.replace(axis=None)),
            TensorQuantizer(spec, channels),
        )
        self.constant = nn.Parameter(torch.linspace(-3, 3, 20).reshape(5, 4))
        self.left.set_range(-1, 1)
        high = 1.0 if channels is None else torch.full((5,), 1.0)
        self.right.set_range(-high, high)

    def forward(self, x):
        return self.left(x) @ self.right(self.constant).transpose(0, 1)


@pytest.mark.parametrize("weights", ["float", "int8"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("axis", [None, -2])
def test_constant_beyond_the_range_of_its_quantizer(tmp_path, weights, bits, axis):
    x, path = torch.randn(3, 4), tmp_path / "a.onnx"
    model = Product(QuantSpec(num_bits=bits, axis=axis)).eval()
    proto = exported(model, path, x, weights=weights)
    report = qatkit.verify_onnx(path, model, x)
    assert {check.name for check in report.quantizers} == {"left", "right"}
    suffix = "right.codes" if weights == "int8" else "right.weight"
    change(proto, suffix, lambda a: -a)
    onnx.save(proto, path)
    assert not qatkit.verify_onnx(path, model, x).ok


def change(proto, name, how):
    tensor = next(t for t in proto.graph.initializer if t.name.endswith(name))
    array = numpy_helper.to_array(tensor).copy()
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(how(array), array.dtype), tensor.name))


class Results(nn.Module):
    def __init__(self, give):
        super().__init__()
        self.conv, self.give = nn.Conv2d(4, 2, 3), give

    def forward(self, x):
        return self.give(self.conv(x), x)


@pytest.mark.parametrize(
    ("give", "names"),
    [
        (lambda y, x: {"a": y, "n": x.shape[0]}, ["output_a"]),
        (lambda y, x: (x.shape[0], y, None, y + 1), ["output_1", "output_3"]),
        (lambda y, x: [y, "text"], ["output_0"]),
    ],
)
def test_results_that_are_no_tensors_are_left_out(tmp_path, give, names):
    proto = exported(calibrated(Results(give)), tmp_path / "a.onnx")
    assert [value.name for value in proto.graph.output] == names
    assert proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_batch_axes_of_inputs_of_other_lengths():
    inputs = {"x": torch.zeros(2, 8), "anchors": torch.zeros(5, 8), "y": torch.zeros(2, 3)}
    outputs = {"output_0": torch.zeros(2, 5), "output_1": torch.zeros(5)}
    batch = {0: "batch"}
    assert batch_axes(inputs, outputs, dynamic=True) == {"x": batch, "y": batch, "output_0": batch}


@pytest.fixture
def pair(tmp_path):
    model = calibrated(nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1)))
    exported(model, tmp_path / "a.onnx")
    return tmp_path / "a.onnx", model


@pytest.mark.parametrize("name", ["0.input_quantizer", "2.input_quantizer", "0.weight_quantizer"])
def test_wrong_scale_behind_right_codes_is_found(pair, name):
    path, model = pair
    proto = onnx.load(path)
    scale = next(t for t in proto.graph.initializer if t.name == f"{name}.scale")
    proto.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(scale) * 7, "bad"))
    next(n for n in proto.graph.node if n.name == f"{name}/DequantizeLinear").input[1] = "bad"
    onnx.save(proto, path)
    report = qatkit.verify_onnx(path, model, X)
    assert not report.ok
    assert name in {check.name for check in report.quantizers if check.largest_step > 1}


def test_missing_quantizer_is_found(pair):
    path, model = pair
    proto = onnx.load(path)
    q, dq = (
        next(n for n in proto.graph.node if n.name == f"2.input_quantizer/{kind}Linear")
        for kind in ("Quantize", "Dequantize")
    )
    reader = next(n for n in proto.graph.node if dq.output[0] in n.input)
    reader.input[0] = q.input[0]
    proto.graph.node.remove(q)
    proto.graph.node.remove(dq)
    onnx.save(proto, path)
    report = qatkit.verify_onnx(path, model, X)
    assert report.missing == ("2.input_quantizer",)
    assert not report.ok
    assert "not in the file: 2.input_quantizer" in str(report)


def test_small_output_beside_a_large_one(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            return self.a(x) * 1e5, self.b(x)

    x, path = torch.randn(4, 8), tmp_path / "a.onnx"
    model = calibrated(Two(), x)
    proto = exported(model, path, x)
    change(proto, "b.bias", lambda a: a + 10)
    onnx.save(proto, path)
    assert not qatkit.verify_onnx(path, model, x).ok


def test_report_of_an_export_without_lint(pair, tmp_path):
    report = qatkit.export_onnx(pair[1], X, tmp_path / "b.onnx", lint=False)
    assert "not linted" in str(report)
    assert [str(finding) for finding in report.findings] == []
    assert "lint: 0 ERROR" in str(qatkit.export_onnx(pair[1], X, tmp_path / "b.onnx"))


def test_the_conversion_of_attention_of_the_user_is_kept(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            q = self.linear(x)
            return nn.functional.scaled_dot_product_attention(q, x, x)

    float_attention = qatkit.QuantConfig(rules=(qatkit.Rule("scaled_dot*", enabled=False),))
    name, x = "aten::scaled_dot_product_attention", torch.randn(2, 3, 4)
    model = qatkit.prepare(Attention(), x, float_attention)
    qatkit.calibrate(model, [x], progress=False)
    own = exported(model, tmp_path / "a.onnx", x)
    assert "Softmax" in {node.op_type for node in own.graph.node}

    def symbol(g, query, key, value, *rest):
        return g.op("Sin", query)

    torch.onnx.register_custom_op_symbolic(name, symbol, 13)
    try:
        for _ in range(2):
            qatkit.export_onnx(model, x, tmp_path / "a.onnx", verify=False, lint=False)
            nodes = {node.op_type for node in onnx.load(tmp_path / "a.onnx").graph.node}
            assert "Sin" in nodes
    finally:
        torch.onnx.unregister_custom_op_symbolic(name, 13)


class Keeping(nn.Module):
    """A user's model that keeps a feature map to look at."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)])

    def forward(self, x):
        self.maps = [x := layer(x).relu() for layer in self.layers]
        return x


def test_a_model_that_keeps_computed_tensors_exports_after_a_training_step(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    model = qatkit.prepare(Keeping(), x)
    qatkit.calibrate(model, [x], progress=False)
    model.train()(x).sum().backward()
    kept = model.maps
    report = qatkit.export_onnx(model, x, tmp_path / "a.onnx")
    assert report.verify.ok, str(report)
    assert model.maps is kept
    assert kept[0].grad_fn is not None
