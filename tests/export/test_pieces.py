"""A file that runs in pieces computes what it computes in one, and keeps little in memory."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import qatkit
from qatkit import QuantConfig
from qatkit.config import WEIGHT
from qatkit.export import teacher_forcing
from qatkit.export.onnx_runtime import read_onnx
from qatkit.export.pieces import cut, quantizer_pairs, read_by


class Residual(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(depth))
        self.shared = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        y = torch.relu(self.first(x))
        for block in self.blocks:
            y = y + torch.relu(block(y))
        tokens = self.shared(self.shared(y.flatten(2).transpose(1, 2)))
        return self.attention(tokens, tokens, tokens)[0], y.mean((2, 3)), x * 2


class Chain(nn.Sequential):
    def __init__(self, depth=12):
        super().__init__(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(depth)))


X = torch.randn(2, 3, 6, 6)


def exported(model, path, **options):
    torch.manual_seed(0)
    qatkit.prepare(model, X, options.pop("config", None))
    qatkit.calibrate(model, [X], progress=False)
    report = qatkit.export_onnx(model, X, path, verify=False, lint=False, **options)
    assert report.verify is None
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weights": "int8"},
        {"opset": 21, "config": QuantConfig(weight=WEIGHT.replace(num_bits=4))},
        {"opset": 19, "precision": "float16"},
        {"config": "onnxruntime-uint8"},
    ],
)
def test_the_outputs_are_those_of_the_whole_file(tmp_path, options):
    path = tmp_path / "a.onnx"
    model = exported(Residual(), path, **options)
    file = read_onnx(path)
    name = file.model.graph.input[0].name
    forcing = teacher_forcing.Forcing(file, {name: X.numpy()}, set())
    with torch.no_grad(), teacher_forcing.watched(model.eval(), forcing):
        model(X)
    own, forced = forcing.finish()
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    whole = session.run(None, {name: X.numpy()})
    exact = options.get("precision") != "float16"  # there, quantizers run otherwise in pieces
    for mine, near, wanted in zip(own, forced, whole, strict=True):
        assert mine.dtype == wanted.dtype
        assert mine.shape == near.shape == wanted.shape
        if exact:
            assert (mine == wanted).all()
    assert qatkit.verify_onnx(path, model, X).ok


def test_each_node_is_in_its_piece_and_reads_what_is_there(tmp_path):
    exported(Residual(), tmp_path / "a.onnx")
    graph = onnx.load(tmp_path / "a.onnx").graph
    pieces = cut(graph)
    assert len(pieces) > 3
    constants = {tensor.name for tensor in graph.initializer}
    there = {value.name for value in graph.input}
    ran = []
    for piece in pieces:
        assert piece.reads <= there
        inside = set(piece.reads) | constants
        quantized = {dq.output[0] for _, dq in piece.pairs}
        for node in piece.nodes:
            assert read_by(node) <= inside
            assert quantized.isdisjoint(read_by(node))
            inside.update(node.output)
        assert set(piece.makes) <= inside
        there |= set(piece.makes)
        ran += [node.output[0] for node in piece.nodes]
    assert set(ran) == {node.output[0] for node in graph.node}
    assert sum(len(piece.pairs) for piece in pieces) == len(quantizer_pairs(graph))


def test_activations_are_forgotten(tmp_path, monkeypatch):
    model = exported(Chain(), tmp_path / "a.onnx")
    held = []
    real = teacher_forcing.Forcing._run

    def run(self, piece):
        real(self, piece)
        held.append(len(self._own) + len(self._forced) + len(self._seen))

    monkeypatch.setattr(teacher_forcing.Forcing, "_run", run)
    report = qatkit.verify_onnx(tmp_path / "a.onnx", model, X)
    assert report.ok
    assert len(report.quantizers) == 24
    assert len(held) >= 12
    assert max(held) <= 4


class Copies(nn.Module):
    """One quantizer on equal tensors: the file drops the copies."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(6, 6)

    def forward(self, x):
        y = self.f(x.clone())
        return y + self.f(x) + self.f(torch.relu(y))


def test_calls_on_copies_are_one_call_of_the_file(tmp_path):
    model = exported(Copies(), tmp_path / "a.onnx")
    assert qatkit.verify_onnx(tmp_path / "a.onnx", model, X).ok


def test_an_output_that_is_left_out_belongs_to_nobody():
    def node(op, inputs, outputs):
        return onnx.helper.make_node(op, inputs, outputs)

    nodes = [
        node("Split", ["c"], ["", "half"]),  # of a constant
        node("LSTM", ["x", "w", "r"], ["", "h"]),
        node("Add", ["h", "half"], ["y"]),
    ]
    constants = [onnx.helper.make_tensor(name, 1, [1], [1.0]) for name in "cwr"]
    infos = [onnx.helper.make_tensor_value_info(name, 1, None) for name in "xy"]
    graph = onnx.helper.make_graph(nodes, "g", infos[:1], infos[1:], constants)
    (piece,) = cut(graph)
    assert [one.op_type for one in piece.nodes] == ["Split", "LSTM", "Add"]
    assert piece.reads == {"x"}
    assert piece.makes == ("y",)
