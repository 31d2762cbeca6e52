from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper

from qatkit.backend import TENSORRT
from qatkit.errors import QatkitError
from qatkit.export.lint import VERSIONS, lint_onnx
from tests.export.lint.qdq_builder import Graph, resnet_block, transformer_block


def found(model, trt=None, backend="tensorrt"):
    return [(one.rule, one.level, one.node) for one in lint_onnx(model, backend, trt=trt)]


def pair(
    opset, codes=np.int8, *, scale=np.float32, zero=True, data=TensorProto.FLOAT, **attributes
):
    """x -> Q -> DQ -> Relu -> Cast."""
    g = Graph(opset)
    rest = [g.const(0.1, scale), *([g.const(0, codes)] if zero else [])]
    y = g.op("QuantizeLinear", g.input(1, 16, dtype=data), *rest, name="q", **attributes)
    y = g.op("DequantizeLinear", y, *rest, name="dq")
    return g.model(g.op("Cast", g.op("Relu", y), to=TensorProto.FLOAT))


@pytest.mark.parametrize("trt", [8, 10])
@pytest.mark.parametrize("downsample", [False, True])
def test_an_opset_13_file_is_clean(trt, downsample):
    assert found(resnet_block(downsample=downsample), trt) == []


@pytest.mark.parametrize(
    ("trt", "opset", "level"),
    [
        (8, 13, None),
        (8, 14, "INFO"),
        (8, 17, "INFO"),
        (8, 18, "ERROR"),
        (8, 21, "ERROR"),
        (10, 13, None),
        (10, 22, None),
        (10, 23, "INFO"),
        (10, 25, "ERROR"),
        (11, 22, None),
        (11, 25, "INFO"),
        (11, 26, "ERROR"),
    ],
)
def test_opsets(trt, opset, level):
    model = pair(13)
    model.opset_import[0].version, model.ir_version = opset, 14
    assert found(model, trt) == ([("P9", level, "net")] if level else [])


def test_opset_is_said_once_for_a_file_with_subgraphs():
    inner = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["out"])],
        "then",
        [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
    )
    g = Graph(18)
    choose = g.input(name="cond", dtype=TensorProto.BOOL)
    y = g.op("If", choose, then_branch=inner, else_branch=inner)
    model = g.model(g.op("Relu", g.qdq(g.input(1, 4))), y)
    assert [one for one in found(model, 8) if one[0] == "P9"] == [("P9", "ERROR", "net")]


@pytest.mark.parametrize(
    ("trt", "level"), [(8, "ERROR"), (10, "INFO"), (11, "INFO"), (None, "INFO")]
)
def test_dq_without_a_zero_point(trt, level):
    g = Graph()
    codes = g.q(g.input(1, 16), name="q")
    model = g.model(g.op("Relu", g.op("DequantizeLinear", codes, g.const(0.1), name="dq")))
    assert found(model, trt) == [("P3", level, "dq")]


def test_output_dtype_stands_for_the_zero_point():
    model = pair(21, zero=False, output_dtype=TensorProto.INT8)
    assert found(model) == [("P3", "INFO", "q"), ("P3", "INFO", "dq")]
    wrong = pair(21, zero=False, output_dtype=TensorProto.UINT8)
    assert ("P3", "ERROR", "q") in found(wrong)


@pytest.mark.parametrize(
    ("codes", "opset"),
    [(ml_dtypes.float8_e4m3fn, 19), (ml_dtypes.int4, 21), (ml_dtypes.float4_e2m1fn, 23)],
)
def test_codes_that_came_later(codes, opset):
    errors = [one for one in found(pair(opset, codes), 8) if one[2] in ("q", "dq")]
    assert errors == [("P9", "ERROR", "q"), ("P9", "ERROR", "dq")]
    for trt in (10, 11):
        assert [one for one in found(pair(opset, codes), trt) if one[1] == "ERROR"] == []


def test_half_scales():
    model = pair(19, scale=np.float16, data=TensorProto.FLOAT16)
    errors = [("P9", "ERROR", "net"), ("P9", "ERROR", "q"), ("P9", "ERROR", "dq")]
    assert sorted(found(model, 8)) == sorted(errors)
    assert found(model, 10) == found(model, 11) == []


def test_block_scales():
    g = Graph(21)
    scale, zero = g.const(np.ones((2, 16))), g.const(np.zeros((2, 16)), np.int8)
    codes = g.const(np.ones((32, 16)), np.int8)
    w = g.op("DequantizeLinear", codes, scale, zero, axis=0, block_size=16, name="dq")
    model = g.model(g.op("MatMul", g.qdq(g.input(32, 32)), w, name="fc"))
    assert ("P9", "ERROR", "dq") in found(model, 8)
    assert found(model, 10) == []


def test_layer_normalization_came_with_8_6():
    names = [node for _, level, node in found(transformer_block(), 8) if level == "INFO"]
    assert any(name.startswith("LayerNormalization") for name in names)
    assert found(transformer_block(), 10) == []


def half_conv():
    """The second export form: FP16 with Q/DQ at opset 19."""
    g = Graph(19)
    scale, zero = g.const(0.1, np.float16), g.const(0, np.int8)
    x = g.input(1, 16, 8, 8, dtype=TensorProto.FLOAT16)
    x = g.op("DequantizeLinear", g.op("QuantizeLinear", x, scale, zero), scale, zero)
    many, zeros = g.const(np.full(16, 0.1), np.float16), g.const(np.zeros(16), np.int8)
    codes = g.const(np.ones((16, 16, 3, 3)), np.int8)
    w = g.op("DequantizeLinear", codes, many, zeros, axis=0)
    y = g.op("Conv", x, w, g.const(np.zeros(16), np.float16), name="conv")
    return g.model(g.op("Cast", y, to=TensorProto.FLOAT))


def test_strong_typing():
    finding = next(one for one in lint_onnx(resnet_block(), trt=11))
    assert (finding.rule, finding.level, finding.node) == ("P10", "WARN", "net")
    assert "opset 19" in finding.remedy
    assert "[D]" in finding.source
    assert "4 of 4" in finding.message
    assert found(half_conv(), 11) == found(half_conv(), 10) == []


@pytest.mark.parametrize("trt", [7, 9, 12, "10", True, 10.5])
def test_unknown_version(trt):
    with pytest.raises(
        QatkitError, match=r"no such version of TensorRT here: give one of 8, 10, 11"
    ):
        lint_onnx(resnet_block(), trt=trt)


def test_the_default_is_10():
    assert found(pair(18)) == found(pair(18), 10) == []


def test_other_backends_have_no_versions():
    other = dataclasses.replace(TENSORRT, name="other")
    model = pair(13)
    model.opset_import[0].version, model.ir_version = 28, 14
    assert found(model, backend=other) == []
    with pytest.raises(QatkitError, match="the backend is 'other': leave it out"):
        lint_onnx(model, backend=other, trt=10)


def test_every_finding_of_a_version_has_a_source_and_a_remedy():
    for trt in VERSIONS:
        for one in lint_onnx(pair(23, ml_dtypes.int4, scale=np.float16, zero=True), trt=trt):
            assert one.source
            assert one.remedy
