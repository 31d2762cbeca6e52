"""One violation each in an unusual shape, and the least different file without any finding."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.export.lint.qdq_builder import Graph, findings_of

VARIANTS = {}


def variant(rule):
    """Register a function from ``bad`` to a model that breaks ``rule`` if ``bad`` is true."""

    def register(build):
        VARIANTS[build.__name__] = (rule, build)
        return build

    return register


@pytest.mark.parametrize("name", VARIANTS)
def test_violation(name):
    rule, build = VARIANTS[name]
    found = findings_of(build(True))
    assert rule in {one[0] for one in found}, found


@pytest.mark.parametrize("name", VARIANTS)
def test_without_it_the_file_is_clean(name):
    assert findings_of(VARIANTS[name][1](False)) == []


def image(g, channels=16):
    return g.op("Relu", g.input(1, channels, 8, 8))


# Parse rules


@variant("P2")
def zero_point_in_a_constant_node(bad):
    g = Graph()
    pair = [g.constant(0.1), g.constant(5 if bad else 0, np.int8)]
    x = g.op("QuantizeLinear", image(g), *pair)
    return g.model(g.conv(g.op("DequantizeLinear", x, *pair), 16, 16))


@variant("P2")
def zero_point_of_one_element(bad):
    g = Graph()
    pair = [g.const([0.1]), g.const([1 if bad else 0], np.int8)]
    x = g.op("QuantizeLinear", image(g), *pair)
    return g.model(g.conv(g.op("DequantizeLinear", x, *pair), 16, 16))


@variant("P2")
def zero_point_filled_by_an_operator(bad):
    g = Graph()
    value = numpy_helper.from_array(np.asarray([1 if bad else 0], np.int8))
    zeros = g.op("ConstantOfShape", g.const([16], np.int64), value=value)
    pair = [g.const(np.full(16, 0.1)), zeros]
    w = g.op("QuantizeLinear", g.const(np.ones((16, 16, 3, 3))), *pair, axis=0)
    w = g.op("DequantizeLinear", w, *pair, axis=0)
    return g.model(g.op("Conv", g.qdq(image(g)), w))


@variant("P3")
def dq_of_a_uint8_graph_input(bad):
    g = Graph()
    kind = TensorProto.UINT8 if bad else TensorProto.INT8
    x = g.dq(g.input(1, 16, 8, 8, dtype=kind), dtype=np.uint8 if bad else np.int8)
    return g.model(g.conv(x, 16, 16))


@variant("P3")
def codes_and_zero_point_of_two_types(bad):
    g = Graph()
    x = g.dq(g.input(1, 16, 8, 8, dtype=TensorProto.UINT8 if bad else TensorProto.INT8))
    return g.model(g.conv(x, 16, 16))


@variant("P4")
def scale_behind_a_reshape(bad):
    g = Graph()
    scale = g.op("Reshape", g.const([-0.1 if bad else 0.1]), g.const([], np.int64))
    pair = [scale, g.const(0, np.int8)]
    x = g.op("QuantizeLinear", image(g), *pair)
    return g.model(g.conv(g.op("DequantizeLinear", x, *pair), 16, 16))


@variant("P6")
def int8_weight_with_a_negative_axis(bad):
    g = Graph()
    codes = g.const(np.ones((16, 32, 3, 3)), np.int8)
    w = g.dq(codes, np.full(16, 0.1), axis=-3 if bad else -4)
    return g.model(g.op("Conv", g.qdq(image(g, 32)), w))


@variant("P7")
def per_channel_matrix_of_activations(bad):
    g = Graph()
    x = g.op("Relu", g.input(64, 32))
    x = g.qdq(x, np.full(32, 0.1) if bad else 0.1, axis=1 if bad else None)
    return g.model(g.op("MatMul", x, g.weight(32, 16, axis=1)))


@variant("P7")
def per_channel_in_a_branch(bad):
    g = Graph()
    x = g.input(1, 16, 8, 8)
    inner = Graph()
    y = inner.qdq(x, np.full(16, 0.1) if bad else 0.1, axis=1 if bad else None, name="inner")
    values = [helper.make_tensor_value_info(y, TensorProto.FLOAT, None)]
    then = helper.make_graph(inner.nodes, "then", [], values, inner.initializers)
    same = helper.make_node("Identity", [x], ["same"])
    orelse = helper.make_graph(
        [same], "else", [], [helper.make_tensor_value_info("same", TensorProto.FLOAT, None)]
    )
    choose = g.input(name="cond", dtype=TensorProto.BOOL)
    return g.model(g.op("If", choose, then_branch=then, else_branch=orelse))


@variant("P10")
def double_scale(bad):
    g = Graph()
    kind, dtype = (TensorProto.DOUBLE, np.float64) if bad else (TensorProto.FLOAT, np.float32)
    pair = [g.const(0.1, dtype), g.const(0, np.int8)]
    x = g.op("QuantizeLinear", g.input(1, 16, dtype=kind), *pair)
    y = g.op("DequantizeLinear", x, *pair)
    return g.model(g.op("Cast", g.op("Relu", y), to=TensorProto.FLOAT))


# Operands


@variant("P5")
def quantized_bias_in_an_add_behind_a_conv(bad):
    g = Graph()
    bias = g.const(np.ones((1, 16, 1, 1)))
    bias = g.qdq(bias, name="bias") if bad else bias
    y = g.op("Conv", g.qdq(image(g)), g.weight(16, 16, 3, 3))
    return g.model(g.op("Add", y, bias))


@variant("P5")
def quantized_bias_behind_a_reshape(bad):
    g = Graph()
    bias = g.const(np.ones(16))
    y = g.op("MatMul", g.qdq(g.op("Relu", g.input(64, 32))), g.weight(32, 16, axis=1))
    y = g.op("Reshape", y, g.const([8, 8, 16], np.int64))
    return g.model(g.op("Add", g.qdq(bias, name="bias") if bad else bias, y))


@variant("B1")
def output_behind_a_dropout(bad):
    g = Graph()
    y = g.conv(g.qdq(image(g)), 16, 16)
    return g.model(g.op("Dropout", g.qdq(y, name="out") if bad else y))


@variant("B1")
def float_weight_from_a_constant_node(bad):
    g = Graph()
    w = g.constant(np.ones((16, 16, 3, 3)))
    w = w if bad else g.qdq(w, np.full(16, 0.1), axis=0, name="w")
    return g.model(g.op("Conv", g.qdq(image(g)), w))


@variant("B2")
def stored_codes_without_dq(bad):
    g = Graph()
    codes = g.const(np.ones((16, 16, 3, 3)), np.int8)
    w = codes if bad else g.dq(codes, np.full(16, 0.1), axis=0)
    return g.model(g.op("Conv", g.qdq(image(g)), w))


@variant("B2")
def activation_codes_without_dq(bad):
    g = Graph()
    x = g.q(image(g), name="q")
    return g.model(g.conv(x if bad else g.dq(x), 16, 16))


@variant("F5")
def batch_norm_behind_conv_and_identity(bad):
    g = Graph()
    y = g.op("Identity", g.conv(g.qdq(image(g)), 16, 16))
    y = g.batch_norm(y, 16) if bad else y
    return g.model(g.op("Relu", y))


@variant("F5")
def batch_norm_behind_pair_and_dropout(bad):
    g = Graph()
    y = g.conv(g.qdq(image(g)), 16, 16)
    y = g.batch_norm(g.op("Dropout", g.qdq(y, name="mid")), 16) if bad else g.op("Dropout", y)
    return g.model(g.op("Relu", y))


# Weights


@variant("F2")
def weight_split_into_three(bad):
    g = Graph()
    w = g.weight(48, 48, axis=1 if bad else 0)
    parts = g.op("Split", w, g.const([16, 16, 16], np.int64), axis=0, outputs=3)
    x = g.qdq(g.op("Relu", g.input(64, 48)))
    return g.model(*(g.op("Gemm", x, part, transB=1, name=f"fc{part}") for part in parts))


@variant("F2")
def weight_behind_an_unsqueeze(bad):
    g = Graph()
    w = g.weight(16, 16, 3, axis=1 if bad else 0)
    w = g.op("Unsqueeze", w, g.const([3], np.int64))
    return g.model(g.op("Conv", g.qdq(image(g)), w))


@variant("F2")
def weight_behind_a_reshape(bad):
    g = Graph()
    w = g.weight(16, 144, axis=None if bad else 0)
    w = g.op("Reshape", w, g.const([16, 16, 3, 3], np.int64))
    return g.model(g.op("Conv", g.qdq(image(g)), w))


@variant("F2")
def weight_transposed_between_q_and_dq(bad):
    g = Graph()
    value = g.const(np.ones((32, 32)))
    codes = g.op("Transpose", g.q(value, np.full(32, 0.1), axis=0), perm=[1, 0])
    w = g.dq(codes, np.full(32, 0.1), axis=0 if bad else 1)
    return g.model(g.op("MatMul", g.qdq(g.op("Relu", g.input(64, 32))), w))


@variant("F3")
def clip_on_stored_codes(bad):
    g = Graph()
    codes = g.const(np.ones((16, 16, 3, 3)), np.int8)
    codes = g.op("Clip", codes, g.const(-127, np.int8), g.const(127, np.int8)) if bad else codes
    return g.model(g.op("Conv", g.qdq(image(g)), g.dq(codes, np.full(16, 0.1), axis=0)))


# Activations


def activated(g, bad, activation):
    """Conv -> [Q -> DQ] -> activation -> Q -> DQ -> Conv."""
    y = g.conv(g.qdq(image(g), name="in"), 16, 16, name="first")
    y = activation(g.qdq(y, 0.2, name="mid") if bad else y)
    return g.model(g.conv(g.qdq(y, 0.3, name="out"), 16, 16, name="second"))


@variant("F4")
def relu6_with_constant_nodes(bad):
    g = Graph()
    return activated(g, bad, lambda x: g.op("Clip", x, g.constant(0.0), g.constant(6.0)))


@variant("F4")
def relu_behind_an_identity(bad):
    g = Graph()
    return activated(g, bad, lambda x: g.op("Relu", g.op("Identity", x)))


@variant("F4")
def relu_as_a_maximum(bad):
    g = Graph()
    return activated(g, bad, lambda x: g.op("Max", x, g.const(0.0)))


@variant("F4")
def subtracted_bias(bad):
    g = Graph()
    return activated(g, bad, lambda x: g.op("Sub", x, g.const(np.ones((1, 16, 1, 1)))))


@variant("F4")
def relu_behind_a_batch_norm_as_mul_and_add(bad):
    g = Graph()
    y = g.conv(g.qdq(image(g), name="in"), 16, 16, name="first")
    y = g.op("Mul", y, g.const(np.ones((1, 16, 1, 1))))
    y = g.op("Add", y, g.const(np.ones((1, 16, 1, 1))))
    y = g.op("Relu", g.qdq(y, 0.2, name="mid") if bad else y)
    return g.model(g.conv(g.qdq(y, 0.3, name="out"), 16, 16, name="second"))


@variant("F11")
def hard_swish_in_pieces(bad):
    g = Graph()

    def activation(x):
        gate = g.op("Clip", g.op("Add", x, g.const(3.0)), g.const(0.0), g.const(6.0))
        return g.op("Mul", x, g.op("Div", gate, g.const(6.0)))

    return activated(g, bad, activation)


@variant("F11")
def gelu_with_tanh_in_pieces(bad):
    g = Graph()

    def activation(x):
        cubed = g.op("Mul", g.op("Pow", x, g.const(3.0)), g.const(0.044715))
        inner = g.op("Tanh", g.op("Mul", g.op("Add", x, cubed), g.const(0.7979)))
        return g.op("Mul", g.op("Mul", x, g.const(0.5)), g.op("Add", inner, g.const(1.0)))

    return activated(g, bad, activation)


@variant("F11")
def gelu_with_erf_in_pieces(bad):
    g = Graph()

    def activation(x):
        inner = g.op("Erf", g.op("Mul", x, g.const(0.7071)))
        return g.op("Mul", g.op("Mul", x, g.op("Add", inner, g.const(1.0))), g.const(0.5))

    return activated(g, bad, activation)


@variant("F11")
def mish_in_pieces(bad):
    g = Graph()
    return activated(g, bad, lambda x: g.op("Mul", x, g.op("Tanh", g.op("Softplus", x))))


@variant("F11")
def pair_on_the_gate_of_hard_swish(bad):
    g = Graph()

    def activation(x):
        gate = g.op("Clip", g.op("Add", x, g.const(3.0)), g.const(0.0), g.const(6.0))
        gate = g.op("Div", gate, g.const(6.0))
        return g.op("Mul", g.qdq(gate, 0.01, name="gate") if bad else gate, x)

    return activated(g, False, activation)


# Joins and copies


@variant("F6")
def residual_as_a_sum(bad):
    g = Graph()
    x = image(g)
    xq = g.qdq(x)
    y = g.op("Sum", g.conv(xq, 16, 16), x if bad else xq, name="sum")
    return g.model(g.op("Relu", y))


@variant("F6")
def wrong_branch_of_a_downsampling_block(bad):
    g = Graph()
    x = g.qdq(image(g), name="in")
    deep = g.op("Relu", g.conv(x, 16, 16, name="conv1"))
    deep = g.conv(g.qdq(deep, 0.2, name="mid"), 16, 16, name="conv2")
    short = g.conv(x, 16, 16, name="down", size=1)
    if bad:
        deep = g.qdq(deep, 0.3, name="deep")
    else:
        short = g.qdq(short, 0.3, name="short")
    return g.model(g.op("Relu", g.op("Add", deep, short)))


@variant("F7")
def pooling_over_a_volume(bad):
    g = Graph()
    y = g.op("ReduceMean", g.qdq(g.op("Relu", g.input(1, 16, 4, 4, 4))), axes=[2, 3, 4])
    return g.model(g.op("Exp", y if bad else g.qdq(y, 0.2, name="out")))


@variant("F8")
def pair_of_two_scales(bad):
    g = Graph()
    x = g.dq(g.q(image(g), 0.1), 0.2 if bad else 0.1)
    return g.model(g.conv(x, 16, 16))


@variant("F8")
def max_pool_on_codes(bad):
    g = Graph()
    x = g.op("MaxPool", g.q(image(g), 0.1), kernel_shape=[1, 1])
    return g.model(g.conv(g.dq(x, 0.2 if bad else 0.1), 16, 16))


@variant("F8")
def one_q_and_two_dq(bad):
    g = Graph()
    x = g.q(image(g), 0.1)
    first = g.conv(g.dq(x, 0.1), 16, 16, name="first")
    return g.model(first, g.conv(g.dq(x, 0.2 if bad else 0.1), 16, 16, name="second"))


@variant("F9")
def concat_behind_a_chain_of_max_pools(bad):
    g = Graph()
    x = g.qdq(image(g), 0.1, name="x")
    parts = [x]
    for i in range(2):
        pooled = g.op("MaxPool", parts[-1], kernel_shape=[1, 1])
        parts.append(g.qdq(pooled, 0.15 if bad and i else 0.1, name=f"pool{i}"))
    return g.model(g.conv(g.op("Concat", *parts, axis=1), 48, 16))


@variant("F10")
def resize_that_no_conv_reads(bad):
    g = Graph()
    x = g.op("Resize", g.qdq(image(g)), "", g.const([1, 1, 2, 2]), mode="nearest")
    return g.model(g.op("Exp", x) if bad else g.conv(x, 16, 16))


@variant("F17")
def second_quantizer_behind_an_identity(bad):
    g = Graph()
    x = image(g)
    xq = g.qdq(x, 0.1, name="first")
    other = g.qdq(g.op("Identity", x), 0.2, name="second") if bad else g.op("Identity", xq)
    return g.model(g.conv(xq, 16, 16, name="a"), g.conv(other, 16, 16, name="b"))


@variant("F18")
def pair_between_pad_and_conv_with_an_identity(bad):
    g = Graph()
    pads = g.const([0, 0, 1, 1, 0, 0, 1, 1], np.int64)
    x = image(g)
    x = g.qdq(g.op("Pad", x, pads)) if bad else g.op("Pad", g.qdq(x), pads)
    return g.model(g.conv(g.op("Identity", x), 16, 16))


# Transformers


def scores(g, bad):
    x = g.op("Relu", g.input(2, 16, 16))
    return g.qdq(x, name="scores") if bad else g.op("Identity", x)


def behind(g, y):
    """Put a quantized layer behind, so that the file is a quantized one."""
    return g.model(g.linear(g.qdq(y, 0.01, name="next"), 16, 16))


@variant("F12")
def scaled_scores(bad):
    g = Graph()
    x = g.op("Mul", scores(g, bad), g.const(0.25))
    return behind(g, g.op("Softmax", x, axis=-1))


@variant("F12")
def masked_scores(bad):
    g = Graph()
    x = g.op("Div", scores(g, bad), g.const(4.0))
    x = g.op("Add", x, g.input(2, 16, 16, name="mask"))
    return behind(g, g.op("Softmax", x, axis=-1))


@variant("F12")
def selected_scores(bad):
    g = Graph()
    choose = g.input(2, 16, 16, name="choose", dtype=TensorProto.BOOL)
    x = g.op("Where", choose, g.const(-1e4), scores(g, bad))
    return behind(g, g.op("Softmax", x, axis=-1))


@variant("F12")
def layer_norm_over_two_axes_in_pieces(bad):
    g = Graph()
    x = scores(g, bad)
    centred = g.op("Sub", x, g.op("ReduceMean", x, axes=[-2, -1]))
    variance = g.op("ReduceMean", g.op("Mul", centred, centred), axes=[-2, -1])
    return behind(g, g.op("Div", centred, g.op("Sqrt", variance)))


@variant("F12")
def rms_norm_in_pieces(bad):
    g = Graph(18)
    x = scores(g, bad)
    mean = g.op("ReduceMean", g.op("Pow", x, g.const(2.0)), g.const([-1], np.int64))
    return behind(g, g.op("Div", x, g.op("Sqrt", mean)))


@variant("F4")
def body_of_a_loop_with_a_weight_from_outside(bad):
    g = Graph()
    x = g.input(1, 16, 8, 8)
    w = g.weight(16, 16, 3, 3)
    count, go = g.const(3, np.int64, name="count"), g.const(True, np.bool_, name="go")
    body = Graph()
    body.nodes.append(helper.make_node("Identity", ["go_in"], ["go_out"]))
    scale, zero = body.const(0.1, name="scale"), body.const(0, np.int8, name="zero")

    def pair(tensor, name):
        codes, values = f"{name}/codes", f"{name}/values"
        body.nodes.append(helper.make_node("QuantizeLinear", [tensor, scale, zero], [codes]))
        body.nodes.append(helper.make_node("DequantizeLinear", [codes, scale, zero], [values]))
        return values

    conv = helper.make_node("Conv", [pair("state", "in"), w], ["conved"], pads=[1] * 4)
    body.nodes.append(conv)
    tensor = pair("conved", "mid") if bad else "conved"
    body.nodes.append(helper.make_node("Relu", [tensor], ["next"]))
    flags = [
        helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("go_in", "go_out")
    ]
    states = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 16, 8, 8])
        for name in ("state", "next")
    ]
    step = helper.make_tensor_value_info("step", TensorProto.INT64, [])
    inner = helper.make_graph(
        body.nodes, "body", [step, flags[0], states[0]], [flags[1], states[1]], body.initializers
    )
    return g.model(g.op("Loop", count, go, x, body=inner))
