"""What other tools write: ONNX Runtime's quantizer itself, the others' patterns by hand."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qatkit.export.lint import lint_onnx
from tests.export.lint.qdq_builder import Graph, findings_of


def float_net():
    """Stem, residual block, two branches into a Concat, pooling, classifier."""
    g = Graph()

    def conv(x, name):
        return g.conv(x, 16, 16, name=name, float_weight=True)

    x = g.op("Relu", conv(g.input(1, 16, 8, 8), "stem"), name="stem_relu")
    y = conv(g.op("Relu", conv(x, "conv1"), name="relu1"), "conv2")
    z = g.op("Relu", g.op("Add", y, x, name="add"), name="relu2")
    a = g.op("Relu", conv(z, "a"), name="relu_a")
    b = g.op("Clip", conv(z, "b"), g.const(0.0), g.const(6.0), name="clip_b")
    y = g.op("GlobalAveragePool", g.op("Concat", a, b, axis=1, name="cat"), name="gap")
    w = g.const(g.rng.standard_normal((32, 32)), name="fc.weight")
    y = g.op("Gemm", g.op("Flatten", y), w, g.const(np.zeros(32), name="fc.b"), transB=1, name="fc")
    model = g.model(y)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info(y, 1, [1, 32]))
    return model


@pytest.fixture(scope="module")
def quantize_static(tmp_path_factory):
    quantization = pytest.importorskip("onnxruntime.quantization")
    folder = tmp_path_factory.mktemp("ort")
    onnx.save(float_net(), folder / "float.onnx")

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            rng = np.random.default_rng(0)
            self.batches = [rng.standard_normal((1, 16, 8, 8)).astype(np.float32) for _ in range(2)]

        def get_next(self):
            return {"x": self.batches.pop()} if self.batches else None

    def quantize(kind="QInt8", form="QDQ", per_channel=False, **extra):
        path = folder / "int8.onnx"
        level = logging.root.level
        logging.root.setLevel(logging.ERROR)
        try:
            quantization.quantize_static(
                str(folder / "float.onnx"),
                str(path),
                Reader(),
                quant_format=quantization.QuantFormat[form],
                activation_type=quantization.QuantType[kind],
                weight_type=quantization.QuantType.QInt8,
                per_channel=per_channel,
                extra_options=extra,
            )
        finally:
            logging.root.setLevel(level)
        return {(one.rule, one.level, one.node) for one in lint_onnx(path)}

    return quantize


def levels(found):
    return {(rule, level) for rule, level, _ in found}


def test_quantize_static_by_default(quantize_static):
    found = quantize_static()
    assert {("P2", "ERROR"), ("P3", "ERROR"), ("P5", "ERROR"), ("B1", "ERROR")} <= levels(found)
    biased = {node for rule, _, node in found if rule == "P5"}
    assert biased == {"stem", "conv1", "conv2", "a", "b", "fc"}
    assert {node for rule, _, node in found if rule == "F2"} == biased
    assert ("F6", "WARN", "add") in found
    assert ("F9", "WARN", "cat") in found


def test_quantize_static_with_uint8_activations(quantize_static):
    found = quantize_static("QUInt8")
    assert ("P3", "ERROR", "x_QuantizeLinear") in found
    assert ("P2", "ERROR", "x_QuantizeLinear") in found


def test_quantize_static_with_options_for_tensorrt(quantize_static):
    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    found = quantize_static(per_channel=True, **symmetric)
    split = {node for rule, level, node in found if (rule, level) == ("F4", "WARN")}
    assert len(split) == 4  # stem, conv1, a, b: before their activations
    assert ("F6", "WARN", "add") in found
    assert ("F9", "WARN", "cat") in found
    assert {rule for rule, level, _ in found if level == "ERROR"} == {"B1"}  # output quantized


def test_quantize_static_with_integer_operators(quantize_static):
    found = quantize_static(form="QOperator")
    refused = {node for rule, _, node in found if rule == "P1"}
    assert {"stem_quant", "add_quant", "cat_quant", "gap_quant", "fc_quant"} <= refused


def test_uint8_codes_and_per_channel_activations():
    """NNCF: asymmetric uint8 activations, one scale per channel before a depthwise conv."""
    g = Graph()
    x = g.op("Relu", g.input(1, 16, 8, 8))
    x = g.qdq(x, np.full(16, 0.1), axis=1, zero=7, dtype=np.uint8, name="act")
    y = g.conv(x, 1, 16, group=16, name="depthwise")
    found = findings_of(g.model(y))
    pairs = [(rule, "ERROR", f"act/{kind}") for rule in ("P2", "P3", "P7") for kind in ("q", "dq")]
    assert sorted(found) == sorted(pairs)


def test_scale_of_four_dimensions():
    """Fake quantization kept its broadcast shape."""
    g = Graph()
    scale, zero = g.const(np.full((1, 16, 1, 1), 0.1)), g.const(np.zeros((1, 16, 1, 1)), np.int8)
    x = g.op("QuantizeLinear", g.input(1, 16, 8, 8), scale, zero, axis=1, name="q")
    y = g.op("DequantizeLinear", x, scale, zero, axis=1, name="dq")
    rules = {one[0] for one in findings_of(g.model(g.conv(y, 16, 16)))}
    assert {"P6", "P7"} <= rules


def test_clip_on_stored_codes():
    """Brevitas: int8 weight -> Clip -> DQ, and uint8 activations."""
    g = Graph()
    scale, zero = g.const(np.full(16, 0.1)), g.const(np.zeros(16), np.int8)
    codes = g.const(np.ones((16, 16, 3, 3)), np.int8)
    codes = g.op("Clip", codes, g.const(-127, np.int8), g.const(127, np.int8))
    w = g.op("DequantizeLinear", codes, scale, zero, axis=0, name="w/dq")
    x = g.qdq(g.op("Relu", g.input(1, 16, 8, 8)), dtype=np.uint8, name="act")
    found = findings_of(g.model(g.op("Conv", x, w, name="conv")))
    assert found == [
        ("P3", "ERROR", "act/q"),
        ("P3", "ERROR", "act/dq"),
        ("F3", "WARN", "w/dq"),
    ]


def test_float_residuals_and_batch_norms_left():
    """modelopt.torch: no residual Add quantized, every BatchNormalization still there."""
    g = Graph()
    x = g.op("Relu", g.input(1, 16, 8, 8))
    for i in range(3):
        y = g.conv(g.qdq(x, 0.1, name=f"x{i}"), 16, 16, name=f"{i}.conv1")
        y = g.op("Relu", g.batch_norm(y, 16, name=f"{i}.bn1"))
        y = g.conv(g.qdq(y, 0.2, name=f"y{i}"), 16, 16, name=f"{i}.conv2")
        x = g.op("Relu", g.op("Add", g.batch_norm(y, 16, name=f"{i}.bn2"), x, name=f"{i}.add"))
    found = findings_of(g.model(x))
    assert sorted(found) == sorted(
        [("F5", "WARN", f"{i}.bn{j}") for i in range(3) for j in (1, 2)]
        + [("F6", "WARN", f"{i}.add") for i in range(3)]
    )


def test_quantized_layer_norm_inputs_and_float_attention():
    """modelopt.torch on a vision transformer."""
    g = Graph(17)
    x = g.op("Relu", g.input(1, 8, 32))
    n = g.qdq(x, 0.1, name="norm_in")
    n = g.op("LayerNormalization", n, g.const(np.ones(32)), axis=-1, name="norm")
    q, k, v = (g.linear(g.qdq(n, 0.2, name=f"{p}in"), 32, 32, name=p) for p in "qkv")
    scores = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 2, 1]), name="qk")
    y = g.op("MatMul", g.op("Softmax", scores, axis=-1), v, name="pv")
    found = findings_of(g.model(g.op("Exp", y)))
    assert ("F12", "WARN", "norm") in found
    assert {("F1", "WARN", "qk"), ("F1", "WARN", "pv")} <= set(found)
    assert ("F17", "INFO", "kin/q") in found or ("F17", "INFO", "qin/q") in found


def test_int32_bias():
    g = Graph()
    bias = g.dq(
        g.const(np.zeros(16), np.int32), np.full(16, 0.01), axis=0, dtype=np.int32, name="b"
    )
    y = g.op("Conv", g.qdq(g.input(1, 16, 8, 8)), g.weight(16, 16, 3, 3), bias, name="conv")
    assert findings_of(g.model(y)) == [("P3", "ERROR", "b"), ("P5", "ERROR", "conv")]


def test_fake_quantize_kept_as_a_foreign_operator():
    g = Graph()
    x = g.op("FakeQuantize", g.input(1, 16, 8, 8), name="fq", domain="org.openvinotoolkit")
    w = g.op("Quant", g.const(np.ones((16, 16, 3, 3))), name="quant", domain="onnx.brevitas")
    y = g.op("ATen", x, name="aten", domain="org.pytorch.aten", operator="fake_quantize_per_tensor")
    y = g.op("Conv", y, w, name="conv")
    refused = [one for one in findings_of(g.model(y)) if one[0] == "P1"]
    assert refused == [("P1", "ERROR", name) for name in ("fq", "quant", "aten")]


def test_decomposed_dequantization_of_a_weight():
    """codes -> Cast -> Mul(scale): the weight is folded to float, and one input only is INT8."""
    g = Graph()
    w = g.op("Cast", g.const(np.ones((16, 16, 3, 3)), np.int8), to=onnx.TensorProto.FLOAT)
    w = g.op("Mul", w, g.const(np.full((16, 1, 1, 1), 0.1)))
    y = g.op("Conv", g.qdq(g.input(1, 16, 8, 8)), w, name="conv")
    assert findings_of(g.model(y)) == [("B1", "ERROR", "conv")]


def test_weights_in_the_file_are_read():
    model = float_net()
    assert numpy_helper.to_array(model.graph.initializer[0]).shape == (16, 16, 3, 3)
    assert findings_of(model) == [("F1", "WARN", "net")]
