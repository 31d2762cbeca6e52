from __future__ import annotations

import numpy as np
import pytest

from tests.export.lint.qdq_builder import Graph, findings_of


def weighted(op, shape, axis, *, left=False, **attributes):
    g = Graph()
    x = (4, 32) if len(shape) == 2 else (1, 16, 8, 8)
    operands = [g.qdq(g.input(*x)), g.weight(*shape, axis=axis)]
    return g.model(g.op(op, *(operands[::-1] if left else operands), name="op", **attributes))


@pytest.mark.parametrize(
    ("op", "shape", "axis", "attributes"),
    [
        ("Conv", (32, 16, 3, 3), None, {}),
        ("Conv", (32, 16, 3, 3), 1, {}),
        ("Conv", (32, 1, 3, 3), None, {"group": 16}),
        ("Gemm", (16, 32), 1, {"transB": 1}),
        ("Gemm", (32, 16), 0, {}),
        ("Gemm", (32, 16), None, {}),
        ("MatMul", (32, 16), 0, {}),
        ("MatMul", (32, 32), 0, {}),
        ("MatMul", (32, 16), None, {}),
    ],
)
def test_f2_granularity(op, shape, axis, attributes):
    assert findings_of(weighted(op, shape, axis, **attributes)) == [("F2", "WARN", "op")]


@pytest.mark.parametrize(
    ("op", "shape", "axis", "attributes"),
    [
        ("Conv", (32, 16, 3, 3), 0, {}),
        ("Conv", (32, 16, 3, 3), -4, {}),
        ("Conv", (32, 1, 3, 3), 0, {"group": 16}),
        ("Gemm", (16, 32), 0, {"transB": 1}),
        ("Gemm", (32, 16), 1, {}),
        ("MatMul", (32, 16), 1, {}),
        ("MatMul", (32, 16), -1, {}),
        ("ConvTranspose", (16, 32, 3, 3), None, {}),
    ],
)
def test_f2_accepts_output_channels(op, shape, axis, attributes):
    g = Graph()
    positive = None if axis is None else axis % len(shape)
    w = g.weight(*shape, axis=positive)
    for node in g.nodes:
        for attribute in node.attribute:
            attribute.i = axis
    x = (4, 32) if len(shape) == 2 else (1, 16, 8, 8)
    y = g.op(op, g.qdq(g.input(*x)), w, name="op", **attributes)
    assert findings_of(g.model(y), check=True) == []


def test_f2_weight_on_the_left():
    g = Graph()
    y = g.op("MatMul", g.weight(32, 16, axis=0), g.qdq(g.input(16, 64)), name="op")
    assert findings_of(g.model(y), "F2") == []
    g = Graph()
    y = g.op("MatMul", g.weight(32, 16, axis=1), g.qdq(g.input(16, 64)), name="op")
    assert findings_of(g.model(y), "F2") == [("F2", "WARN", "op")]


@pytest.mark.parametrize(("axis", "bad"), [(0, False), (1, True)])
def test_f2_follows_the_axis_through_a_transpose(axis, bad):
    g = Graph()
    w = g.op("Transpose", g.weight(32, 32, axis=axis), perm=[1, 0])
    y = g.op("MatMul", g.qdq(g.input(4, 32)), w, name="op")
    assert findings_of(g.model(y)) == ([("F2", "WARN", "op")] if bad else [])


def test_f2_single_output_channel_may_be_per_tensor():
    assert findings_of(weighted("Conv", (1, 16, 3, 3), None), "F2") == []


@pytest.mark.parametrize("axis", [0, 1])
def test_f2b_per_channel_transposed_conv(axis):
    model = weighted("ConvTranspose", (16, 32, 3, 3), axis)
    assert findings_of(model) == [("F2b", "WARN", "op")]


def test_f3_clip_between_codes_and_dq():
    g = Graph()
    codes = g.q(g.const(np.ones((16, 16, 3, 3))), np.full(16, 0.1), axis=0)
    codes = g.op("Clip", codes, g.const(-127, np.int8), g.const(127, np.int8))
    w = g.dq(codes, np.full(16, 0.1), axis=0, name="w/dq")
    y = g.op("Conv", g.qdq(g.input(1, 16, 8, 8)), w)
    assert findings_of(g.model(y), check=True) == [("F3", "WARN", "w/dq")]


@pytest.mark.parametrize(("value", "bad"), [(-12.75, True), (-12.8, True), (-12.74, False)])
@pytest.mark.parametrize("axis", [None, 0])
def test_f3_lowest_code_of_a_float_weight(value, bad, axis):
    g = Graph()
    weight = np.ones((16, 16, 3, 3), np.float32)
    weight[3, 2] = value
    w = g.qdq(g.const(weight), 0.1 if axis is None else np.full(16, 0.1), axis=axis, name="w")
    y = g.op("Conv", g.qdq(g.input(1, 16, 8, 8)), w)
    expected = [("F3", "INFO", "w/dq")] if bad else []
    assert findings_of(g.model(y), "F3", check=True) == expected


@pytest.mark.parametrize("lowest", [-128, -127])
def test_f3_lowest_code_of_an_int8_weight(lowest):
    g = Graph()
    codes = np.full((16, 16, 3, 3), lowest, np.int8)
    w = g.dq(g.const(codes, np.int8), np.full(16, 0.1), axis=0, name="w/dq")
    y = g.op("Conv", g.qdq(g.input(1, 16, 8, 8)), w)
    assert findings_of(g.model(y)) == ([("F3", "INFO", "w/dq")] if lowest == -128 else [])


@pytest.mark.parametrize("mixed", [True, False])
def test_f19_one_storage_form(mixed):
    g = Graph()
    x = g.qdq(g.input(4, 32))
    outs = [
        g.op("MatMul", x, g.weight(32, 16, axis=1, name=f"w{i}", int8=i == 0 or not mixed))
        for i in range(2)
    ]
    assert findings_of(g.model(*outs)) == ([("F19", "INFO", "net")] if mixed else [])
