from __future__ import annotations

import numpy as np
import pytest

from tests.export.lint.qdq_builder import Graph, findings_of, resnet_block

COPIES = {
    "MaxPool": ([], {"kernel_shape": [1, 1]}),
    "Reshape": ([[1, 16, 8, 8]], {}),
    "Transpose": ([], {"perm": [0, 1, 3, 2]}),
    "Slice": ([[0], [8], [2]], {}),
    "Gather": ([[0, 1]], {"axis": 2}),
}


@pytest.mark.parametrize("rule", ["F8", "F9", "F10", "F17"])
def test_clean_file(rule):
    assert findings_of(resnet_block(downsample=True), rule) == []


@pytest.mark.parametrize("op", COPIES)
@pytest.mark.parametrize(("scale", "bad"), [(0.2, True), (0.1, False)])
def test_f8_scales_around_a_copy(op, scale, bad):
    g = Graph()
    inputs, attributes = COPIES[op]
    x = g.qdq(g.input(1, 16, 8, 8), 0.1, name="before")
    x = g.op(op, x, *(g.const(one, np.int64) for one in inputs), **attributes)
    model = g.model(g.conv(g.qdq(x, scale, name="after"), 16, 16))
    assert findings_of(model, check=True) == ([("F8", "WARN", "after/q")] if bad else [])


@pytest.mark.parametrize(("scale", "bad"), [(0.2, True), (0.1, False)])
def test_f8_sibling_quantizer_in_front_of_the_copy(scale, bad):
    g = Graph()
    x = g.op("Relu", g.input(1, 16, 8, 8))
    a = g.conv(g.qdq(x, 0.1, name="direct"), 16, 16, name="a")
    pooled = g.op("MaxPool", x, kernel_shape=[2, 2])
    b = g.conv(g.qdq(pooled, scale, name="pooled"), 16, 16, name="b")
    assert findings_of(g.model(a, b)) == ([("F8", "WARN", "pooled/q")] if bad else [])


@pytest.mark.parametrize(("scale", "bad"), [(0.2, True), (0.1, False)])
def test_f9_scales_of_concat_inputs(scale, bad):
    g = Graph()
    a = g.qdq(g.input(1, 16, 8, 8, name="a"), 0.1, name="aq")
    b = g.qdq(g.input(1, 16, 8, 8, name="b"), scale, name="bq")
    y = g.op("Concat", a, b, axis=1, name="cat")
    found = findings_of(g.model(g.conv(y, 32, 16)), check=True)
    assert found == ([("F9", "WARN", "cat")] if bad else [])


@pytest.mark.parametrize(("scale", "bad"), [(0.2, True), (0.1, False)])
def test_f9_scale_of_concat_output(scale, bad):
    g = Graph()
    a = g.qdq(g.input(1, 16, 8, 8, name="a"), 0.1, name="aq")
    b = g.qdq(g.input(1, 16, 8, 8, name="b"), 0.1, name="bq")
    y = g.qdq(g.op("Concat", a, b, axis=1, name="cat"), scale, name="out")
    assert findings_of(g.model(g.conv(y, 32, 16))) == ([("F9", "WARN", "cat")] if bad else [])


@pytest.mark.parametrize(("scale", "bad"), [(0.2, True), (0.1, False)])
def test_f9_sibling_quantizer_of_a_concat_input(scale, bad):
    g = Graph()
    a = g.op("Relu", g.input(1, 16, 8, 8, name="a"))
    b = g.op("Relu", g.input(1, 16, 8, 8, name="b"))
    side = g.conv(g.qdq(a, 0.1, name="side"), 16, 16, name="side_conv")
    y = g.qdq(g.op("Concat", a, b, axis=1, name="cat"), scale, name="out")
    found = findings_of(g.model(side, g.conv(y, 32, 16)))
    assert found == ([("F9", "WARN", "cat")] if bad else [])


@pytest.mark.parametrize("followed", [True, False])
def test_f10_quantizer_for_a_resize(followed):
    g = Graph()
    x = g.op("Resize", g.qdq(g.input(1, 16, 8, 8)), "", g.const([1, 1, 2, 2]), name="up")
    x = g.qdq(x, name="out") if followed else x
    expected = [] if followed else [("F10", "INFO", "up")]
    assert findings_of(g.model(g.op("Relu", x)), check=True) == expected


@pytest.mark.parametrize(("scale", "level"), [(0.2, "WARN"), (0.1, "INFO")])
def test_f17_two_quantizers_of_one_tensor(scale, level):
    g = Graph()
    x = g.input(1, 16, 8, 8)
    a = g.conv(g.qdq(x, 0.1, name="first"), 16, 16, name="a")
    b = g.conv(g.qdq(x, scale, name="second"), 16, 16, name="b")
    assert findings_of(g.model(a, b)) == [("F17", level, "second/q")]


def test_f17_one_quantizer_for_two_readers():
    g = Graph()
    x = g.qdq(g.input(1, 16, 8, 8))
    model = g.model(g.conv(x, 16, 16, name="a"), g.conv(x, 16, 16, name="b"))
    assert findings_of(model, check=True) == []
