"""Contract 6: what the file holds, and that ONNX Runtime computes the same."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

import qatkit
from qatkit.modes import quantizers
from qatkit.nn.quantized import QuantizedWeight
from tests.contract.zoo import build, flags_of, state_of

RESIDUAL_ADDS = {"resnet18": 8, "resnet50": 16, "mobilenet_v2": 10}


@pytest.fixture(scope="module")
def exported(case, tmp_path_factory):
    path = tmp_path_factory.mktemp(case.float.name) / "model.onnx"
    model = case.copy()
    flags, state = flags_of(model), state_of(model)
    report = qatkit.export_onnx(model, case.float.inputs, path)
    assert flags_of(model) == flags
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    return onnx.load(path), report


def constants_of(proto):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def run_file(path_or_proto, *arrays):
    given = path_or_proto if isinstance(path_or_proto, str) else path_or_proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return session.run(None, dict(zip(names, arrays, strict=True)))


def check_structure(proto, model):
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 13)]
    assert proto.ir_version == 7
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
    kinds = Counter(node.op_type for node in proto.graph.node)
    assert kinds["BatchNormalization"] == 0
    enabled = [q.name for _, q in quantizers(model) if q.quantize]
    assert kinds["QuantizeLinear"] == kinds["DequantizeLinear"] == len(enabled)
    names = {node.name.removesuffix("/QuantizeLinear") for node in proto.graph.node}
    assert set(enabled) <= names
    constants = constants_of(proto)
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = (constants[name] for name in node.input[1:3])
            assert zero.dtype == np.int8
            assert not zero.any()
            assert zero.shape == scale.shape
            assert np.isfinite(scale).all()
            assert (scale > 0).all()


def operands(proto, kinds):
    """Return (name, which inputs come from a DQ) of each operator of a kind."""
    made_by = {out: node.op_type for node in proto.graph.node for out in node.output}
    return [
        (node.name, [made_by.get(name) == "DequantizeLinear" for name in node.input])
        for node in proto.graph.node
        if node.op_type in kinds
    ]


def test_structure(case, exported):
    check_structure(exported[0], case.model)


def test_report(case, exported):
    proto, report = exported
    assert report.opset == 13
    assert report.size_bytes == report.path.stat().st_size
    assert report.quantize_nodes == sum(n.op_type == "QuantizeLinear" for n in proto.graph.node)
    assert [finding for finding in report.findings if finding.level == "ERROR"] == []


def test_onnx_runtime_agrees(case, exported):
    report = exported[1].verify
    assert report.ok, str(report)
    assert report.outputs > 0
    assert len(report.quantizers) == exported[1].quantize_nodes


def test_convolutions_have_both_operands_quantized_and_no_bias(case, exported):
    layers = operands(exported[0], ("Conv", "ConvTranspose"))
    assert layers
    assert [name for name, dq in layers if dq[:2] != [True, True] or any(dq[2:])] == []


def test_int8_weights(classifier, exported, tmp_path):
    case, (proto, report) = classifier, exported
    path = tmp_path / "int8.onnx"
    given = {"weights": "int8", "verify": False, "lint": False}
    small = qatkit.export_onnx(case.model, case.float.inputs, path, **given)
    x = case.float.inputs.numpy()
    for a, b in zip(run_file(str(path), x), run_file(proto, x), strict=True):
        np.testing.assert_array_equal(a, b)
    quantized = sum(
        module.weight.numel()
        for module in case.model.modules()
        if isinstance(module, QuantizedWeight)
    )
    saved = report.size_bytes - small.size_bytes
    assert abs(saved - 3 * quantized) <= 0.01 * report.size_bytes
    assert small.size_bytes <= 0.3 * report.size_bytes
    assert small.quantize_nodes == sum(
        q.quantize for path, q in quantizers(case.model) if not path.endswith("weight_quantizer")
    )
    assert small.dequantize_nodes == report.dequantize_nodes


def only(case, name):
    if case.float.name != name:
        pytest.skip(f"{name} shows it")
    return case


def test_the_file_is_the_model_in_eval_mode_whatever_its_mode(case, exported):
    model = only(case, "mobilenet_v2").copy().train()
    again = qatkit.verify_onnx(exported[1].path, model, case.float.inputs)
    assert again.ok
    assert model.training


@pytest.fixture(scope="module", params=["resnet18", "resnet50", "mobilenet_v2"])
def full_size(request, tmp_path_factory):
    """The three models of the issue; 64x64 keeps the structure of 224x224."""
    case = build(request.param)
    qatkit.prepare(case.model, case.inputs)
    qatkit.calibrate(case.model, [case.inputs], progress=False)
    path = tmp_path_factory.mktemp("issue") / f"{case.name}.onnx"
    return case, qatkit.export_onnx(case.model, case.inputs, path)


def test_residual_adds_have_exactly_one_quantized_operand(full_size):
    case, report = full_size
    adds = operands(onnx.load(report.path), ("Add",))
    assert len(adds) == RESIDUAL_ADDS[case.name]
    assert [name for name, dq in adds if sum(dq) != 1] == []


def test_conv_and_gemm_have_both_operands_quantized(full_size):
    layers = operands(onnx.load(full_size[1].path), ("Conv", "Gemm", "MatMul"))
    assert {"Conv", "Gemm"} == {
        node.op_type
        for node in onnx.load(full_size[1].path).graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul")
    }
    assert [name for name, dq in layers if dq[:2] != [True, True] or any(dq[2:])] == []


def test_no_lint_error_or_warning(full_size):
    report = full_size[1]
    assert report.findings == tuple(qatkit.lint_onnx(report.path))
    assert [str(finding) for finding in report.findings if finding.level != "INFO"] == []


def test_teacher_forced_codes_agree(full_size):
    report = full_size[1].verify
    assert report.largest_step <= 1
    assert report.differing <= report.codes / 100_000


def test_dynamic_batch(full_size):
    case, report = full_size
    x = torch.randn(5, *case.inputs.shape[1:]).numpy()
    (whole,) = run_file(str(report.path), x)
    rows = np.concatenate([run_file(str(report.path), x[i : i + 1])[0] for i in range(5)])
    assert whole.shape == rows.shape == (5, 1000)
    np.testing.assert_allclose(whole, rows, rtol=0, atol=1e-5 * np.abs(rows).max())


def test_dynamic_batch_of_1_and_5_agrees_with_the_model(full_size):
    case, report = full_size
    for size in (1, 5):
        again = qatkit.verify_onnx(report.path, case.model, torch.randn(size, 3, 64, 64))
        assert again.ok, str(again)


def test_static_batch(case, tmp_path):
    only(case, "mobilenet_v2")
    path = tmp_path / "static.onnx"
    qatkit.export_onnx(case.model, case.float.inputs, path, dynamic_batch=False, verify=False)
    dims = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims] == [2, 3, 64, 64]


def test_file_of_a_copy_is_the_same(case, exported, tmp_path):
    path = tmp_path / "copy.onnx"
    model = only(case, "mobilenet_v2").copy()
    qatkit.export_onnx(model, case.float.inputs, path, verify=False, lint=False)
    assert onnx.load(path) == exported[0]
