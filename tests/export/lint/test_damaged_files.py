from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qatkit.errors import QatkitError
from qatkit.export.lint import Finding, lint_onnx
from qatkit.export.lint.rule import Rule
from tests.export.lint.qdq_builder import Graph, resnet_block

N = helper.make_node
X = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])]
Y = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]


def raw_model(*nodes, initializers=()):
    graph = helper.make_graph(list(nodes), "net", X, Y, list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)


def array(name, value):
    return numpy_helper.from_array(np.asarray(value, np.float32), name)


CYCLES = {
    "self": [N("Identity", ["a"], ["a"]), N("MatMul", ["x", "a"], ["y"])],
    "two": [
        N("Transpose", ["a"], ["b"]),
        N("Identity", ["b"], ["a"]),
        N("MatMul", ["x", "a"], ["y"]),
    ],
    "through a join": [
        N("Add", ["x", "b"], ["a"]),
        N("Relu", ["a"], ["b"]),
        N("Exp", ["b"], ["y"]),
    ],
}


@pytest.mark.parametrize("kind", CYCLES)
def test_cycles_are_refused(kind):
    with pytest.raises(QatkitError, match=r"^ModelProto: graph 'net': node .* on a cycle: check"):
        lint_onnx(raw_model(*CYCLES[kind]))


STRANGE = {
    "Q without inputs": [N("QuantizeLinear", [], ["y"])],
    "Q without scale": [N("QuantizeLinear", ["x"], ["y"])],
    "Q of nothing": [N("QuantizeLinear", ["x", "no", "nothing"], ["y"])],
    "DQ without outputs": [N("DequantizeLinear", ["x", "x"], []), N("Relu", ["x"], ["y"])],
    "Conv without weight": [N("Conv", ["x"], ["y"])],
    "Conv of nothing": [N("Conv", ["x", "no"], ["y"])],
    "Add of one": [N("Add", ["x"], ["y"])],
    "Concat of none": [N("Concat", [], ["y"], axis=0)],
    "Softmax of none": [N("Softmax", [], ["y"])],
    "mean over no axis": [N("ReduceMean", ["x"], ["m"], axes=[7]), N("Sub", ["x", "m"], ["y"])],
    "text as axis": [N("QuantizeLinear", ["x", "four"], ["y"], axis="channels")],
    "transposed along no axis": [
        N("Transpose", ["four"], ["t"], perm=[0, 5]),
        N("QuantizeLinear", ["x", "t"], ["y"]),
    ],
    "cast to no type": [N("Cast", ["four"], ["t"], to=77), N("QuantizeLinear", ["x", "t"], ["y"])],
    "text as scale": [
        N("Constant", [], ["t"], value_strings=["a"]),
        N("QuantizeLinear", ["x", "t"], ["y"]),
    ],
    "tensor of text as scale": [N("QuantizeLinear", ["x", "words"], ["y"])],
    "unknown type": [N("QuantizeLinear", ["x", "four", "strange"], ["y"])],
    "no operator": [N("", ["x"], ["y"])],
}
TENSORS = [
    array("four", [1, 1, 1, 1]),
    helper.make_tensor("words", TensorProto.STRING, [1], [b"a"]),
    TensorProto(name="strange", data_type=99, dims=[1]),
]


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_graphs_give_findings_or_one_line(kind):
    message, findings = "", []
    try:
        findings = lint_onnx(raw_model(*STRANGE[kind], initializers=TENSORS))
    except QatkitError as error:
        message = str(error)
    assert findings or message.startswith("ModelProto: ")
    assert len(message.splitlines()) <= 1
    assert all(isinstance(one, Finding) for one in findings)


def test_nodes_in_any_order():
    model = resnet_block()
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    assert lint_onnx(model) == []


@pytest.mark.parametrize("cut", [0.3, 0.5, 0.9, 1.0])
def test_a_file_cut_short(tmp_path, cut):
    data = resnet_block().SerializeToString()
    path = tmp_path / "cut.onnx"
    path.write_bytes(data[: int(len(data) * cut) - 1])
    with pytest.raises(QatkitError, match=r"cut\.onnx: not an ONNX file"):
        lint_onnx(path)


@pytest.mark.parametrize(
    "head", [b"\x89PNG\r\n\x1a\n", b"PK\x03\x04", b"\x7fELF", b"<html>", b"\xff" * 9]
)
def test_a_file_of_another_kind(tmp_path, head):
    path = tmp_path / "other.onnx"
    path.write_bytes(head + bytes(range(200)))
    with pytest.raises(QatkitError, match=r"other\.onnx: "):
        lint_onnx(path)


def test_damaged_scale_names_file_and_tensor(tmp_path):
    broken = TensorProto(name="scale", data_type=TensorProto.FLOAT, dims=[5], raw_data=b"abc")
    path = tmp_path / "broken.onnx"
    onnx.save(raw_model(N("QuantizeLinear", ["x", "scale"], ["y"]), initializers=[broken]), path)
    with pytest.raises(QatkitError, match=r"broken.onnx: tensor 'scale': damaged"):
        lint_onnx(path)


def test_a_malformed_graph_on_which_a_rule_fails(monkeypatch):
    def fail(view, backend):
        raise KeyError("no such attribute")
        yield

    monkeypatch.setattr("qatkit.export.lint.rules", lambda: (Rule("X", "x", "[C]", fail),))
    with pytest.raises(
        QatkitError, match=r"ModelProto: malformed graph \(.*\): write the file again"
    ):
        lint_onnx(raw_model(N("NoSuchOperator", ["x"], ["y"])))
    with pytest.raises(KeyError):  # a bug in a rule is not the file's fault
        lint_onnx(onnx.shape_inference.infer_shapes(resnet_block()))


def test_empty_graphs():
    opsets = [helper.make_opsetid("", 13)]
    for values in ([], X):
        empty = helper.make_graph([], "empty", values, values)
        found = lint_onnx(helper.make_model(empty, opset_imports=opsets))
        assert [(one.rule, one.node) for one in found] == [("F1", "empty")]


def test_constants_are_computed():
    g = Graph()
    scale = g.op("Div", g.const(12.7), g.const(127.0))
    zero = g.op(
        "ConstantOfShape", g.const([], np.int64), value=numpy_helper.from_array(np.ones(1, np.int8))
    )
    y = g.op("QuantizeLinear", g.input(1, 4), scale, zero, name="q")
    zero_scale = g.op("Squeeze", g.op("Mul", g.const([1.0]), g.const([0.0])))
    y = g.op("DequantizeLinear", y, zero_scale, g.const(0, np.int8), name="dq")
    found = [(one.rule, one.node) for one in lint_onnx(g.model(g.op("Relu", y)))]
    assert ("P2", "q") in found
    assert ("P4", "dq") in found
    assert ("P4", "q") not in found
