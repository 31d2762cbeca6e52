"""Text classifiers from float model to file: prepare, calibrate, train, export, verify, run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import qatkit
from qatkit import QuantConfig, QuantSpec, Rule

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

LENGTH = 6


class Classifier(nn.Module):
    """Embedding, recurrent layer, linear layer."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16, padding_idx=0)
        self.rnn = getattr(nn, kind)(16, 24, batch_first=True, **options)
        width = (options.get("proj_size") or 24) * (1 + options.get("bidirectional", False))
        self.head = nn.Linear(width, 2)

    def forward(self, indices: Tensor) -> Tensor:
        output, _ = self.rnn(self.embedding(indices))
        return self.head(output.mean(dim=1))


class Steps(nn.Module):
    """A cell in a loop of the user's."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cell = getattr(nn, kind)(16, 24)
        self.head = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


def sentences(count: int) -> tuple[Tensor, Tensor]:
    """Return word indices and whether there are more high than low ones among them."""
    indices = torch.randint(1, 40, (count, LENGTH))
    return indices, ((indices >= 20).sum(1) > LENGTH // 2).long()


def prepared(model: nn.Module, *inputs: Tensor, config: Any = None) -> nn.Module:
    """Return the model with quantizers and ranges."""
    qatkit.prepare(model, inputs, config)
    qatkit.calibrate(model, [inputs], progress=False)
    return model.eval()


def exported(model: nn.Module, inputs: Any, path: Path, **options: Any) -> Any:
    """Export, check the report and return the file; rare ties may fall to the other side."""
    report = qatkit.export_onnx(model, inputs, path, **options)
    assert not [finding for finding in report.findings if finding.level == "ERROR"]
    assert not report.verify.missing
    assert report.verify.differing <= 2
    assert report.verify.largest_step <= 1
    assert report.verify.relative_difference < 0.02
    return onnx.load(path)


def run(path: Path, *inputs: Tensor) -> Any:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return session.run(None, feeds)[0]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_text_classifier_all_the_way(kind: str, tmp_path: Path) -> None:
    model = Classifier(kind)
    train, test = sentences(1024), sentences(64)
    qatkit.prepare(model, train[0][:4])
    qatkit.calibrate(model, [train[0]], progress=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    before = model.rnn.hidden_l0_quantizer.amax.clone()
    for _ in range(40):
        loss = nn.functional.cross_entropy(model.train()(train[0]), train[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.rnn.hidden_l0_quantizer.amax != before
    qatkit.freeze_ranges(model).apply()
    wanted = model.eval()(test[0]).detach().numpy()
    assert np.mean(wanted.argmax(1) == test[1].numpy()) > 0.9
    proto = exported(model, test[0][:4], tmp_path / "m.onnx", weights="int8")
    assert {entry.version for entry in proto.opset_import} == {13}
    found = run(tmp_path / "m.onnx", test[0])  # another batch size than in the example
    assert np.mean(found.argmax(1) == wanted.argmax(1)) > 0.98
    assert np.median(np.abs(found - wanted)) < 1e-5


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LSTM", {"num_layers": 2, "bidirectional": True}),
        ("LSTM", {"proj_size": 8, "bias": False}),
        ("GRU", {"bidirectional": True}),
        ("GRU", {"bias": False}),
        ("RNN", {"num_layers": 2}),
    ],
)
def test_weights_are_in_the_file_once(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    indices, _ = sentences(3)
    model = prepared(Classifier(kind, **options), indices)
    proto = exported(model, indices, tmp_path / "m.onnx", weights="int8")
    codes = Counter[str]()
    for tensor in proto.graph.initializer:
        name, _, part = tensor.name.partition("_quantizer")
        if tensor.data_type == onnx.TensorProto.INT8 and part.endswith(".codes"):
            codes[name] += int(np.prod(tensor.dims))
    weights = {n: p.numel() for n, p in model.named_parameters() if "weight" in n}
    assert dict(codes) == weights
    kinds = Counter(node.op_type for node in proto.graph.node)
    assert not kinds["LSTM"] + kinds["GRU"] + kinds["RNN"] + kinds["Transpose"]
    assert kinds["Tanh"] == LENGTH * sum(n.startswith("rnn.weight_hh") for n in weights) * (
        2 if kind == "LSTM" else 1
    )


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])
def test_cells_in_a_loop(kind: str, tmp_path: Path) -> None:
    x = torch.randn(3, LENGTH, 16)
    model = prepared(Steps(kind), x)
    exported(model, x, tmp_path / "m.onnx")
    more = torch.randn(5, LENGTH, 16)
    np.testing.assert_allclose(run(tmp_path / "m.onnx", more), model(more).detach(), atol=0.02)


class Sequence(nn.Module):
    """A recurrent layer that is given its state."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(16, 24)

    def forward(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, ...]:
        output, (hidden, cell) = self.rnn(x, (hidden, cell))
        return output, hidden, cell


def test_a_given_state_and_time_first(tmp_path: Path) -> None:
    inputs = (torch.randn(LENGTH, 3, 16), torch.randn(1, 3, 24), torch.randn(1, 3, 24))
    model = prepared(Sequence(), *inputs)
    exported(model, inputs, tmp_path / "m.onnx", dynamic_batch=False)
    found = run(tmp_path / "m.onnx", *inputs)
    np.testing.assert_allclose(found, model(*inputs)[0].detach(), atol=0.02)


class Bag(nn.Module):
    """Bags of words."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(40, 16, **options)
        self.head = nn.Linear(16, 2)

    def forward(self, indices: Tensor, offsets: Tensor | None = None) -> Tensor:
        return self.head(self.embedding(indices, offsets))


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags(mode: str, padding: int | None, tmp_path: Path) -> None:
    indices, _ = sentences(3)
    indices[0, :4] = 3
    model = prepared(Bag(mode=mode, padding_idx=padding), indices)
    proto = exported(model, indices, tmp_path / "m.onnx")
    assert "Loop" not in {node.op_type for node in proto.graph.node}
    more, _ = sentences(7)
    np.testing.assert_allclose(run(tmp_path / "m.onnx", more), model(more).detach(), atol=0.02)


def test_bags_with_offsets(tmp_path: Path) -> None:
    inputs = (torch.arange(1, 19), torch.tensor([0, 4, 9]))
    model = prepared(Bag(), *inputs)
    exported(model, inputs, tmp_path / "m.onnx")


@pytest.mark.parametrize("axis", [None, 0])
def test_tables_with_one_scale_or_one_for_each_row(axis: int | None, tmp_path: Path) -> None:
    spec = QuantSpec(axis=axis, observer="minmax", narrow_range=True, memory="latest")
    model = nn.Sequential(nn.Embedding(40, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    indices, _ = sentences(3)
    prepared(model, indices, config=QuantConfig(rules=(Rule("0", weight=spec),)))
    proto = exported(model, indices, tmp_path / "m.onnx", weights="int8")
    table = next(t for t in proto.graph.initializer if t.name == "0.weight_quantizer.codes")
    assert list(table.dims) == [40, 16]
    (reader,) = (n for n in proto.graph.node if "0.weight_quantizer.codes" in n.input)
    (gather,) = (n for n in proto.graph.node if reader.output[0] in n.input)
    assert (reader.op_type, gather.op_type) == ("DequantizeLinear", "Gather")


class Packed(Classifier):
    """The classifier on sequences of several lengths."""

    def forward(self, indices: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embedding(indices)
        _, state = self.rnn(pack_padded_sequence(x, lengths, True, enforce_sorted=False))
        return self.head(state[-1])


def test_packed_sequences_are_refused(tmp_path: Path) -> None:
    inputs = (sentences(3)[0], torch.tensor([2, 6, 4]))
    model = prepared(Packed("GRU"), *inputs)
    with pytest.raises(qatkit.QatkitError, match="PackedSequence would become constants"):
        qatkit.export_onnx(model, inputs, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
