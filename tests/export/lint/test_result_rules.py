"""F20 and F21, and the rules that the data of an engine switches off."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from qatkit.backend import ONNXRUNTIME, OPENVINO, TENSORRT, Backend
from qatkit.export.lint import lint_onnx
from tests.export.lint.qdq_builder import Graph, resnet_block

U8 = {"dtype": np.uint8}


def found(model, backend: Backend = ONNXRUNTIME, rule=None):
    findings = lint_onnx(model, backend=backend)
    return [(one.rule, one.level, one.node) for one in findings if rule in (None, one.rule)]


def chain(activation=None, *, quantized=True, zero=0, scale=0.1, **attributes):
    """conv, activation, Q/DQ, conv whose result leaves the graph."""
    g = Graph()
    x = g.conv(g.qdq(g.input(1, 16, 8, 8), zero=128, name="in", **U8), 16, 16, name="first")
    if activation == "Clip":
        x = g.op("Clip", x, g.const(0.0), g.const(6.0), name="act")
    elif activation is not None:
        x = g.op(activation, x, name="act", **attributes)
    x = g.qdq(x, scale, zero=zero, name="mid", **U8) if quantized else x
    return g.model(g.conv(x, 16, 16, name="second", float_weight=not quantized))


@pytest.mark.parametrize(
    ("activation", "options"),
    [
        (None, {"zero": 128}),
        ("Relu", {}),
        ("Clip", {"scale": 6 / 255}),
        ("Clip", {"scale": np.float32(6) / np.float32(255)}),
        ("Clip", {"scale": 0.01}),
    ],
)
def test_a_quantizer_that_makes_the_activation_superfluous(activation, options):
    assert found(chain(activation, **options)) == []


@pytest.mark.parametrize(
    ("activation", "options"), [("Relu", {"zero": 1}), ("Relu", {"zero": 128}), ("Clip", {})]
)
def test_f21_codes_that_the_activation_cuts_off(activation, options):
    model = chain(activation, **options)
    assert found(model) == [("F21", "WARN", "mid/q")]
    assert found(model, OPENVINO) == []


def test_f20_a_result_that_is_read_in_float():
    assert found(chain("Sigmoid"), rule="F20") == [("F20", "WARN", "first")]
    assert found(chain("Sigmoid"), OPENVINO, "F20") == []
    assert found(chain("Sigmoid"), TENSORRT, "F20") == []


def test_f20_leaves_float_readers_and_outputs_alone():
    assert found(chain(quantized=False), rule="F20") == []


@pytest.mark.parametrize(("readers", "bad"), [(1, False), (2, True)])
def test_f20_through_a_max_pool_that_alone_reads(readers, bad):
    g = Graph()
    x = g.op("Relu", g.conv(g.qdq(g.input(1, 16, 8, 8), zero=128, **U8), 16, 16, name="first"))
    pooled = g.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    outputs = [g.conv(g.qdq(pooled, name="a", **U8), 16, 16, name="second")]
    if readers == 2:
        outputs.append(g.conv(g.qdq(x, name="b", **U8), 16, 16, name="third"))
    assert bool(found(g.model(*outputs), rule="F20")) is bad


def test_f7_lets_a_result_be_quantized_for_a_float_reader():
    g = Graph()
    x = g.op("Relu", g.conv(g.qdq(g.input(1, 16, 8, 8), zero=128, **U8), 16, 16))
    x = g.op("GlobalAveragePool", g.qdq(x, name="mid", **U8), name="pool")
    model = g.model(g.op("Sigmoid", x))
    assert found(model, rule="F7") == []
    strict = dataclasses.replace(ONNXRUNTIME, quantized_results=frozenset())
    assert found(model, strict, "F7") == [("F7", "WARN", "pool")]


@pytest.mark.parametrize("backend", [ONNXRUNTIME, OPENVINO])
def test_a_file_of_integer_operators_and_an_integer_bias(backend):
    g = Graph()
    x = g.qdq(g.input(1, 16), zero=128, name="in", **U8)
    scale = g.const(np.full(32, 0.01, np.float32))
    bias = g.op("DequantizeLinear", g.const(np.zeros(32), np.int32), scale, axis=0, name="bias")
    y = g.op("Gemm", x, g.weight(32, 16, name="w"), bias, transB=1, name="fc")
    y = g.qdq(y, zero=128, name="out", **U8)
    model = g.model(y)
    assert [one for one in found(model, backend) if one[1] == "ERROR"] == []
    errors = {rule for rule, level, _ in found(model, TENSORRT) if level == "ERROR"}
    assert errors == {"P2", "P3", "P5", "B1"}


def test_p1_is_a_matter_of_the_engine():
    g = Graph()
    codes = g.q(g.input(1, 4, 4), zero=128, **U8)
    zero = g.const(128, np.uint8)
    y = g.op("QLinearMatMul", *[codes, g.const(0.1), zero] * 2, g.const(0.1), zero, name="product")
    model = g.model(g.dq(y, zero=128, **U8))
    assert found(model, TENSORRT, "P1") == [("P1", "ERROR", "product")]
    assert found(model, ONNXRUNTIME, "P1") == found(model, OPENVINO, "P1") == []


def test_a_file_for_tensorrt_is_slow_in_onnx_runtime_and_not_wrong():
    model = resnet_block()
    rules = {rule for rule, _, _ in found(model)}
    assert {level for _, level, _ in found(model)} == {"WARN"}
    assert {"F6", "F20", "F21"} <= rules
    assert found(model, TENSORRT, "F20") == found(model, TENSORRT, "F21") == []
