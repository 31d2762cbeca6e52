"""Files in float16: the types, the codes, and what has to stay in float32."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, shape_inference
from torch import nn

import qatkit
from qatkit import QatkitError, QuantConfig, QuantSpec
from qatkit.export.float16 import to_float16
from qatkit.export.half_precision import LEAST, fits_half, half_constant, half_scale

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolutions with a residual, an upsampling, attention-like matmuls, a mask, a norm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8))
        self.deep = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(x + self.deep(x))
        x = F.interpolate(x, scale_factor=0.5, mode="bilinear")
        y = self.norm(x.flatten(2).transpose(1, 2))
        mask = torch.full((16, 16), torch.finfo(torch.float32).min).triu(1)
        y = F.scaled_dot_product_attention(y, y, y, attn_mask=mask) + F.gelu(y)
        y = y + torch.arange(x.shape[0]).float().view(-1, 1, 1)
        return self.head(F.normalize(y.mean(1), eps=1e-12))


def ready(model, x=X, config=None):
    qatkit.prepare(model.eval(), x, config)
    qatkit.calibrate(model, [x], progress=False)
    return model


def types_of(proto):
    inferred = shape_inference.infer_shapes(
        proto, check_type=True, strict_mode=True, data_prop=True
    ).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in inferred.initializer}


def weight_codes(proto):
    """Return the int8 codes of each weight, quantized as ONNX says, in the type of the file."""
    constants = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    quantizes = {n.output[0]: n for n in proto.graph.node if n.op_type == "QuantizeLinear"}
    codes = {}
    for node in proto.graph.node:
        if node.op_type != "DequantizeLinear" or "weight_quantizer" not in node.name:
            continue
        if node.input[0] in constants:
            codes[node.name] = constants[node.input[0]]
            continue
        q = quantizes[node.input[0]]
        axis = next(a.i for a in q.attribute if a.name == "axis")
        weight, scale = constants[q.input[0]], constants[q.input[1]]
        step = scale.reshape([-1 if scale.ndim and d == axis else 1 for d in range(weight.ndim)])
        assert weight.dtype == scale.dtype
        codes[node.name] = np.clip(np.rint(weight / step), -128, 127).astype(np.int8)
    return codes


@pytest.mark.parametrize(
    ("front_end", "opset", "weights"),
    [
        ("legacy", 19, "float"),
        ("legacy", 19, "int8"),
        ("legacy", 21, "float"),
        ("legacy", 22, "int8"),
        ("dynamo", 21, "float"),
    ],
)
def test_everything_but_the_codes_is_float16(tmp_path, front_end, opset, weights):
    model, more = ready(Net()), {"weights": weights, "front_end": front_end, "opset": opset}
    wide = qatkit.export_onnx(model, X, tmp_path / "32.onnx", **more)
    report = qatkit.export_onnx(model, X, tmp_path / "16.onnx", precision="float16", **more)
    assert (wide.precision, report.precision) == ("float32", "float16")
    assert report.verify.precision == "float16"
    assert report.verify.ok, str(report)
    assert report.verify.relative_difference < 0.05
    assert [f for f in report.findings if f.level == "ERROR"] == []
    assert "float16" in str(report)
    proto = onnx.load(tmp_path / "16.onnx")
    onnx.checker.check_model(proto, full_check=True)
    types = types_of(proto)
    for value in (*proto.graph.input, *proto.graph.output):
        assert value.type.tensor_type.elem_type == FLOAT
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert types[node.input[1]] == HALF
        if node.op_type in ("Conv", "Gemm", "MatMul", "Add", "Relu", "Softmax", "Resize"):
            assert types[node.output[0]] == HALF
            assert types[node.input[0]] == HALF
    before, after = (weight_codes(onnx.load(tmp_path / f"{n}.onnx")) for n in (32, 16))
    assert before.keys() == after.keys()
    assert len(before) == 3
    for name, codes in before.items():
        np.testing.assert_array_equal(codes, after[name])
    assert report.size_bytes < wide.size_bytes


def test_inputs_and_outputs_stay_as_they_were(tmp_path):
    model, path = ready(Net()), tmp_path / "a.onnx"
    qatkit.export_onnx(model, X, path, opset=19, precision="float16")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.cat([X, X[:1]])
    found = session.run(None, {"input": x.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(found, model(x).numpy(), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("opset", [13, 18])
def test_old_opsets_have_no_float16_scales(tmp_path, opset):
    with pytest.raises(QatkitError, match="give opset=19 or more"):
        qatkit.export_onnx(ready(Net()), X, tmp_path / "a.onnx", opset=opset, precision="float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["fp16", "bfloat16", None, 16])
def test_unknown_precision(tmp_path, precision):
    with pytest.raises(QatkitError, match="give 'float32' or 'float16'"):
        qatkit.export_onnx(ready(Net()), X, tmp_path / "a.onnx", opset=19, precision=precision)


def conv():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())


def export(model, path, x=X, config=None, **more):
    report = qatkit.export_onnx(
        ready(model, x, config), x, path, opset=19, precision="float16", **more
    )
    return onnx.load(path), report


def output_types(proto, op):
    types = types_of(proto)
    return [types[node.output[0]] for node in proto.graph.node if node.op_type == op]


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_a_channel_below_float16_beside_normal_ones(tmp_path, weights):
    model = conv()
    with torch.no_grad():
        model[2].weight[1] *= 1e-9
        model[2].weight[2] = 0
    proto, report = export(model, tmp_path / "a.onnx", weights=weights)
    assert report.verify.ok, str(report)
    assert output_types(proto, "Conv") == [HALF, HALF]
    scale = next(t for t in proto.graph.initializer if t.name == "2.weight_quantizer.scale")
    assert (numpy_helper.to_array(scale) > 0).all()


def test_a_weight_below_float16_keeps_its_layer_in_float32(tmp_path):
    model = conv()
    with torch.no_grad():
        model[2].weight *= 1e-8
        model[2].bias *= 1e-3
    proto, report = export(model, tmp_path / "a.onnx")
    assert report.verify.ok, str(report)
    assert output_types(proto, "Conv") == [HALF, FLOAT]
    assert output_types(proto, "Relu") == [HALF, HALF]
    assert output_types(proto, "DequantizeLinear") == [HALF, HALF, FLOAT, FLOAT]
    assert [f for f in report.findings if f.level == "ERROR"] == []


class Shared(nn.Module):
    """One quantizer feeds two layers, one of them through copies."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        with torch.no_grad():
            self.b.weight *= 1e-8

    def forward(self, x):
        x = self.a(x)
        return self.b(x) * 1e4 + self.c(x), F.relu(x)


def test_no_cast_between_a_shared_quantizer_and_its_layers(tmp_path):
    proto, report = export(Shared(), tmp_path / "a.onnx")
    assert report.verify.ok, str(report)
    assert output_types(proto, "Conv") == [HALF, FLOAT, FLOAT]
    dequantized = {n.output[0] for n in proto.graph.node if n.op_type == "DequantizeLinear"}
    assert not [n for n in proto.graph.node if n.op_type == "Cast" and n.input[0] in dequantized]


def test_a_range_beyond_float16(tmp_path):
    model = ready(conv())
    model[2].input_quantizer.set_range(-1e6, 1e6)
    with pytest.raises(QatkitError, match=r"2\.input_quantizer: its range of 1.*precision='float3"):
        qatkit.export_onnx(model, X, tmp_path / "a.onnx", opset=19, precision="float16")
    assert list(tmp_path.iterdir()) == []


def test_a_bias_beyond_float16(tmp_path):
    model = conv()
    with torch.no_grad():
        model[2].bias += 1e6
    with pytest.raises(QatkitError, match=r"2\.bias: holds 1e\+06, beyond the 65504"):
        export(model, tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("2.weight_quantizer.codes", lambda a: a + (np.arange(a.size) == 5).reshape(a.shape)),
        ("0.weight_quantizer.scale", lambda a: a * np.float16(1.01)),
        ("2.input_quantizer.scale", lambda a: a * np.float16(1.1)),
        ("2.bias", lambda a: a + 1),
    ],
)
def test_a_changed_file_is_found(tmp_path, name, change):
    model, path = conv(), tmp_path / "a.onnx"
    proto, report = export(model, path, weights="int8")
    assert report.verify.ok, str(report)
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(change(array), array.dtype), name))
    onnx.save(proto, path)
    assert not qatkit.verify_onnx(path, model, X).ok


def test_narrow_grids_keep_their_codes(tmp_path):
    config = QuantConfig(activation=QuantSpec(num_bits=4))
    proto, report = export(conv(), tmp_path / "a.onnx", config=config)
    assert report.verify.ok, str(report)
    assert output_types(proto, "Clip") == [HALF, HALF]


def model_of(nodes, inputs, outputs, constants=()):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def run(proto, feeds):
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def same(proto, feeds, tolerance=1e-2):
    """Convert; the results must be those of float32."""
    expected = run(proto, feeds)
    to_float16(proto)
    for one, other in zip(expected, run(proto, feeds), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)
    return types_of(proto)


def node(op, inputs, outputs, **attributes):
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def test_positions_keep_their_digits():
    """A size of 4099 is no float16."""
    proto = model_of(
        [
            node("Shape", "x", "shape"),
            node("Gather", "shape last", "length"),
            node("Cast", "length", "wide", to=FLOAT),
            node("Div", "wide two", "half"),
            node("Floor", "half", "floor"),
            node("Cast", "floor", "end", to=TensorProto.INT64),
            node("Unsqueeze", "end zero", "ends"),
            node("Slice", "x zero ends one", "kept"),
            node("Relu", "kept", "y"),
        ],
        [("x", FLOAT, [1, "n"])],
        ["y"],
        [("last", 1), ("two", np.float32(2)), ("zero", [0]), ("one", [1])],
    )
    x = np.arange(4103, dtype=np.float32)[None] / 1000
    types = same(proto, {"x": x})
    assert (types["floor"], types["kept"]) == (FLOAT, HALF)


def test_branches_and_sequences_stay_in_float32():
    branches = {
        name: helper.make_graph(
            [node(op, "half w", f"{name}_y")],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_y", FLOAT, None)],
        )
        for name, op in (("then_branch", "Add"), ("else_branch", "Mul"))
    }
    proto = model_of(
        [
            node("Mul", "x w", "half"),
            node("If", "condition", "chosen", **branches),
            node("SplitToSequence", "chosen", "parts", axis=0),
            node("ConcatFromSequence", "parts", "joined", axis=0),
            node("Exp", "joined", "y"),
        ],
        [("x", FLOAT, [2, 3]), ("condition", TensorProto.BOOL, [])],
        ["y"],
        [("w", np.float32([1, 2, 3]))],
    )
    x = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
    types = same(proto, {"x": x, "condition": np.asarray(True)})
    assert (types["half"], types["chosen"], types["joined"]) == (HALF, FLOAT, FLOAT)


def test_operators_without_float16():
    """NonMaxSuppression takes float32 only, Resize its scales; both outputs are read again."""
    proto = model_of(
        [
            node("Add", "boxes one", "moved"),
            node("NonMaxSuppression", "moved scores most", "picked"),
            node("Cast", "picked", "numbers", to=FLOAT),
            helper.make_node("Resize", ["scores", "", "factors"], ["larger"], mode="nearest"),
            node("Identity", "moved", "same"),
        ],
        [("boxes", FLOAT, [1, 3, 4]), ("scores", FLOAT, [1, 1, 3])],
        ["numbers", "larger", "same"],
        [
            ("one", np.float32(1)),
            ("most", np.int64([2])),
            ("factors", np.float32([1, 1, 2])),
        ],
    )
    boxes = np.float32([[[0, 0, 1, 1], [0, 0, 1, 0.9], [2, 2, 3, 3]]])
    types = same(proto, {"boxes": boxes, "scores": np.float32([[[0.9, 0.5, 0.7]]])})
    assert (types["factors/float32"], types["larger"]) == (FLOAT, FLOAT)
    assert "factors" not in types


def test_constants_that_name_a_type():
    proto = model_of(
        [
            node("Shape", "x", "shape"),
            node("ConstantOfShape", "shape", "zeros"),
            node("RandomNormalLike", "x", "noise", dtype=FLOAT, scale=1e-6),
            node("Add", "x zeros", "sum"),
            node("Add", "sum noise", "y"),
        ],
        [("x", FLOAT, [2, 3])],
        ["y"],
    )
    types = same(proto, {"x": np.ones((2, 3), np.float32)})
    assert types["zeros"] == types["noise"] == HALF


def test_an_output_that_is_read_again():
    proto = model_of(
        [node("Relu", "x", "y"), node("Exp", "y", "z")], [("x", FLOAT, [3])], ["y", "z"]
    )
    types = same(proto, {"x": np.float32([-1, 0, 1])})
    assert types["y"] == types["z"] == FLOAT
    assert [n.op_type for n in proto.graph.node].count("Cast") == 3


@given(
    scale=st.floats(float(np.float32(1e-7)), 500.0, width=32),
    codes=st.lists(st.integers(-128, 127), min_size=1, max_size=40),
)
@settings(max_examples=200, deadline=None)
def test_the_grid_of_a_rounded_scale_keeps_every_code(scale, codes):
    half = half_scale(scale)
    weight = (np.asarray(codes) * half.astype(np.float64)).astype(np.float16)
    np.testing.assert_array_equal(np.rint(weight / half), codes)


@pytest.mark.parametrize(
    ("scale", "fits"),
    [
        (0.01, True),
        (500.0, True),
        (2e-5, True),
        (1e-8, False),
        (1e-38, False),
        ([0.01, 1e-9], True),
        ([1e-8, 1e-9], False),
        ([1.0, 1.0], True),
    ],
)
def test_scales_that_float16_holds(scale, fits):
    assert fits_half(np.float32(scale)) == fits


def test_constants_in_float16():
    most = np.finfo(np.float16).max
    numbers = np.float32([0, 1e-12, -1e-12, -np.inf, np.finfo(np.float32).min, 1.5])
    expected = np.float16([0, LEAST, -LEAST, -np.inf, -most, 1.5])
    np.testing.assert_array_equal(half_constant(numbers), expected)
    assert half_constant(np.float32(-1e9)) == -most
    assert half_constant(np.float32([1.0, 70000.0])) is None
    assert np.isnan(half_constant(np.float32([np.nan, 1]))[0])
    assert half_constant(np.zeros((0, 3), np.float32)).shape == (0, 3)
