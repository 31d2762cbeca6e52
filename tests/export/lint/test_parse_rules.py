from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto

from qatkit.backend import TENSORRT
from qatkit.export.lint import lint_onnx
from tests.export.lint.qdq_builder import Graph, findings_of


def activation(scale=0.1, *, zero=0, dtype=np.int8, opset=13, axis=None, shape=(1, 16, 8, 8)):
    """x -> Q -> DQ -> Relu, with the names act/q and act/dq."""
    g = Graph(opset)
    y = g.qdq(g.input(*shape), scale, zero=zero, dtype=dtype, axis=axis)
    return g.model(g.op("Relu", y))


CLEAN = activation()


@pytest.mark.parametrize("rule", ["P1", "P2", "P3", "P4", "P6", "P7", "P8", "P9", "P10"])
def test_clean_activation_has_no_finding(rule):
    assert findings_of(CLEAN, rule, check=True) == []


@pytest.mark.parametrize(
    ("op", "domain"),
    [
        ("QLinearConv", ""),
        ("ConvInteger", ""),
        ("MatMulInteger", ""),
        ("DynamicQuantizeLinear", ""),
        ("QLinearAdd", "com.microsoft"),
        ("QGemm", "com.microsoft"),
        ("MatMulNBits", "com.microsoft"),
        ("QuantizeLinear", "com.microsoft"),
        ("TRT_FP8QuantizeLinear", "trt"),
        ("FakeQuantize", "org.openvinotoolkit"),
        ("Quant", "onnx.brevitas"),
        ("fake_quantize_per_tensor_affine", "aten"),
    ],
)
def test_p1_integer_and_foreign_operators(op, domain):
    g = Graph()
    y = g.op(op, g.input(1, 4), g.const(0.1), g.const(0, np.int8), name="bad", domain=domain)
    assert ("P1", "ERROR", "bad") in findings_of(g.model(y))


@pytest.mark.parametrize(("op", "domain"), [("Gelu", "com.microsoft"), ("nms", "torchvision")])
def test_p1_leaves_other_foreign_operators_alone(op, domain):
    g = Graph()
    assert findings_of(g.model(g.op(op, g.input(1, 4), domain=domain)), "P1") == []


def test_p1_accepts_the_standard_domain_by_its_long_name():
    model = activation()
    model.graph.node[0].domain = "ai.onnx"
    assert findings_of(model) == []


def test_p2_zero_point_not_zero():
    nodes = [("P2", "ERROR", "act/q"), ("P2", "ERROR", "act/dq")]
    assert findings_of(activation(zero=3)) == nodes


def test_p2_one_bad_zero_point_of_a_channel():
    g = Graph()
    zeros = np.zeros(16, np.int8)
    zeros[7] = -1
    w = g.op(
        "DequantizeLinear",
        g.const(np.ones((16, 16, 3, 3)), np.int8),
        g.const(np.ones(16)),
        g.const(zeros, np.int8),
        axis=0,
        name="dq",
    )
    y = g.op("Conv", g.qdq(g.input(1, 16, 8, 8)), w)
    assert findings_of(g.model(y)) == [("P2", "ERROR", "dq")]


def test_p2_zero_point_from_a_graph_input():
    g = Graph()
    zero = g.input(name="zero", dtype=TensorProto.INT8)
    y = g.op("QuantizeLinear", g.input(1, 4), g.const(0.1), zero, name="q")
    assert ("P2", "ERROR", "q") in findings_of(g.model(g.dq(y)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16])
def test_p3_code_types(dtype):
    found = findings_of(activation(dtype=dtype, opset=21))
    assert found == [("P3", "ERROR", "act/q"), ("P3", "ERROR", "act/dq")]


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.int4])
def test_p3_accepts_what_the_parser_accepts(dtype):
    assert findings_of(activation(dtype=dtype, opset=21)) == []


def test_p3_missing_zero_points():
    g = Graph()
    codes = g.op("QuantizeLinear", g.input(1, 4), g.const(0.1), name="q")
    y = g.op("Relu", g.op("DequantizeLinear", codes, g.const(0.1), name="dq"))
    found = findings_of(g.model(y))
    assert ("P3", "ERROR", "q") in found
    assert ("P3", "ERROR", "dq") in found  # the codes are uint8
    assert ("P3", "INFO", "dq") in found  # TensorRT 8 would refuse it, see test_version_rules


def test_p3_omitted_by_an_empty_name():
    g = Graph()
    codes = g.op("QuantizeLinear", g.input(1, 4), g.const(0.1), "", name="q")
    assert ("P3", "ERROR", "q") in findings_of(g.model(g.op("Relu", g.dq(codes))))


def test_p2_and_p3_follow_the_backend():
    loose = dataclasses.replace(TENSORRT, name="loose", unsigned_int8=True, zero_point=True)
    assert lint_onnx(activation(zero=3, dtype=np.uint8), backend=loose) == []


@pytest.mark.parametrize("scale", [0.0, -0.1, np.inf, np.nan])
def test_p4_bad_scales(scale):
    found = findings_of(activation(scale))
    assert found == [("P4", "ERROR", "act/q"), ("P4", "ERROR", "act/dq")]


def test_p4_one_dead_channel():
    g = Graph()
    scale = np.full(16, 0.1, np.float32)
    scale[5] = 0
    w = g.qdq(g.const(np.ones((16, 16, 3, 3))), scale, axis=0, name="w")
    y = g.op("Conv", g.qdq(g.input(1, 16, 8, 8)), w)
    found = lint_onnx(g.model(y))
    assert [one.node for one in found if one.rule == "P4"] == ["w/q", "w/dq"]
    assert "scale[5] is 0" in found[0].message


def test_p4_scale_computed_from_the_input():
    g = Graph()
    x = g.input(1, 4)
    scale = g.op("ReduceMax", x, keepdims=0)
    y = g.op("QuantizeLinear", x, scale, g.const(0, np.int8), name="q")
    assert ("P4", "ERROR", "q") in findings_of(g.model(g.dq(y)))


def weight_file(scale_size, axis, *, zeros=None, shape=(16, 32, 3, 3)):
    g = Graph()
    attributes = {} if axis is None else {"axis": axis}
    inputs = [g.const(np.full(scale_size, 0.1)), g.const(np.zeros(zeros or scale_size), np.int8)]
    data = g.const(np.ones(shape))
    codes = g.op("QuantizeLinear", data, *inputs, name="w/q", **attributes)
    w = g.op("DequantizeLinear", codes, *inputs, name="w/dq", **attributes)
    return g.model(g.op("Conv", g.qdq(g.input(1, shape[1], 8, 8)), w, name="conv"))


W_ERRORS = [("P6", "ERROR", "w/q"), ("P6", "ERROR", "w/dq")]


@pytest.mark.parametrize(
    ("size", "axis"),
    [(15, 0), (16, 1), (16, 4), (16, -5), (32, None), ((16, 2), 0)],
    ids=["length", "axis", "too high", "too low", "not written", "matrix"],
)
def test_p6_scales_that_do_not_fit(size, axis):
    assert findings_of(weight_file(size, axis), "P6") == W_ERRORS


@pytest.mark.parametrize(("size", "axis"), [(16, 0), (16, -4), (32, 1), (1, None), (1, 0), ((), 7)])
def test_p6_scales_that_fit(size, axis):
    assert findings_of(weight_file(size, axis), "P6") == []


def test_p6_one_zero_point_for_many_scales():
    assert findings_of(weight_file(16, 0, zeros=1), "P6") == W_ERRORS


def test_p6_block_scales():
    g = Graph(21)
    scale, zero = g.const(np.ones((2, 16))), g.const(np.zeros((2, 16)), ml_dtypes.int4)
    codes = g.const(np.ones((32, 16)), ml_dtypes.int4)
    w = g.op("DequantizeLinear", codes, scale, zero, axis=0, block_size=16, name="dq")
    model = g.model(g.op("MatMul", g.input(4, 32), w, name="fc"))
    assert findings_of(model, check=True) == []


def test_p7_per_channel_activation():
    found = findings_of(activation(np.full(16, 0.1), axis=1))
    assert found == [("P7", "ERROR", "act/q"), ("P7", "ERROR", "act/dq")]


def test_p7_accepts_a_weight_behind_constant_arithmetic():
    g = Graph()
    w = g.op("Mul", g.const(np.ones((32, 16))), g.const(0.5))
    w = g.op("Transpose", g.op("Reshape", w, g.const([32, 16], np.int64)), perm=[1, 0])
    w = g.qdq(w, np.full(16, 0.01), axis=0, name="w")
    y = g.op("Gemm", g.qdq(g.input(4, 32)), w, transB=1)
    assert findings_of(g.model(y), check=True) == []


def test_p8_scalar_data():
    found = findings_of(activation(shape=()))
    assert found == [("P8", "ERROR", "act/q"), ("P8", "ERROR", "act/dq")]


def test_p9_axis_needs_opset_13():
    g = Graph(11)
    found = findings_of(g.model(g.op("Relu", g.qdq(g.input(1, 4), axis=1))))
    assert found == [("P9", "ERROR", "act/q"), ("P9", "ERROR", "act/dq")]


@pytest.mark.parametrize(
    ("dtype", "opset", "bad"),
    [
        (ml_dtypes.float8_e4m3fn, 18, True),
        (ml_dtypes.float8_e4m3fn, 19, False),
        (ml_dtypes.int4, 19, True),
        (ml_dtypes.int4, 21, False),
        (np.int8, 13, False),
    ],
)
def test_p9_code_types(dtype, opset, bad):
    expected = [("P9", "ERROR", "act/q"), ("P9", "ERROR", "act/dq")] if bad else []
    assert findings_of(activation(dtype=dtype, opset=opset), "P9") == expected


@pytest.mark.parametrize(("opset", "bad"), [(17, True), (19, False)])
def test_p9_half_scales(opset, bad):
    g = Graph(opset)
    scale, zero = g.const(0.1, np.float16), g.const(0, np.int8)
    codes = g.op("QuantizeLinear", g.input(1, 4, dtype=TensorProto.FLOAT16), scale, zero, name="q")
    y = g.op("DequantizeLinear", codes, scale, zero, name="dq")
    model = g.model(g.op("Cast", g.op("Relu", y), to=TensorProto.FLOAT))
    assert findings_of(model) == ([("P9", "ERROR", "q"), ("P9", "ERROR", "dq")] if bad else [])


@pytest.mark.parametrize(
    ("opset", "ir_version", "bad"),
    [(13, 6, True), (13, 7, False), (18, 7, True), (19, 8, True), (21, 9, True), (13, 10, False)],
)
def test_p9_ir_version(opset, ir_version, bad):
    model = activation(opset=opset)
    model.ir_version = ir_version
    assert findings_of(model) == ([("P9", "ERROR", "net")] if bad else [])


def test_p10_float_scale_on_half_data():
    g = Graph(19)
    x = g.input(1, 4, dtype=TensorProto.FLOAT16)
    found = findings_of(g.model(g.op("Relu", g.qdq(x))))
    assert found == [("P10", "ERROR", "act/q")]


def test_p10_integer_data():
    g = Graph()
    found = findings_of(g.model(g.op("Relu", g.qdq(g.input(1, 4, dtype=TensorProto.INT32)))))
    assert found == [("P10", "ERROR", "act/q")]
