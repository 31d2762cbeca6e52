from __future__ import annotations

import numpy as np
import pytest

from tests.export.lint.qdq_builder import Graph, findings_of, resnet_block, transformer_block

CLEAN = resnet_block()


@pytest.mark.parametrize("rule", ["P5", "B1", "B2", "F1", "F5"])
def test_clean_files(rule):
    assert findings_of(CLEAN, rule) == []
    assert findings_of(transformer_block(), rule) == []


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose", "Gemm"])
@pytest.mark.parametrize("dtype", [np.int32, np.int8])
def test_p5_quantized_bias(op, dtype):
    g = Graph()
    shape = (4, 16) if op == "Gemm" else (1, 16, 8, 8)
    w = g.weight(*((16, 16) if op == "Gemm" else (16, 16, 3, 3)), axis=None)
    bias = g.dq(g.const(np.zeros(16), dtype), name="bias_dq", dtype=dtype)
    y = g.op(op, g.qdq(g.input(*shape)), w, bias, name="op")
    found = findings_of(g.model(y))
    assert ("P5", "ERROR", "op") in found
    assert (("P3", "ERROR", "bias_dq") in found) == (dtype is np.int32)


def test_p5_bias_add_behind_matmul():
    g = Graph()
    y = g.op("MatMul", g.qdq(g.input(4, 32)), g.weight(32, 16, axis=1))
    y = g.op("Add", g.qdq(g.const(np.zeros(16)), name="bias"), y, name="add")
    assert findings_of(g.model(y)) == [("P5", "ERROR", "add")]


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose", "Gemm", "MatMul"])
@pytest.mark.parametrize("which", ["data", "weight"])
def test_b1_one_quantized_input(op, which):
    g = Graph()
    dense = op in ("Gemm", "MatMul")
    x, w = g.input(*((4, 16) if dense else (1, 16, 8, 8))), (16, 16) if dense else (16, 16, 3, 3)
    if which == "data":
        y = g.op(op, g.qdq(x), g.const(np.ones(w)), name="op")
    else:
        y = g.op(op, x, g.weight(*w), name="op")
    assert findings_of(g.model(y), "B1") == [("B1", "ERROR", "op")]
    assert findings_of(g.model(y), "F1") == []


@pytest.mark.parametrize("quantized", [0, 1])
def test_b1_matmul_of_two_activations(quantized):
    g = Graph()
    operands = [g.input(2, 4, 4, name="a"), g.input(2, 4, 4, name="b")]
    operands[quantized] = g.qdq(operands[quantized])
    model = g.model(g.op("MatMul", *operands, name="mm"))
    assert findings_of(model) == [("B1", "ERROR", "mm")]


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [
        ("MaxPool", [], {"kernel_shape": [1, 1]}),
        ("Reshape", [(np.int64, [1, 16, 8, 8])], {}),
        ("Transpose", [], {"perm": [0, 1, 3, 2]}),
        ("Slice", [(np.int64, [0]), (np.int64, [8]), (np.int64, [2])], {}),
        ("Identity", [], {}),
        ("Dropout", [], {}),
        ("Resize", [None, (np.float32, [1, 1, 2, 2])], {"mode": "nearest"}),
    ],
)
def test_b1_sees_through_copies(op, inputs, attributes):
    g = Graph()
    rest = ["" if one is None else g.const(one[1], one[0]) for one in inputs]
    x = g.op(op, g.qdq(g.input(1, 16, 8, 8)), *rest, **attributes)
    model = g.model(g.conv(x, 16, 16))
    assert findings_of(model, "B1", check=True) == []


@pytest.mark.parametrize("op", ["Relu", "AveragePool", "Sigmoid"])
def test_b1_does_not_see_through_arithmetic(op):
    g = Graph()
    attributes = {"kernel_shape": [1, 1]} if op == "AveragePool" else {}
    x = g.op(op, g.qdq(g.input(1, 16, 8, 8)), **attributes)
    assert findings_of(g.model(g.conv(x, 16, 16)), "B1") == [("B1", "ERROR", "conv")]


def test_b1_concat_with_one_float_input():
    g = Graph()
    x = g.input(1, 16, 8, 8)
    y = g.op("Concat", g.qdq(x), g.op("Relu", x), axis=1, name="cat")
    found = findings_of(g.model(g.conv(y, 32, 16)))
    assert found == [("B1", "ERROR", "conv"), ("F9", "INFO", "cat")]


def test_b1_graph_outputs():
    g = Graph()
    x = g.conv(g.qdq(g.input(1, 16, 8, 8), name="in"), 16, 16)
    y = g.op("Identity", g.qdq(x, name="out"))
    assert findings_of(g.model(y)) == [("B1", "ERROR", "out/dq")]


def test_b1_q_as_graph_output():
    g = Graph()
    codes = g.q(g.op("Relu", g.input(1, 16)), name="q")
    model = g.model(codes)
    model.graph.output[0].type.tensor_type.elem_type = 3
    assert findings_of(model) == [("B1", "ERROR", "q")]


def test_b2_quantized_constant_without_dq():
    g = Graph()
    w = g.q(g.const(np.ones((16, 16))), name="w/q")
    y = g.op("MatMulInteger", g.q(g.input(4, 16)), w, name="mm")
    assert ("B2", "ERROR", "w/q") in findings_of(g.model(y))


def test_b2_quantized_constant_without_reader():
    g = Graph()
    g.q(g.const(np.ones((16, 16))), name="w/q")
    assert ("B2", "ERROR", "w/q") in findings_of(g.model(g.op("Relu", g.input(4, 16))))


def test_f1_float_layer_in_a_quantized_file():
    g = Graph()
    x = g.op("Relu", g.conv(g.input(1, 16, 8, 8), 16, 16, name="float", float_weight=True))
    y = g.conv(g.qdq(x), 16, 16, name="int8")
    assert findings_of(g.model(y)) == [("F1", "WARN", "float")]


def test_f1_float_file_is_one_finding():
    g = Graph()
    x = g.conv(g.input(1, 16, 8, 8), 16, 16, name="a", float_weight=True)
    y = g.conv(x, 16, 16, name="b", float_weight=True)
    assert findings_of(g.model(y)) == [("F1", "WARN", "net")]


def test_f1_ignores_constant_and_integer_products():
    g = Graph()
    x = g.qdq(g.input(4, 4))
    table = g.op("MatMul", g.const(np.ones((4, 4))), g.const(np.ones((4, 4))))
    sizes = g.op("Shape", x)
    product = g.op("MatMul", sizes, g.const([1, 1], np.int64))
    y = g.op("Add", g.op("Add", x, table), g.op("Cast", product, to=1))
    assert findings_of(g.model(y), "F1", check=True) == []


@pytest.mark.parametrize("bias", [False, True])
def test_f5_batch_norm_behind_a_quantized_conv(bias):
    g = Graph()
    x = g.conv(g.qdq(g.input(1, 16, 8, 8)), 16, 16)
    x = g.op("Add", x, g.const(np.ones((1, 16, 1, 1)))) if bias else x
    y = g.op("Relu", g.batch_norm(x, 16))
    assert findings_of(g.model(y), check=True) == [("F5", "WARN", "bn")]


def test_f5_leaves_other_batch_norms_alone():
    g = Graph()
    x = g.conv(g.input(1, 16, 8, 8), 16, 16, name="float", float_weight=True)
    x = g.op("Relu", g.batch_norm(x, 16, name="fused"))
    x = g.op("Relu", g.batch_norm(x, 16, name="pre_activation"))
    assert findings_of(g.model(g.conv(g.qdq(x), 16, 16)), "F5") == []
