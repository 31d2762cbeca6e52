"""Codes of fewer than 8 bits: int8 behind a Clip before opset 21, INT4 and UINT4 from there on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import qatkit
from qatkit import QuantConfig, QuantSpec
from qatkit.config import WEIGHT

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def prepared(weight_bits: int, bits: int, *, unsigned: bool = False, **fields) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(576, 5),
    )
    config = QuantConfig(
        weight=WEIGHT.replace(num_bits=weight_bits),
        activation=QuantSpec(num_bits=bits, observer="minmax"),
        first_last_bits=8,
        unsigned_activations=unsigned,
        **fields,
    )
    qatkit.prepare(model, X, config)
    qatkit.calibrate(model, [torch.randn(8, 3, 8, 8)], progress=False)
    return model.eval()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def types_of_codes(path: Path) -> Counter:
    proto = onnx.load(path)
    kinds = {one.name: one.data_type for one in proto.graph.initializer}
    nodes = [node for node in proto.graph.node if node.op_type == "DequantizeLinear"]
    return Counter(onnx.TensorProto.DataType.Name(kinds[node.input[2]]) for node in nodes)


def run(path: Path) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]


def clips(path: Path) -> int:
    return sum(node.op_type == "Clip" for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("stored", ["float", "int8"])
@pytest.mark.parametrize(
    ("bits", "unsigned", "kinds", "left"),
    [
        (4, False, {"INT8": 4, "INT4": 2}, 0),
        (4, True, {"INT8": 4, "INT4": 1, "UINT4": 1}, 0),
        (3, True, {"INT8": 4, "INT4": 2}, 1),
        (2, False, {"INT8": 4, "INT4": 2}, 1),
        (5, True, {"INT8": 6}, 1),
    ],
)
def test_opset_21_has_true_int4_with_the_same_numbers(
    bits: int, unsigned: bool, kinds: dict[str, int], left: int, stored: str, tmp_path: Path
) -> None:
    model = prepared(bits, bits, unsigned=unsigned)
    wide = qatkit.export_onnx(model, X, tmp_path / "13.onnx", weights=stored)
    narrow = qatkit.export_onnx(model, X, tmp_path / "21.onnx", opset=21, weights=stored)
    assert types_of_codes(tmp_path / "13.onnx") == {"INT8": 6}
    assert types_of_codes(tmp_path / "21.onnx") == kinds
    assert clips(tmp_path / "13.onnx") == 1
    assert clips(tmp_path / "21.onnx") == left
    assert narrow.verify is not None
    assert narrow.verify.ok
    assert narrow.verify.differing == 0
    np.testing.assert_array_equal(run(tmp_path / "13.onnx"), run(tmp_path / "21.onnx"))
    assert wide.simulated == {bits: 2}
    assert narrow.simulated == ({} if bits == 4 else {bits: 2})


def test_verification_sees_a_wrong_4_bit_code(tmp_path: Path) -> None:
    model, path = prepared(4, 8), tmp_path / "a.onnx"
    qatkit.export_onnx(model, X, path, opset=21, weights="int8")
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT4 and len(tensor.dims) == 4:
            codes = onnx.numpy_helper.to_array(tensor).astype(int).flatten().tolist()
            codes[5] = -codes[5] if codes[5] else 3
            tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, 22, list(tensor.dims), codes))
    onnx.save(proto, path)
    report = qatkit.verify_onnx(path, model, X)
    assert not report.ok
    assert report.differing >= 1


def test_the_report_tells_a_simulation(tmp_path: Path) -> None:
    report = qatkit.export_onnx(prepared(4, 4), X, tmp_path / "a.onnx", opset=20)
    assert types_of_codes(tmp_path / "a.onnx") == {"INT8": 6}
    assert report.simulated == {4: 2}
    assert "simulation of narrower grids: 2 of 4 bits among 6 DQ" in str(report)
    assert not [one for one in report.findings if one.level != "INFO"]


def test_float16_with_int4(tmp_path: Path) -> None:
    model, path = prepared(4, 4, unsigned=True), tmp_path / "a.onnx"
    report = qatkit.export_onnx(model, X, path, opset=21, precision="float16")
    assert types_of_codes(path) == {"INT8": 4, "INT4": 1, "UINT4": 1}
    assert report.verify is not None
    assert report.verify.ok


def test_codes_around_a_zero_point_keep_their_type(tmp_path: Path) -> None:
    model, path = prepared(4, 4, backend="onnxruntime"), tmp_path / "a.onnx"
    report = qatkit.export_onnx(model, X, path, opset=21)
    assert report.verify is not None
    assert report.verify.ok
    assert types_of_codes(path)["UINT4"] == 0


def test_the_lint_says_what_runs(tmp_path: Path) -> None:
    model = prepared(4, 4)
    report = qatkit.export_onnx(model, X, tmp_path / "13.onnx")
    found = [one for one in report.findings if one.rule == "F20"]
    assert {(one.node, one.level) for one in found} == {
        ("3.input_quantizer/DequantizeLinear", "INFO"),
        ("3.weight_quantizer/DequantizeLinear", "INFO"),
    }
    assert all("runs as INT8" in one.message for one in found)
    stored = qatkit.export_onnx(model, X, tmp_path / "codes.onnx", weights="int8")
    assert sum(one.rule == "F20" for one in stored.findings) == 2
    true = qatkit.export_onnx(model, X, tmp_path / "21.onnx", opset=21)
    warned = [one for one in true.findings if one.rule == "F20"]
    assert [one.level for one in warned] == ["WARN"]
    assert "reads int4 codes of activation" in warned[0].message
    assert "opset=20" in warned[0].remedy
    eight = qatkit.export_onnx(prepared(8, 8), X, tmp_path / "8.onnx")
    assert not [one for one in eight.findings if one.rule == "F20"]
    assert eight.simulated == {}
    assert "simulation" not in str(eight)


def test_4_bit_weights_alone_are_no_warning(tmp_path: Path) -> None:
    report = qatkit.export_onnx(prepared(4, 8), X, tmp_path / "a.onnx", opset=21)
    assert types_of_codes(tmp_path / "a.onnx") == {"INT8": 5, "INT4": 1}
    assert not [one for one in report.findings if one.level != "INFO"]
