from __future__ import annotations

import numpy as np
import pytest

from tests.export.lint.qdq_builder import Graph, findings_of, resnet_block, transformer_block


def loud(model):
    return [one for one in findings_of(model, check=True) if one[1] != "INFO"]


@pytest.mark.parametrize("opset", [13, 17, 18, 19, 21])
@pytest.mark.parametrize("downsample", [False, True])
def test_resnet_block_is_clean(downsample, opset):
    assert findings_of(resnet_block(downsample=downsample, opset=opset), check=True) == []


def test_transformer_block_is_clean():
    assert findings_of(transformer_block(), check=True) == []
    assert findings_of(transformer_block(both=True), "F6c", check=True) == []


def test_inverted_residual_whose_skip_is_a_conv_output_is_clean():
    g = Graph()
    x = g.conv(g.qdq(g.input(1, 16, 8, 8), name="in"), 16, 16, name="linear_bottleneck")
    xq = g.qdq(x, 0.2, name="x")
    y = g.op("Clip", g.conv(xq, 16, 32, name="expand"), g.const(0), g.const(6))
    y = g.op("Clip", g.conv(g.qdq(y, name="e"), 1, 32, name="dw", group=32), g.const(0), g.const(6))
    y = g.conv(g.qdq(y, name="d"), 32, 16, name="project")
    assert findings_of(g.model(g.op("Add", xq, y, name="add")), check=True) == []


def test_silu_and_squeeze_excite_are_clean():
    g = Graph()
    x = g.conv(g.qdq(g.input(1, 16, 8, 8), name="in"), 16, 16, name="conv")
    x = g.op("Mul", x, g.op("Sigmoid", x), name="silu")
    s = g.qdq(g.op("GlobalAveragePool", x), name="squeeze")
    s = g.op("Relu", g.conv(s, 16, 16, name="reduce", size=1))
    s = g.op("Sigmoid", g.conv(g.qdq(s, name="mid"), 16, 16, name="expand", size=1))
    y = g.op("Mul", g.qdq(x, 0.2, name="x"), g.qdq(s, 0.01, name="gate"), name="scale")
    y = g.conv(g.qdq(y, 0.3, name="out"), 16, 16, name="project")
    assert findings_of(g.model(y), check=True) == []


def test_concat_with_one_scale_is_clean():
    g = Graph()
    x = g.qdq(g.input(1, 16, 8, 8), name="in")
    a = g.qdq(g.op("Relu", g.conv(x, 16, 16, name="a")), 0.2, name="a_out")
    b = g.qdq(g.op("Relu", g.conv(a, 16, 16, name="b")), 0.2, name="b_out")
    y = g.op("Concat", a, g.op("MaxPool", b, kernel_shape=[1, 1]), axis=1)
    assert findings_of(g.model(g.conv(y, 32, 16, name="c")), check=True) == []


def test_int8_weight_form_is_clean():
    g = Graph()
    w = g.weight(16, 16, 3, 3, int8=True)
    y = g.op("Conv", g.qdq(g.input(1, 16, 8, 8)), w, name="conv")
    assert findings_of(g.model(y), check=True) == []


def test_pad_behind_dq_is_clean():
    g = Graph()
    x = g.op("Pad", g.qdq(g.input(1, 16, 8, 8)), g.const([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
    assert findings_of(g.model(g.conv(x, 16, 16)), check=True) == []


def test_weight_behind_transpose_is_clean():
    g = Graph()
    w = g.op("Transpose", g.weight(16, 32, axis=0), perm=[1, 0])
    y = g.op("MatMul", g.qdq(g.input(4, 32)), w, name="fc")
    assert findings_of(g.model(y), check=True) == []


def test_shared_scale_behind_identity_is_clean():
    g = Graph()
    scale = g.op("Identity", g.const(0.1))
    zero = g.op("Constant", value_int=0)
    zero = g.op("Cast", zero, to=3)
    x = g.op("QuantizeLinear", g.input(1, 16, 8, 8), scale, zero)
    x = g.op("DequantizeLinear", x, scale, zero)
    assert findings_of(g.model(g.conv(x, 16, 16)), check=True) == []


def test_convnext_layer_norm_behind_conv_is_clean():
    g = Graph(17)
    x = g.conv(g.qdq(g.input(1, 16, 8, 8), name="in"), 1, 16, name="dw", group=16)
    x = g.op("Transpose", x, perm=[0, 2, 3, 1])
    x = g.op("LayerNormalization", g.qdq(x, 0.2, name="ln_in"), g.const(np.ones(16)), axis=-1)
    y = g.linear(g.qdq(x, 0.1, name="fc_in"), 16, 16)
    assert findings_of(g.model(y), check=True) == []


def test_float_fpn_lateral_adds_are_no_residuals():
    g = Graph()
    x = g.input(1, 16, 8, 8)
    xq = g.qdq(x, name="in")
    top = g.conv(xq, 16, 16, name="top", strides=[2, 2])
    scales = g.const([1, 1, 2, 2])
    up = g.op("Resize", top, "", scales, mode="nearest")
    y = g.op("Add", g.conv(xq, 16, 16, name="lateral"), g.qdq(up, 0.2, name="up"), name="add")
    assert loud(g.model(y)) == []


def test_qkv_parts_may_have_scales_of_their_own():
    g = Graph()
    x = g.conv(g.qdq(g.input(1, 16, 8, 8), name="in"), 16, 48, name="qkv")
    parts = g.op("Split", x, g.const([16, 16, 16], np.int64), axis=1, outputs=3)
    outs = [
        g.conv(g.qdq(part, 0.1 * (i + 1), name=f"p{i}"), 16, 16, name=f"conv{i}")
        for i, part in enumerate(parts)
    ]
    assert loud(g.model(*outs)) == []
