from __future__ import annotations

import numpy as np
import pytest

from tests.export.lint.qdq_builder import Graph, findings_of, resnet_block, transformer_block


@pytest.mark.parametrize("rule", ["F4", "F7", "F11", "F18"])
def test_clean_files(rule):
    assert findings_of(resnet_block(downsample=True), rule) == []
    assert findings_of(transformer_block(), rule) == []


def conv_file(then, *, quantize=True):
    """conv -> [Q -> DQ] -> then -> Q -> DQ -> conv2."""
    g = Graph(18)
    x = g.conv(g.qdq(g.input(1, 16, 8, 8), name="in"), 16, 16, name="conv")
    x = g.qdq(x, 0.2, name="mid") if quantize else x
    x = g.qdq(then(g, x), 0.3, name="out")
    return g.model(g.conv(x, 16, 16, name="conv2"))


EPILOGUES = {
    "Relu": lambda g, x: g.op("Relu", x),
    "Clip": lambda g, x: g.op("Clip", x, g.const(0), g.const(6)),
    "LeakyRelu": lambda g, x: g.op("LeakyRelu", x),
    "PRelu": lambda g, x: g.op("PRelu", x, g.const(np.ones((16, 1, 1)))),
    "bias": lambda g, x: g.op("Add", x, g.const(np.ones((16, 1, 1)))),
}
SMOOTH = {
    "Sigmoid": lambda g, x: g.op("Sigmoid", x),
    "SiLU": lambda g, x: g.op("Mul", x, g.op("Sigmoid", x)),
    "HardSwish": lambda g, x: g.op("HardSwish", x),
    "Erf": lambda g, x: g.op("Mul", x, g.op("Erf", g.op("Div", x, g.const(1.41)))),
}


@pytest.mark.parametrize("kind", EPILOGUES)
def test_f4_pair_in_front_of_an_epilogue(kind):
    then = EPILOGUES[kind]
    assert findings_of(conv_file(then), check=True) == [("F4", "WARN", "mid/q")]
    assert findings_of(conv_file(then, quantize=False), check=True) == []


def test_f4_pair_in_front_of_a_batch_norm():
    found = findings_of(conv_file(lambda g, x: g.batch_norm(x, 16)))
    assert found == [("F5", "WARN", "bn"), ("F4", "WARN", "mid/q")]


def test_f4_pair_behind_a_bias_add():
    g = Graph()
    y = g.qdq(g.linear(g.qdq(g.input(4, 32), name="in"), 32, 16), 0.2, name="mid")
    found = findings_of(g.model(g.op("Relu", y)))
    assert found == [("F4", "WARN", "mid/q")]


@pytest.mark.parametrize("kind", SMOOTH)
def test_f11_pair_in_front_of_a_smooth_activation(kind):
    then = SMOOTH[kind]
    assert findings_of(conv_file(then), "F11", check=True) == [("F11", "WARN", "mid/q")]
    assert findings_of(conv_file(then), "F4") == []
    assert findings_of(conv_file(then, quantize=False), check=True) == []


def test_f11_pair_inside_silu():
    def silu(g, x):
        return g.op("Mul", x, g.qdq(g.op("Sigmoid", x), 0.01, name="gate"), name="mul")

    assert findings_of(conv_file(silu, quantize=False)) == [("F11", "WARN", "gate/q")]


@pytest.mark.parametrize("quantized", [[], ["x"], ["gate"], ["x", "gate"]])
def test_f11_squeeze_excite(quantized):
    g = Graph()
    x = g.op("Relu", g.conv(g.qdq(g.input(1, 16, 8, 8), name="in"), 16, 16, name="conv"))
    gate = g.qdq(g.op("GlobalAveragePool", x), name="squeezed")
    gate = g.op("Sigmoid", g.conv(gate, 16, 16, name="fc", size=1))
    if "x" in quantized:
        x = g.qdq(x, 0.2, name="x")
    if "gate" in quantized:
        gate = g.qdq(gate, 0.01, name="gate")
    y = g.qdq(g.op("Mul", x, gate, name="se"), 0.3, name="out")
    model = g.model(g.conv(y, 16, 16, name="next"))
    expected = {0: [("F11", "INFO", "se")], 1: [("F11", "WARN", "se")], 2: []}
    assert findings_of(model, check=True) == expected[len(quantized)]


POOLS = {
    "GlobalAveragePool": {},
    "AveragePool": {"kernel_shape": [2, 2]},
    "ReduceMean": {"axes": [2, 3]},
}


@pytest.mark.parametrize("op", POOLS)
@pytest.mark.parametrize("quantized_output", [True, False])
def test_f7_pooling(op, quantized_output):
    g = Graph()
    y = g.op(op, g.qdq(g.input(1, 16, 8, 8)), name="pool", **POOLS[op])
    y = g.op("Flatten", y)
    y = g.op("Relu", g.qdq(y, 0.2, name="out") if quantized_output else y)
    expected = [] if quantized_output else [("F7", "WARN", "pool")]
    assert findings_of(g.model(y), check=True) == expected


def test_f7_reduce_mean_axes_as_an_input():
    g = Graph(18)
    y = g.op("ReduceMean", g.qdq(g.input(1, 16, 8, 8)), g.const([-1, -2], np.int64), name="pool")
    assert findings_of(g.model(g.op("Relu", y)), check=True) == [("F7", "WARN", "pool")]


@pytest.mark.parametrize("op", ["Add", "Mul"])
def test_f7_joins(op):
    g = Graph()
    a, b = g.input(1, 16, 8, 8, name="a"), g.input(1, 16, 8, 8, name="b")
    aq, bq = g.qdq(a, name="aq"), g.qdq(b, name="bq")
    bad = g.op("Exp", g.op("Relu", g.op(op, aq, bq, name="bad")))
    good = g.op("Exp", g.qdq(g.op("Relu", g.op(op, aq, bq, name="good")), name="out"))
    half = g.op("Exp", g.op(op, aq, b, name="half"))
    constant = g.op("Exp", g.op(op, aq, g.const(2.0), name="constant"))
    found = findings_of(g.model(bad, good, half, constant), check=True)
    assert found == [("F7", "WARN", "bad")]


@pytest.mark.parametrize("behind", [True, False])
def test_f18_quantizer_and_pad(behind):
    g = Graph()
    pads = g.const([0, 0, 1, 1, 0, 0, 1, 1], np.int64)
    x = g.input(1, 16, 8, 8)
    x = g.qdq(g.op("Pad", x, pads)) if behind else g.op("Pad", g.qdq(x), pads)
    model = g.model(g.conv(x, 16, 16))
    assert findings_of(model, check=True) == ([("F18", "WARN", "act/q")] if behind else [])


@pytest.mark.parametrize(("scale", "bad"), [(0.2, True), (0.1, False)])
def test_f18_requantization(scale, bad):
    g = Graph()
    x = g.op("Identity", g.qdq(g.input(1, 16, 8, 8), 0.1, name="first"))
    x = g.qdq(x, scale, name="second")
    found = findings_of(g.model(g.conv(x, 16, 16)), check=True)
    assert found == ([("F18", "WARN", "second/q")] if bad else [])
