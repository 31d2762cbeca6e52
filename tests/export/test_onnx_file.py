"""Files are written and read without their weights in memory, and are ordinary ONNX files."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import qatkit
from qatkit import QatkitError
from qatkit.export import onnx_file
from qatkit.export.onnx_file import LARGE, OnnxFile, read_model, write_model


def model(*arrays, extra=()):
    tensors = [numpy_helper.from_array(array, f"t{i}") for i, array in enumerate(arrays)]
    tensors += extra
    names = [tensor.name for tensor in tensors]
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], [f"{name}.y"], doc_string="a") for name in names],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3])],
        [helper.make_tensor_value_info(f"{t.name}.y", t.data_type, t.dims) for t in tensors],
        tensors,
        doc_string="of the graph",
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], doc_string="d")
    made.metadata_props.add(key="k", value="v")
    return made


@pytest.mark.parametrize("size", [0, 1, LARGE // 4, LARGE // 4 + 1, 300_000])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8, np.int64, bool])
def test_comes_back(tmp_path, size, dtype):
    arrays = [(np.arange(size) % 3).astype(dtype), np.arange(5.0).reshape(1, 5)]
    wanted = model(*arrays)
    path = tmp_path / "a.onnx"
    write_model(wanted, path)
    assert onnx.load(path) == wanted
    found = read_model(path)
    for tensor, array in zip(found.model.graph.initializer, arrays, strict=True):
        value = found.array(tensor)
        assert value.dtype == array.dtype
        np.testing.assert_array_equal(value, array)
    large = arrays[0].nbytes > LARGE
    assert set(found.places) == ({"t0"} if large else set())
    assert found.model.ByteSize() < wanted.ByteSize() or not large


@given(st.integers(0, 1 << 30))
@settings(max_examples=60, deadline=None)
def test_lengths_are_those_of_protobuf(count):
    header = onnx_file._header(7, count)
    assert onnx_file._varint(header, 1) == (count, len(header))


def test_values_that_are_made_when_they_are_written(tmp_path):
    shape = (70, 300)
    hollow = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=shape)
    value = np.random.default_rng(0).normal(size=shape[::-1]).astype(np.float32).T
    path = tmp_path / "a.onnx"
    write_model(model(np.ones(3), extra=[hollow]), path, {"w": lambda: value})
    onnx.checker.check_model(path)
    tensor = onnx.load(path).graph.initializer[1]
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), value)
    found = read_model(path)
    np.testing.assert_array_equal(found.array(found.model.graph.initializer[1]), value)


def test_four_bits_are_read_as_onnx_reads_them(tmp_path):
    codes = [i % 16 - 8 for i in range(2 * LARGE + 9)]
    tensor = helper.make_tensor("c", TensorProto.INT4, [len(codes)], codes)
    made = model(extra=[tensor])
    onnx.save(made, tmp_path / "a.onnx")
    found = read_model(tmp_path / "a.onnx")
    np.testing.assert_array_equal(
        found.array(found.model.graph.initializer[0]).astype(np.int64), codes
    )


def test_external_data_of_others_is_read_from_its_file(tmp_path):
    array = np.arange(40_000, dtype=np.float32)
    path = tmp_path / "a.onnx"
    onnx.save(model(array), path, save_as_external_data=True, location="a.data")
    found = read_model(path)
    assert not found.places
    np.testing.assert_array_equal(found.array(found.model.graph.initializer[0]), array)


def test_a_model_in_memory():
    made = model(np.arange(3.0))
    np.testing.assert_array_equal(OnnxFile(made).array(made.graph.initializer[0]), np.arange(3.0))


@pytest.mark.parametrize("keep", [0, 1, 50, 1000, -1])
def test_a_damaged_file_raises(tmp_path, keep):
    path = tmp_path / "a.onnx"
    write_model(model(np.ones(50_000, np.float32)), path)
    path.write_bytes(path.read_bytes()[:keep])
    found = None
    with pytest.raises(QatkitError, match=r"not an ONNX file|no graph inside"):
        found = qatkit.lint_onnx(path)
    assert found is None


def test_more_than_protobuf_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "_MOST", 4000)
    path = tmp_path / "a.onnx"
    with pytest.raises(QatkitError, match=r"\d{4} bytes.*export the model in parts"):
        write_model(model(np.ones(600)), path)
    assert not path.exists()


def test_nothing_of_a_large_weight_is_in_memory_twice(tmp_path, monkeypatch):
    """All that ONNX parses or serializes at a time is smaller than the weights."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(256, 256) for _ in range(6)))
    x = torch.randn(2, 256)
    qatkit.prepare(net, x)
    qatkit.calibrate(net, [x], progress=False)
    seen = []
    real = onnx_file.OnnxFile.array

    def array(file, tensor):
        seen.append(tensor.name)
        return real(file, tensor)

    monkeypatch.setattr(onnx_file.OnnxFile, "array", array)
    path = tmp_path / "a.onnx"
    report = qatkit.export_onnx(net, x, path)
    assert report.verify is not None
    assert report.verify.ok
    assert path.stat().st_size > 6 * 256 * 256 * 4
    found = read_model(path)
    assert found.model.ByteSize() < 100_000
    assert set(found.places) <= set(seen)
