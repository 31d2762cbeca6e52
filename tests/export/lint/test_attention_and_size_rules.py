from __future__ import annotations

import numpy as np
import pytest

from tests.export.lint.qdq_builder import Graph, findings_of, resnet_block, transformer_block


@pytest.mark.parametrize("rule", ["F12", "F13", "F14", "F15"])
def test_clean_files(rule):
    assert findings_of(resnet_block(), rule) == []
    assert findings_of(transformer_block(), rule) == []


@pytest.mark.parametrize("op", ["Softmax", "LayerNormalization"])
@pytest.mark.parametrize("quantized", [True, False])
def test_f12_quantized_inputs(op, quantized):
    g = Graph(17)
    x = g.op("Relu", g.input(2, 8, 32))
    x = g.op("Reshape", g.qdq(x) if quantized else x, g.const([2, 8, 32], np.int64))
    rest = [g.const(np.ones(32))] if op == "LayerNormalization" else []
    y = g.op(op, x, *rest, axis=-1, name="op")
    y = g.linear(g.qdq(y, 0.2, name="out"), 32, 16)
    expected = [("F12", "WARN", "op")] if quantized else []
    assert findings_of(g.model(y), check=True) == expected


@pytest.mark.parametrize("quantized", [True, False])
def test_f12_decomposed_layer_norm(quantized):
    g = Graph()
    x = g.op("Relu", g.input(2, 8, 32))
    x = g.qdq(x) if quantized else x
    centred = g.op("Sub", x, g.op("ReduceMean", x, axes=[-1], name="mean"))
    variance = g.op("ReduceMean", g.op("Mul", centred, centred), axes=[-1])
    y = g.op("Div", centred, g.op("Sqrt", variance))
    y = g.linear(g.qdq(y, 0.2, name="out"), 32, 16)
    expected = [("F12", "WARN", "mean")] if quantized else []
    assert findings_of(g.model(y), check=True) == expected


def test_f13_float_softmax_output():
    found = findings_of(transformer_block(quantized_softmax=False))
    assert found == [("B1", "ERROR", "pv"), ("F13", "WARN", "softmax")]


def attention(*, head=16, length=8, output=True):
    g = Graph()
    q, k, v = (
        g.qdq(g.op("Relu", g.input(2, length, head, name=name)), name=f"{name}q") for name in "qkv"
    )
    scores = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 2, 1]), name="qk")
    scores = g.op("Softmax", g.op("Div", scores, g.const(4.0)), axis=-1, name="softmax")
    y = g.op("MatMul", g.qdq(scores, 0.01, name="p"), v, name="pv")
    y = g.op("Transpose", y, perm=[1, 0, 2])
    return g.model(g.op("Exp", g.qdq(y, 0.2, name="out") if output else y))


def test_f13_complete_attention_is_clean():
    assert findings_of(attention(), check=True) == []


def test_f13_output_not_quantized():
    assert findings_of(attention(output=False)) == [("F13", "WARN", "softmax")]


@pytest.mark.parametrize("sizes", [{"head": 24}, {"length": 513}])
def test_f13_sizes_outside_the_fusion(sizes):
    assert findings_of(attention(**sizes)) == [("F13", "INFO", "softmax")]


@pytest.mark.parametrize(
    ("m", "k", "n", "bad"),
    [
        (1, 32, 32, True),
        (4, 32, 1, True),
        (4, 8, 32, True),
        (4, 32, 8, True),
        (4, 16, 16, False),
        ("batch", 32, 32, False),
    ],
)
@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
def test_f14_small_products(m, k, n, bad, op):
    g = Graph()
    x = g.qdq(g.input(m, k))
    if op == "Gemm":
        y = g.op("Gemm", x, g.weight(n, k), transB=1, name="fc")
    else:
        y = g.op("MatMul", x, g.weight(k, n, axis=1), name="fc")
    assert findings_of(g.model(y), check=True) == ([("F14", "INFO", "fc")] if bad else [])


@pytest.mark.parametrize(
    ("c_in", "c_out", "first", "bad"),
    [
        (3, 16, True, True),
        (8, 16, True, False),
        (8, 16, False, True),
        (16, 8, False, True),
        (16, 16, False, False),
    ],
)
def test_f15_few_channels(c_in, c_out, first, bad):
    g = Graph()
    x = g.input(1, c_in, 8, 8)
    x = x if first else g.op("Relu", x)
    model = g.model(g.conv(g.qdq(x), c_in, c_out))
    assert findings_of(model, check=True) == ([("F15", "INFO", "conv")] if bad else [])


@pytest.mark.parametrize(("shape", "bad"), [((64, 1, 32), False), ((1, 1, 32), True)])
def test_f14_counts_all_rows(shape, bad):
    g = Graph()
    y = g.linear(g.qdq(g.input(*shape)), 32, 32)
    assert findings_of(g.model(y)) == ([("F14", "INFO", "fc")] if bad else [])


def test_f15_leaves_a_weight_of_one_dimension_to_others():
    g = Graph()
    model = g.model(g.op("Conv", g.qdq(g.input(1, 16, 8, 8)), g.weight(16), name="conv"))
    assert findings_of(model, "F15") == []


def test_f15_depthwise_counts_all_channels():
    g = Graph()
    x = g.qdq(g.op("Relu", g.input(1, 32, 8, 8)))
    assert findings_of(g.model(g.conv(x, 1, 32, group=32))) == []
