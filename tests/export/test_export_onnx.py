"""Exported files against oracles: float64 NumPy for the fold, ONNX Runtime for everything."""

from __future__ import annotations

import collections

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import qatkit
from qatkit import QuantConfig, QuantSpec, Rule
from qatkit.config import WEIGHT
from qatkit.graph.capture import split_inputs
from qatkit.modes import quantizers

X = torch.randn(2, 4, 9, 9)


def settle(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | FrozenBatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.3, 2.0)
            with torch.no_grad():
                module.weight.uniform_(-1.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    return model.eval()


def export(model, path, x=X, config=None, **more):
    """Prepare, calibrate and export; the file must be right, whatever the model."""
    settle(model)
    qatkit.prepare(model, x, config)
    observe(model, x)
    report = qatkit.export_onnx(model, x, path, **more)
    assert report.verify.ok, str(report)
    assert report.verify.outputs > 0
    assert report.verify.relative_difference < 1e-5, str(report)
    assert [f for f in report.findings if f.level == "ERROR"] == []
    proto = onnx.load(path)
    assert not [node for node in proto.graph.node if node.op_type == "BatchNormalization"]
    return proto, report


def observe(model, x):
    """Give the quantizers the ranges of ``x``, whatever its form is."""
    args, kwargs = split_inputs(x)
    for _, quantizer in quantizers(model):
        quantizer.observe = "always"
    with torch.no_grad(), qatkit.disable_quantization(model):
        model(*args, **kwargs)
    for _, quantizer in quantizers(model):
        quantizer.observe = "training"


def conv_bn_conv():
    return nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1))


def kinds(proto):
    return collections.Counter(node.op_type for node in proto.graph.node)


def constants(proto):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def dequantized_weight(proto, name):
    """Return the weight that an engine computes with, and its scale and axis."""
    values = constants(proto)
    for node in proto.graph.node:
        if node.name == f"{name}.weight_quantizer/DequantizeLinear":
            scale = values[node.input[1]]
            axis = next(a.i for a in node.attribute if a.name == "axis")
            codes = next(n for n in proto.graph.node if n.output[0] == node.input[0])
            weight = values[codes.input[0]]
            shape = [-1 if scale.ndim and d == axis else 1 for d in range(weight.ndim)]
            step = scale.reshape(shape)
            return np.clip(np.rint(weight / step), -128, 127) * step, scale, axis
    raise AssertionError(name)


def test_folded_codes_and_bias_against_float64(tmp_path):
    """gamma < 0, gamma = 0 and a folded weight of 1e-30: same codes as before the fold."""
    model = settle(conv_bn_conv())
    conv, norm = model[0], model[1]
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -0.7, 0.0, 1e-30, -1e-30, 1e-38]))
    weight, bias = (p.detach().double().numpy() for p in (conv.weight, conv.bias))
    gamma, beta, mean, var = (
        t.detach().double().numpy()
        for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    qatkit.prepare(model, X)
    qatkit.calibrate(model, [X], progress=False)
    path = tmp_path / "a.onnx"
    report = qatkit.export_onnx(model, X, path)
    assert report.verify.ok
    assert report.verify.relative_difference < 1e-5
    proto = onnx.load(path)
    factor = gamma / np.sqrt(var + norm.eps)
    amax = np.abs(weight).max((1, 2, 3))
    codes = np.rint(
        weight.astype(np.float32) / (amax / 127).astype(np.float32)[:, None, None, None]
    )
    found, scale, axis = dequantized_weight(proto, "0")
    assert axis == 0
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    for c in range(6):
        expected = codes[c] * (amax[c] / 127) * factor[c]
        if abs(expected).max() > 1e-35:
            np.testing.assert_array_equal(
                np.rint(found[c] / scale[c]), codes[c] * np.sign(factor[c])
            )
        np.testing.assert_allclose(found[c], expected, rtol=1e-6, atol=1e-37)
    node = next(n for n in proto.graph.node if n.op_type == "Conv")
    np.testing.assert_allclose(
        constants(proto)[node.input[2]], beta + (bias - mean) * factor, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("axis", [None, 0])
def test_transposed_convolution_with_batch_norm(tmp_path, groups, bias, axis):
    layer = nn.ConvTranspose2d(4, 8, 3, 2, 1, 1, groups=groups, bias=bias)
    model = nn.Sequential(layer, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    proto, _ = export(
        model, tmp_path / "a.onnx", config=QuantConfig(weight=WEIGHT.replace(axis=axis))
    )
    _, scale, _ = dequantized_weight(proto, "0")
    assert scale.shape == ()
    assert not kinds(proto)["Mul"]


def test_transposed_convolution_per_channel_on_request(tmp_path):
    model = nn.Sequential(nn.ConvTranspose2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
    config = QuantConfig(rules=(Rule("0", weight=WEIGHT.replace(axis=1)),))
    proto, _ = export(model, tmp_path / "a.onnx", config=config)
    _, scale, axis = dequantized_weight(proto, "0")
    assert (scale.shape, axis) == ((8,), 1)


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(fold_batch_norm=False),
        QuantConfig(weight=WEIGHT.replace(axis=None)),
        QuantConfig(weight=WEIGHT.replace(axis=None), fold_batch_norm=False),
        QuantConfig(weight=WEIGHT.replace(power_of_two=True)),
        QuantConfig(weight=WEIGHT.replace(narrow_range=False)),
        QuantConfig(weight=WEIGHT.replace(observer="sigma")),
        QuantConfig(activation=QuantSpec(power_of_two=True, observer="minmax")),
        QuantConfig(activation=QuantSpec(num_bits=4, narrow_range=True)),
        QuantConfig(activation=QuantSpec(num_bits=4, signed=False)),
        QuantConfig(activation=QuantSpec(num_bits=7, signed=False)),
        QuantConfig.preset("tensorrt-w4a4"),
    ],
    ids=str,
)
def test_configs(tmp_path, config):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=4), nn.BatchNorm2d(8))
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            x = self.stem(x)
            x = F.relu(x + self.body(x))
            return self.head(x.mean((2, 3)))

    proto, report = export(Net(), tmp_path / "a.onnx", config=config)
    (tmp_path / "b.onnx").write_bytes((tmp_path / "a.onnx").read_bytes())
    values = constants(proto)
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert values[node.input[2]].dtype == np.int8
            assert not values[node.input[2]].any()
    narrow = (config.activation.quant_min, config.activation.quant_max) != (-128, 127)
    assert bool(kinds(proto)["Clip"]) == narrow
    assert report.quantize_nodes == report.dequantize_nodes == 7


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 6), (3, 5, 6), (2, 3, 5, 6)])
@pytest.mark.parametrize("weights", ["float", "int8"])
def test_linear(tmp_path, shape, bias, weights):
    model = nn.Sequential(nn.Linear(6, 7, bias=bias), nn.ReLU(), nn.Linear(7, 2, bias=bias))
    proto, report = export(model, tmp_path / "a.onnx", torch.randn(shape), weights=weights)
    assert not kinds(proto)["Transpose"]
    assert report.dequantize_nodes == 4
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and "weight" in node.name:
            axis = next(a.i for a in node.attribute if a.name == "axis")
            reader = next(n for n in proto.graph.node if node.output[0] in n.input)
            transposed = any(a.name == "transB" and a.i for a in reader.attribute)
            assert axis == (0 if transposed else 1)


@pytest.mark.parametrize("shape", [(3, 6), (3, 5, 6)])
@pytest.mark.parametrize("axis", [0, None])
def test_square_linear(tmp_path, shape, axis):
    """The shape does not tell whether a square weight lies transposed in the file."""
    config = QuantConfig(weight=WEIGHT.replace(axis=axis))
    export(nn.Sequential(nn.Linear(6, 6)), tmp_path / "a.onnx", torch.randn(shape), config)


def test_linear_with_batch_norm(tmp_path):
    model = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 2))
    proto, _ = export(model, tmp_path / "a.onnx", torch.randn(5, 6))
    assert not kinds(proto)["Mul"]


def test_linear_in_three_dimensions_with_batch_norm_over_axis_1(tmp_path):
    model = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(7, 2))
    proto, _ = export(model, tmp_path / "a.onnx", torch.randn(2, 5, 6))
    assert kinds(proto)["Mul"] == 1


@pytest.mark.parametrize(
    ("padding", "mode"),
    [
        (1, "zeros"),
        ("same", "zeros"),
        ("valid", "zeros"),
        (1, "circular"),
        (2, "reflect"),
        (1, "replicate"),
        ("same", "circular"),
    ],
)
def test_padding(tmp_path, padding, mode):
    layer = nn.Conv2d(4, 6, 3, padding=padding, padding_mode=mode, dilation=1)
    export(nn.Sequential(layer, nn.BatchNorm2d(6), nn.ReLU()), tmp_path / "a.onnx")


@pytest.mark.filterwarnings("ignore:Using padding=.same.:UserWarning")
@pytest.mark.parametrize("size", [2, 4])
def test_uneven_same_padding(tmp_path, size):
    export(nn.Sequential(nn.Conv2d(4, 6, size, padding="same"), nn.ReLU()), tmp_path / "a.onnx")


@pytest.mark.parametrize("dimensions", [1, 3])
def test_other_dimensions(tmp_path, dimensions):
    kind = {
        1: (nn.Conv1d, nn.BatchNorm1d, nn.ConvTranspose1d),
        3: (nn.Conv3d, nn.BatchNorm3d, nn.ConvTranspose3d),
    }
    conv, norm, transposed = kind[dimensions]
    model = nn.Sequential(conv(4, 6, 3), norm(6), nn.ReLU(), transposed(6, 4, 2, 2), norm(4))
    export(model, tmp_path / "a.onnx", torch.randn(2, 4, *[6] * dimensions))


def test_frozen_batch_norm(tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 6, 3), FrozenBatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    proto, _ = export(model, tmp_path / "a.onnx")
    assert not kinds(proto)["Mul"]


def test_batch_norm_without_affine(tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), nn.Conv2d(6, 2, 1))
    model[1].running_var.uniform_(0.3, 2)
    qatkit.prepare(model.eval(), X)
    qatkit.calibrate(model, [X], progress=False)
    assert qatkit.export_onnx(model, X, tmp_path / "a.onnx").verify.ok


def test_batch_norm_that_no_layer_takes(tmp_path):
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3))
    proto, _ = export(model, tmp_path / "a.onnx")
    assert kinds(proto)["Mul"] == kinds(proto)["Add"] == 1


def test_disabled_quantizers_are_not_in_the_file(tmp_path):
    model = settle(conv_bn_conv())
    qatkit.prepare(model, X)
    qatkit.calibrate(model, [X], progress=False)
    qatkit.disable_quantization(model, "0").apply()
    report = qatkit.export_onnx(model, X, tmp_path / "a.onnx")
    assert report.verify.ok
    assert report.verify.relative_difference < 1e-5
    assert report.quantize_nodes == sum(q.quantize for _, q in quantizers(model)) == 2
    assert not kinds(onnx.load(tmp_path / "a.onnx"))["BatchNormalization"]
    with qatkit.disable_quantization(model):
        report = qatkit.export_onnx(model, X, tmp_path / "a.onnx", lint=False)
    assert report.quantize_nodes == 0


def test_rules(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )
    config = QuantConfig(rules=(Rule("0", enabled=False), Rule("2", num_bits=4)))
    proto, report = export(model, tmp_path / "a.onnx", config=config)
    assert report.quantize_nodes == 4
    assert kinds(proto)["Clip"] == 1


class Two(nn.Module):
    """Several inputs and outputs."""

    def __init__(self, form):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 1)
        self.form = form

    def forward(self, left, right, scale=1.0):
        y = torch.relu(self.a(left) + self.b(right) * scale)
        return self.form(y)


Named = collections.namedtuple("Named", "y twice")


@pytest.mark.parametrize(
    ("form", "names"),
    [
        (lambda y: y, ["output"]),
        (lambda y: (y, y * 2), ["output_0", "output_1"]),
        (lambda y: [y, y.mean()], ["output_0", "output_1"]),
        (lambda y: {"y": y, "twice": y * 2}, ["output_y", "output_twice"]),
        (lambda y: Named(y, y * 2), None),
        (lambda y: (y, {"in": [y * 2]}), None),
    ],
)
@pytest.mark.parametrize("inputs", [(X, X * 2), {"left": X, "right": X * 2}, (X, X * 2, 0.5)])
def test_inputs_and_outputs(tmp_path, form, names, inputs):
    proto, report = export(Two(form), tmp_path / "a.onnx", inputs)
    assert [one.name for one in proto.graph.input] == ["left", "right"]
    assert report.verify.outputs >= 2 * 6 * 81
    if names:
        assert [one.name for one in proto.graph.output] == names
    if names == ["output"]:
        for value in (*proto.graph.input, *proto.graph.output):
            assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_lists_and_dicts_of_tensors_as_inputs(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Conv2d(4, 6, 1)

        def forward(self, images, more, scale=1.0):
            return [self.f(image) * scale for image in images], self.f(more["x"])

    inputs = ([torch.randn(4, 5, 6), torch.randn(4, 7, 8)], {"x": X}, 0.5)
    proto, report = export(Net(), tmp_path / "a.onnx", inputs)
    assert [one.name for one in proto.graph.input] == ["images_0", "images_1", "more_0"]
    assert report.verify.outputs == 6 * (30 + 56 + 162)


def test_any_number_of_positional_inputs(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Conv2d(4, 6, 1)

        def forward(self, *images):
            return sum(self.f(image) for image in images)

    proto, _ = export(Net(), tmp_path / "a.onnx", (X, X + 1, X * 2))
    assert len(proto.graph.input) == 3


def test_integer_and_boolean_inputs(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Embedding(10, 8), nn.Linear(8, 4)

        def forward(self, tokens, mask):
            return self.fc(self.embed(tokens) * mask.unsqueeze(-1))

    inputs = (torch.randint(0, 10, (2, 5)), torch.rand(2, 5) > 0.5)
    export(Net(), tmp_path / "a.onnx", inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_in_other_dtypes_become_float32_files(tmp_path, dtype):
    model = settle(conv_bn_conv())
    qatkit.prepare(model, X)
    qatkit.calibrate(model, [X], progress=False)
    model.to(dtype)
    x = X.to(dtype)
    report = qatkit.export_onnx(model, x, tmp_path / "a.onnx")
    assert report.verify.ok
    assert next(model.parameters()).dtype == dtype
    types = {t.data_type for t in onnx.load(tmp_path / "a.onnx").graph.initializer}
    assert types <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT8, onnx.TensorProto.INT64}


def test_a_layer_called_twice(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.n = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.n(self.f(torch.relu(self.n(self.f(x)))))

    _, report = export(Net(), tmp_path / "a.onnx")
    assert report.quantize_nodes == 3 or report.quantize_nodes == 4


def test_attention_at_opset_13(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.norm = nn.Linear(8, 16), nn.LayerNorm(16)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.down = nn.Linear(16, 8)

        def forward(self, x):
            y = self.norm(self.up(x))
            y = y + self.attention(y, y, y, need_weights=False)[0]
            return x + self.down(F.gelu(y))

    export(Net(), tmp_path / "a.onnx", torch.randn(2, 5, 8))


@pytest.mark.parametrize("opset", [13, 14, 15, 16, 17, 18, 19, 20])
def test_opsets(tmp_path, opset):
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), nn.Flatten(), nn.Linear(294, 3)
    )
    proto, report = export(model, tmp_path / "a.onnx", opset=opset)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", opset)]
    assert report.opset == opset


def test_tied_weights(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    _, report = export(Net(), tmp_path / "a.onnx", torch.randn(3, 8))
    assert report.quantize_nodes == 4


def test_ranges_of_training(tmp_path):
    model = settle(conv_bn_conv())
    qatkit.prepare(model, X).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn_like(X)).pow(2).mean().backward()
        optimizer.step()
    assert qatkit.export_onnx(model, X, tmp_path / "a.onnx").verify.ok
    qatkit.freeze_ranges(model).apply()
    optimizer.step()
    report = qatkit.export_onnx(model, X, tmp_path / "b.onnx")
    assert report.verify.ok
    session = onnxruntime.InferenceSession(tmp_path / "b.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {session.get_inputs()[0].name: X.numpy()})[0].shape == (2, 2, 7, 7)


def test_saturated_weights_with_frozen_ranges(tmp_path):
    """A weight that has grown beyond its frozen range saturates in the file as in the model."""
    model = settle(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()))
    qatkit.prepare(model, X)
    qatkit.calibrate(model, [X], progress=False)
    qatkit.freeze_ranges(model).apply()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = 9.0
        model[0].weight[1] *= -3
        model[1].weight[2] *= -2
    report = qatkit.export_onnx(model, X, tmp_path / "a.onnx")
    assert report.verify.ok
    assert report.verify.relative_difference < 1e-5
