"""Write small QDQ graphs by hand, one line per operator."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qatkit.export.lint import lint_onnx

IR_OF_OPSET = {11: 6, 12: 7, 13: 7, 17: 8, 18: 8, 19: 9, 21: 10, 22: 10, 23: 11}


class Graph:
    """A graph under construction; every method returns the name of the tensor that it makes."""

    def __init__(self, opset=13):
        self.opset = opset
        self.nodes, self.inputs, self.initializers = [], [], []
        self.rng = np.random.default_rng(0)

    def input(self, *shape, name="x", dtype=TensorProto.FLOAT):
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def const(self, value, dtype=np.float32, name=None):
        name = name or f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def constant(self, value, dtype=np.float32):
        """Make a Constant node, where `const` makes an initializer."""
        return self.op("Constant", value=numpy_helper.from_array(np.asarray(value, dtype=dtype)))

    def op(self, op_type, *inputs, name=None, domain="", outputs=1, **attributes):
        name = f"{op_type}_{len(self.nodes)}" if name is None else name
        made = [f"t{len(self.nodes)}_{i}" for i in range(outputs)]
        node = helper.make_node(op_type, inputs, made, name=name, domain=domain, **attributes)
        self.nodes.append(node)
        return made[0] if outputs == 1 else made

    def _qdq(self, op, x, scale, name, axis, zero, dtype):
        zeros = np.full(np.shape(scale), zero, dtype)
        inputs = [x, self.const(scale), self.const(zeros, dtype)]
        attributes = {} if axis is None else {"axis": axis}
        return self.op(op, *inputs, name=name, **attributes)

    def q(self, x, scale=0.1, *, name=None, axis=None, zero=0, dtype=np.int8):
        return self._qdq("QuantizeLinear", x, scale, name, axis, zero, dtype)

    def dq(self, x, scale=0.1, *, name=None, axis=None, zero=0, dtype=np.int8):
        return self._qdq("DequantizeLinear", x, scale, name, axis, zero, dtype)

    def qdq(self, x, scale=0.1, *, name="act", axis=None, zero=0, dtype=np.int8):
        options = {"axis": axis, "zero": zero, "dtype": dtype}
        codes = self.q(x, scale, name=f"{name}/q", **options)
        return self.dq(codes, scale, name=f"{name}/dq", **options)

    def weight(self, *shape, axis=0, name="w", int8=False):
        """Quantize a weight with scale = amax / 127, per-tensor for ``axis=None``."""
        value = self.rng.standard_normal(shape).astype(np.float32)
        others = tuple(i for i in range(len(shape)) if i != axis)
        amax = np.abs(value).max() if axis is None else np.abs(value).max(axis=others)
        scale = np.asarray(amax / 127, np.float32)
        if not int8:
            return self.qdq(self.const(value, name=name), scale, name=name, axis=axis)
        wide = scale if axis is None else np.expand_dims(scale, others)
        codes = self.const(np.rint(value / wide), np.int8, name=name)
        return self.dq(codes, scale, name=f"{name}/dq", axis=axis)

    def conv(
        self, x, c_in, c_out, *, name="conv", size=3, float_weight=False, axis=0, **attributes
    ):
        shape = (c_out, c_in, size, size)
        if float_weight:
            w = self.const(self.rng.standard_normal(shape), name=f"{name}.weight")
        else:
            w = self.weight(*shape, name=f"{name}.weight", axis=axis)
        bias = self.const(np.zeros(c_out), name=f"{name}.bias")
        return self.op("Conv", x, w, bias, name=name, pads=[size // 2] * 4, **attributes)

    def linear(self, x, k, n, *, name="fc"):
        """MatMul with a [K, N] weight, and a bias Add."""
        y = self.op("MatMul", x, self.weight(k, n, axis=1, name=f"{name}.weight"), name=name)
        return self.op("Add", y, self.const(np.zeros(n)), name=f"{name}/bias")

    def batch_norm(self, x, channels, *, name="bn"):
        ones = [self.const(np.ones(channels)) for _ in range(4)]
        return self.op("BatchNormalization", x, *ones, name=name)

    def model(self, *outputs, ir_version=None):
        values = [helper.make_tensor_value_info(one, TensorProto.FLOAT, None) for one in outputs]
        graph = helper.make_graph(self.nodes, "net", self.inputs, values, self.initializers)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        ir_version = ir_version or IR_OF_OPSET[self.opset]
        return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def resnet_block(*, downsample=False, opset=13):
    """A residual block as TensorRT wants it: stem, block, pooling, classifier."""
    g = Graph(opset)
    x = g.op("Relu", g.conv(g.qdq(g.input(4, 16, 8, 8), name="in"), 16, 32, name="stem"))
    x = g.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], name="pool")
    xq = g.qdq(x, 0.2, name="block_in")
    y = g.op("Relu", g.conv(xq, 32, 32, name="conv1"))
    y = g.conv(g.qdq(y, 0.3, name="mid"), 32, 32, name="conv2")
    skip = xq
    if downsample:
        skip = g.qdq(g.conv(xq, 32, 32, name="down", size=1), 0.4, name="skip")
    z = g.op("Relu", g.op("Add", y, skip, name="add"))
    z = g.op("GlobalAveragePool", z, name="gap")
    z = g.qdq(g.op("Flatten", z), 0.5, name="fc_in")
    w = g.weight(32, 32, name="fc.weight")
    return g.model(g.op("Gemm", z, w, g.const(np.zeros(32)), transB=1, name="fc"))


def transformer_block(*, both=False, quantized_softmax=True):
    """A pre-norm attention block with INT8 matmuls, head size 16."""
    g = Graph(17)
    x = g.op("Relu", g.input(2, 8, 32))
    skip = g.qdq(x, 0.1, name="skip")
    n = g.op("LayerNormalization", x, g.const(np.ones(32)), axis=-1)
    nq = g.qdq(n, 0.2, name="norm")
    heads = []
    for part in ("q", "k", "v"):
        y = g.linear(nq, 32, 32, name=part)
        y = g.op("Reshape", y, g.const([2, 8, 2, 16], np.int64))
        perm = [0, 2, 3, 1] if part == "k" else [0, 2, 1, 3]
        heads.append(g.qdq(g.op("Transpose", y, perm=perm), 0.3, name=f"{part}_act"))
    scores = g.op("MatMul", heads[0], heads[1], name="qk")
    scores = g.op("Softmax", g.op("Mul", scores, g.const(0.25)), axis=-1, name="softmax")
    probabilities = g.qdq(scores, 0.01, name="prob") if quantized_softmax else scores
    y = g.op("MatMul", probabilities, heads[2], name="pv")
    y = g.op("Transpose", y, perm=[0, 2, 1, 3])
    y = g.qdq(g.op("Reshape", y, g.const([2, 8, 32], np.int64)), 0.4, name="proj_in")
    y = g.linear(y, 32, 32, name="proj")
    y = g.qdq(y, 0.5, name="branch") if both else y
    return g.model(g.op("Relu", g.op("Add", skip, y, name="residual")))


def findings_of(model, rule=None, *, check=False):
    """Lint, and return ``(rule, level, node)`` of each finding, of one rule if given."""
    if check:
        onnx.checker.check_model(onnx.shape_inference.infer_shapes(model, strict_mode=True))
    found = lint_onnx(model)
    return [(one.rule, one.level, one.node) for one in found if rule in (None, one.rule)]
