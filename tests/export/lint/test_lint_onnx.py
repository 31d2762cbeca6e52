from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qatkit.errors import MissingExtraError, QatkitError, QatkitTypeError
from qatkit.export.lint import (
    LEVELS,
    Finding,
    count_levels,
    findings_to_json,
    format_findings,
    lint_onnx,
    open_view,
    rules,
)
from tests.export.lint.qdq_builder import Graph, findings_of, resnet_block


def bad_model(name="q"):
    g = Graph()
    codes = g.q(g.input(1, 16), zero=3, name=name)
    return g.model(g.op("Relu", g.dq(codes, name="dq")))


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_a_file_gives_the_findings_of_the_model(tmp_path, kind):
    path = tmp_path / "bad.onnx"
    onnx.save(bad_model(), path)
    assert lint_onnx(kind(path)) == lint_onnx(bad_model()) != []


def test_missing_file(tmp_path):
    path = tmp_path / "missing.onnx"
    with pytest.raises(QatkitError, match=rf"{re.escape(str(path))}: no such file: give"):
        lint_onnx(path)


def test_folder(tmp_path):
    with pytest.raises(QatkitError, match="is a folder"):
        lint_onnx(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello world, this is no protobuf", b"\x00" * 50, b"{}"])
@pytest.mark.parametrize("name", ["model.onnx", "model.bin", "model.json", "model.textproto"])
def test_file_that_is_no_onnx_file(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(QatkitError, match=re.escape(str(path))) as caught:
        lint_onnx(path)
    assert len(str(caught.value).splitlines()) == 1
    assert "export_onnx" in str(caught.value)


@pytest.mark.parametrize("wrong", [None, 3, b"model.onnx", onnx.GraphProto()])
def test_wrong_type(wrong):
    with pytest.raises(QatkitTypeError, match="give the path of an"):
        lint_onnx(wrong)


def test_unknown_backend():
    with pytest.raises(QatkitError, match="unknown backend 'tensort'"):
        lint_onnx(bad_model(), backend="tensort")


def test_onnx_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(
        MissingExtraError, match=r"onnx is not installed: pip install 'qatkit\[onnx"
    ):
        lint_onnx("model.onnx")


def test_import_does_not_import_onnx():
    code = "import sys, qatkit.export.lint; sys.exit('onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_finding_has_a_source_and_a_known_level():
    findings = lint_onnx(bad_model())
    assert all(one.source and one.remedy and one.level in LEVELS for one in findings)


def test_errors_come_first():
    g = Graph()
    x = g.conv(g.qdq(g.input(1, 8, 8, 8), zero=1), 8, 8, name="few")
    y = g.conv(x, 8, 8, name="float", float_weight=True)
    levels = [one.level for one in lint_onnx(g.model(y))]
    assert levels == sorted(levels, key=LEVELS.index)
    assert set(levels) == set(LEVELS)


def test_rule_table():
    assert all(rule.id and rule.title and rule.source for rule in rules())
    assert {"P1", "P10", "B1", "B2", "F1", "F2b", "F6", "F19"} <= {rule.id for rule in rules()}


def test_unknown_level():
    with pytest.raises(QatkitError, match="choose one of ERROR, WARN, INFO"):
        Finding("P1", "error", "node", "text")


def test_text():
    findings = [
        Finding("P2", "ERROR", "conv/q", "zero point 3", remedy="make it 0"),
        Finding("F14", "INFO", "fc", "two\nlines"),
    ]
    assert str(findings[0]) == "ERROR P2 conv/q: zero point 3; make it 0"
    assert str(findings[1]) == "INFO F14 fc: two lines"
    assert format_findings(findings).splitlines() == [
        "level  rule  node    finding",
        "ERROR  P2    conv/q  zero point 3; make it 0",
        "INFO   F14   fc      two lines",
        "1 error, 0 warnings, 1 info",
    ]
    assert count_levels(findings) == {"ERROR": 1, "WARN": 0, "INFO": 1}


def test_json():
    findings = lint_onnx(bad_model())
    assert [Finding(**fields) for fields in json.loads(findings_to_json(findings))] == findings


def test_unnamed_nodes_are_called_by_operator_and_output():
    assert findings_of(bad_model(name=""))[0] == ("P2", "ERROR", "QuantizeLinear(t0_0)")


def if_model(then_nodes, initializers=(), outer=()):
    """A model whose If holds ``then_nodes``, the last one making ``out``."""
    empty = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    then = helper.make_graph(list(then_nodes), "then", [], [empty], list(initializers))
    other = helper.make_node("Identity", ["x"], ["out"])
    orelse = helper.make_graph([other], "else", [], [empty])
    choose = helper.make_node(
        "If", ["cond"], ["y"], name="if", then_branch=then, else_branch=orelse
    )
    inputs = [
        helper.make_tensor_value_info("cond", TensorProto.BOOL, []),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    constants = [
        onnx.numpy_helper.from_array(np.float32(0.1), "scale"),
        onnx.numpy_helper.from_array(np.int8(0), "zero"),
        onnx.numpy_helper.from_array(np.int8(3), "three"),
    ]
    graph = helper.make_graph([*outer, choose], "net", inputs, [output], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)


@pytest.mark.parametrize(("zero", "bad"), [("three", True), ("zero", False)])
def test_subgraphs_are_linted(zero, bad):
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", zero], ["c"], name="q"),
        helper.make_node("DequantizeLinear", ["c", "scale", "zero"], ["d"], name="dq"),
        helper.make_node("Relu", ["d"], ["out"]),
    ]
    expected = [("P2", "ERROR", "if/then_branch/q")] if bad else []
    assert findings_of(if_model(nodes)) == expected


def test_a_quantized_constant_may_be_read_in_a_subgraph():
    outer = [helper.make_node("QuantizeLinear", ["scale", "scale", "zero"], ["c"], name="q")]
    nodes = [
        helper.make_node("DequantizeLinear", ["c", "scale", "zero"], ["d"], name="dq"),
        helper.make_node("Add", ["d", "x"], ["out"]),
    ]
    assert findings_of(if_model(nodes, outer=outer), "B2") == []


def test_local_functions_are_inlined():
    body = [
        helper.make_node("Constant", [], ["z"], value_int=0),
        helper.make_node("Cast", ["z"], ["zero"], to=TensorProto.UINT8),
        helper.make_node("QuantizeLinear", ["a", "s", "zero"], ["c"], name="q"),
        helper.make_node("DequantizeLinear", ["c", "s", "zero"], ["b"], name="dq"),
    ]
    opset = helper.make_opsetid("", 17)
    function = helper.make_function("local", "Pair", ["a", "s"], ["b"], body, [opset])
    g = Graph(17)
    y = g.op("Pair", g.input(1, 4), g.const(0.1), domain="local")
    model = g.model(g.op("Relu", y))
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("local", 1))
    assert [one[0] for one in findings_of(model)] == ["P3", "P3"]


def test_external_data(tmp_path):
    path = tmp_path / "big.onnx"
    onnx.save(resnet_block(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert lint_onnx(path) == []
    (tmp_path / "w.bin").unlink()
    with pytest.raises(QatkitError, match="external data"):
        lint_onnx(path)


def test_the_model_is_not_changed():
    model = resnet_block()
    before = model.SerializeToString(deterministic=True)
    lint_onnx(model)
    assert model.SerializeToString(deterministic=True) == before


def test_view_answers():
    g = Graph()
    x = g.input("batch", 16)
    w = g.const(np.ones((16, 4)))
    y = g.op("MatMul", x, g.op("Transpose", g.op("Transpose", w)), name="mm")
    view = open_view(g.model(g.op("Relu", y)))
    node = view.producer(y)
    assert node is not None
    assert node.name == "mm"
    assert [one.op for one in view.consumers(y)] == ["Relu"]
    assert view.shape(y) == (None, 4)
    assert view.dtype(y) == "float"
    assert view.is_constant(node.input(1))
    assert not view.is_constant(y)
    value = view.array(node.input(1))
    assert value is not None
    assert value.shape == (16, 4)
    assert view.shape("nowhere") is view.dtype("nowhere") is view.producer("nowhere") is None


def test_a_large_file_is_clean():
    g = Graph()
    x = g.input(1, 256, 14, 14)
    for i in range(60):
        xq = g.qdq(x, 0.1, name=f"x{i}")
        y = g.op("Relu", g.conv(xq, 256, 256, name=f"a{i}", size=1))
        y = g.conv(g.qdq(y, 0.1, name=f"y{i}"), 256, 256, name=f"b{i}", size=1)
        x = g.op("Relu", g.op("Add", y, xq))
    assert findings_of(g.model(x)) == []
