from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from qatkit.backend import TENSORRT
from qatkit.export.lint import lint_onnx
from tests.export.lint.qdq_builder import Graph, findings_of


def block(*, skip, branch, post=None, swap=False, float_conv=False):
    """Relu -> conv -> Relu -> conv -> [post] -> Add with the block input."""
    g = Graph()
    x = g.op("Relu", g.input(1, 16, 8, 8))
    xq = g.qdq(x, 0.1, name="x")
    y = g.op("Relu", g.conv(xq, 16, 16, name="conv1"))
    y = y if float_conv else g.qdq(y, 0.2, name="y")
    y = g.conv(y, 16, 16, name="conv2", float_weight=float_conv)
    y = post(g, y) if post else y
    y = g.qdq(y, 0.3, name="branch") if branch else y
    operands = [y, xq if skip else x]
    return g.model(g.op("Exp", g.op("Add", *operands[:: -1 if swap else 1], name="add")))


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize(
    ("skip", "branch", "good"),
    [(True, False, True), (False, False, False), (True, True, False), (False, True, False)],
)
def test_f6_identity_skip(skip, branch, good, swap):
    found = findings_of(block(skip=skip, branch=branch, swap=swap), "F6", check=True)
    assert found == ([] if good else [("F6", "WARN", "add")])


@pytest.mark.parametrize(
    "post",
    [
        lambda g, y: g.batch_norm(y, 16),
        lambda g, y: g.op("Dropout", y),
        lambda g, y: g.op("Add", y, g.const(np.ones((16, 1, 1)))),
        lambda g, y: g.op("Mul", y, g.const(np.ones((16, 1, 1)))),
    ],
    ids=["batch norm", "dropout", "bias", "layer scale"],
)
def test_f6_sees_through_the_epilogue(post):
    assert findings_of(block(skip=False, branch=False, post=post), "F6") == [("F6", "WARN", "add")]
    assert findings_of(block(skip=True, branch=False, post=post), "F6") == []


def test_f6_activation_ends_the_branch():
    def relu(g, y):
        return g.op("Relu", y)

    assert findings_of(block(skip=False, branch=False, post=relu), "F6") == []


def test_f6_float_conv_has_no_rule():
    assert findings_of(block(skip=False, branch=False, float_conv=True), "F6") == []


@pytest.mark.parametrize(
    ("quantized", "level"),
    [("short", None), ("deep", "WARN"), ("both", "WARN"), ("none", "WARN")],
)
def test_f6_two_conv_branches(quantized, level):
    g = Graph()
    x = g.qdq(g.op("Relu", g.input(1, 16, 8, 8)), name="x")
    deep = g.qdq(g.op("Relu", g.conv(x, 16, 16, name="conv1")), 0.2, name="mid")
    deep, short = g.conv(deep, 16, 16, name="conv2"), g.conv(x, 16, 16, name="down", size=1)
    deep = g.qdq(deep, 0.3, name="deep") if quantized in ("deep", "both") else deep
    short = g.qdq(short, 0.3, name="short") if quantized in ("short", "both") else short
    found = findings_of(g.model(g.op("Exp", g.op("Add", short, deep, name="add"))), "F6")
    assert found == ([("F6", level, "add")] if level else [])


@pytest.mark.parametrize(("right", "found"), [(True, []), (False, [("F6", "WARN", "add")])])
def test_f6_skip_that_is_a_conv_output(right, found):
    g = Graph()
    x = g.conv(g.qdq(g.input(1, 16, 8, 8), name="in"), 16, 16, name="stem")
    xq = g.qdq(x, 0.2, name="x")
    y = g.conv(xq, 16, 16, name="conv")
    operands = (xq, y) if right else (x, g.qdq(y, 0.3, name="y"))
    model = g.model(g.op("Exp", g.op("Add", *operands, name="add")))
    assert findings_of(model, "F6", check=True) == found


def test_f6_broadcast_add_is_no_residual():
    g = Graph()
    x = g.op("Relu", g.input(1, 16, 8, 8))
    y = g.conv(g.qdq(x), 16, 16)
    y = g.op("Add", y, g.op("GlobalAveragePool", x), name="add")
    assert findings_of(g.model(y), "F6") == []


def test_f6_names_the_skip_input():
    finding = next(one for one in lint_onnx(block(skip=False, branch=False)) if one.rule == "F6")
    assert "quantize 't0_0' only" in finding.remedy


@pytest.mark.parametrize(
    ("policy", "skip", "branch", "good"),
    [("none", False, False, True), ("both", True, True, True), ("both", True, False, False)],
)
def test_f6_follows_the_policy(policy, skip, branch, good):
    backend = dataclasses.replace(TENSORRT, residual=policy)
    found = lint_onnx(block(skip=skip, branch=branch), backend=backend)
    assert [one.rule for one in found if one.rule == "F6"] == ([] if good else ["F6"])


@pytest.mark.parametrize(
    ("skip", "branch", "good"),
    [(True, False, True), (True, True, True), (False, False, False), (False, True, False)],
)
def test_f6c_transformer(skip, branch, good):
    g = Graph(17)
    x = g.op("Relu", g.input(2, 8, 32))
    y = g.op("LayerNormalization", x, g.const(np.ones(32)), axis=-1)
    y = g.linear(g.qdq(y, name="n"), 32, 32)
    y = g.op("Reshape", y, g.const([2, 8, 32], np.int64))
    y = g.qdq(y, 0.3, name="y") if branch else y
    x = g.qdq(x, 0.2, name="x") if skip else x
    found = findings_of(g.model(g.op("Exp", g.op("Add", x, y, name="add"))), "F6c", check=True)
    assert found == ([] if good else [("F6c", "WARN", "add")])


def test_f6c_sum_of_two_linears_is_no_residual():
    g = Graph()
    a = g.linear(g.qdq(g.input(4, 32, name="a"), name="aq"), 32, 32, name="fa")
    b = g.linear(g.qdq(g.input(4, 32, name="b"), name="bq"), 32, 32, name="fb")
    assert findings_of(g.model(g.op("Sigmoid", g.op("Add", a, b)))) == []


def test_f6c_mask_on_attention_scores_is_no_residual():
    g = Graph()
    x = g.input(2, 8, 8)
    xq = g.qdq(x)
    scores = g.op("MatMul", xq, g.op("Transpose", xq, perm=[0, 2, 1]), name="qk")
    y = g.op("Softmax", g.op("Add", scores, x, name="mask"), axis=-1)
    assert findings_of(g.model(y), check=True) == []


def far_sum(tail):
    """Coordinates from a float operator, plus the result of an INT8 convolution, plus ``tail``."""
    g = Graph()
    x = g.qdq(g.op("Relu", g.input(1, 16, 8, 8)), name="x")
    coordinates = g.op("Floor", g.op("Sin", g.input(1, 16, 8, 8)))
    total = g.op("Add", coordinates, g.conv(x, 16, 16, name="conv"), name="add")
    return findings_of(g.model(tail(g, total)), "F6")


def layer_norm(g, x):
    centered = g.op("Sub", x, g.op("ReduceMean", x, axes=[1]))
    variance = g.op("ReduceMean", g.op("Mul", centered, centered), axes=[1])
    deviation = g.op("Sqrt", g.op("Add", variance, g.const(np.array(1e-5))))
    return g.op("Div", centered, deviation)


@pytest.mark.parametrize(
    ("tail", "level"),
    [
        (lambda g, y: g.op("Sin", y), "INFO"),
        (lambda g, y: g.conv(g.qdq(g.op("Sub", y, g.const(np.ones(1))), name="q"), 16, 16), "INFO"),
        (lambda g, y: g.conv(g.qdq(g.op("Relu", y), name="q"), 16, 16), "WARN"),
        (lambda g, y: g.conv(g.qdq(layer_norm(g, y), name="q"), 16, 16), "WARN"),
    ],
    ids=["no INT8 behind", "a difference behind", "relu", "decomposed layer norm"],
)
def test_f6_asks_only_where_int8_is_near(tail, level):
    assert far_sum(tail) == [("F6", level, "add")]
