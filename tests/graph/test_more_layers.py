"""Which quantizers recurrent layers, embeddings and 1-d and 3-d convolutions get, and which not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import qatkit
from qatkit import QuantConfig, QuantSpec, Rule
from qatkit.quantizer import TensorQuantizer

INDICES = torch.arange(28).reshape(4, 7)


class Classifier(nn.Module):
    """Embedding, recurrent layer, linear layer."""

    def __init__(self, kind: str = "LSTM", **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16, padding_idx=0)
        self.rnn = getattr(nn, kind)(16, 24, batch_first=True, **options)
        width = (options.get("proj_size") or 24) * (1 + options.get("bidirectional", False))
        self.head = nn.Linear(width, 5)

    def forward(self, indices: Tensor) -> Tensor:
        output, _ = self.rnn(self.embedding(indices))
        return self.head(output[:, -1])


class Packed(Classifier):
    """The same on sequences of several lengths."""

    def forward(self, indices: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embedding(indices)
        _, state = self.rnn(pack_padded_sequence(x, lengths, True, enforce_sorted=False))
        return self.head((state[0] if isinstance(state, tuple) else state)[-1])


class Steps(nn.Module):
    """A cell in a loop of the user's."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cell = getattr(nn, kind)(16, 24)

    def forward(self, x: Tensor) -> Any:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state


def reasons(plan: qatkit.Plan) -> dict[str, str]:
    """Return why each quantizer of a plan is there."""
    return {entry.path: entry.reason for entry in plan.quantizers}


def left(plan: qatkit.Plan) -> dict[str, str]:
    """Return what stays float, and why."""
    return {skip.path: skip.reason for skip in plan.skipped}


def test_quantizers_of_a_text_classifier() -> None:
    plan = qatkit.plan(Classifier(num_layers=2), INDICES)
    assert reasons(plan) == {
        "embedding.weight_quantizer": "F2: weight of Embedding",
        "rnn.input_quantizer": "F1: input of LSTM",
        "rnn.weight_ih_l0_quantizer": "F2: weight of LSTM",
        "rnn.hidden_l0_quantizer": "F1: inside LSTM",
        "rnn.weight_hh_l0_quantizer": "F2: weight of LSTM",
        "rnn.input_l1_quantizer": "F1: inside LSTM",
        "rnn.weight_ih_l1_quantizer": "F2: weight of LSTM",
        "rnn.hidden_l1_quantizer": "F1: inside LSTM",
        "rnn.weight_hh_l1_quantizer": "F2: weight of LSTM",
        "head.input_quantizer": "F1: input of Gemm",
        "head.weight_quantizer": "F2: weight of Gemm",
    }
    assert not plan.skipped
    axes = {entry.path: entry.spec.axis for entry in plan.quantizers if entry.role == "weight"}
    assert axes.pop("embedding.weight_quantizer") is None
    assert set(axes.values()) == {0}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 8}),
        ("GRU", {"num_layers": 2, "bidirectional": True}),
        ("RNN", {"bias": False}),
    ],
)
def test_every_planned_quantizer_is_there_and_runs(kind: str, options: dict[str, Any]) -> None:
    model = Classifier(kind, **options)
    float_keys = model.state_dict()
    plan = qatkit.plan(model, INDICES)
    qatkit.prepare(model, INDICES)
    assert type(model.rnn).__name__ == f"Quant{kind}"
    found = {n for n, m in model.named_modules() if isinstance(m, TensorQuantizer)}
    assert found == set(reasons(plan))
    model.load_state_dict(float_keys, strict=True)
    report = qatkit.calibrate(model, [INDICES], progress=False)
    assert not report.unreached
    model.eval()(INDICES)


def test_rules_switch_off_layers_and_products() -> None:
    rules = (Rule("rnn", enabled=False), Rule("embedding", enabled=False))
    plan = qatkit.plan(Classifier(), INDICES, QuantConfig(rules=rules))
    assert left(plan) == dict.fromkeys(("rnn", "embedding"), "disabled by a rule")
    assert [layer.path for layer in plan.layers] == ["head"]

    config = QuantConfig(rules=(Rule("rnn.hidden_l1_*", enabled=False), Rule("rnn", num_bits=4)))
    model = Classifier(num_layers=2)
    plan = qatkit.plan(model, INDICES, config)
    assert left(plan) == {"rnn.hidden_l1_quantizer": "disabled by a rule"}
    bits = {e.path: e.spec.num_bits for e in plan.quantizers if e.path.startswith("rnn")}
    assert set(bits.values()) == {4}
    assert not {"rnn.hidden_l1_quantizer", "rnn.weight_hh_l1_quantizer"} & set(bits)
    qatkit.prepare(model, INDICES, config)
    assert isinstance(model.rnn.weight_hh_l1_quantizer, nn.Identity)  # both operands or neither
    model(INDICES)


def test_rows_of_a_table_can_have_a_scale_each() -> None:
    spec = QuantSpec(axis=0, observer="minmax", narrow_range=True, memory="latest")
    model = Classifier()
    config = QuantConfig(rules=(Rule("embedding", weight=spec),))
    qatkit.prepare(model, INDICES, config)
    assert model.embedding.weight_quantizer.min_val.shape == (50,)
    model(INDICES)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_packed_sequences(kind: str) -> None:
    model, inputs = Packed(kind), (INDICES, torch.tensor([7, 2, 5, 1]))
    plain = model(*inputs)
    qatkit.prepare(model, inputs)
    assert isinstance(model.rnn.input_quantizer, TensorQuantizer)
    qatkit.calibrate(model, [inputs], progress=False)
    assert not any(q.startswith("rnn.input") for q in left(qatkit.plan(Packed(kind), inputs)))
    assert 0 < (model(*inputs) - plain).abs().max() < 0.1


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells_in_a_loop(kind: str) -> None:
    model, x = Steps(kind), torch.randn(4, 7, 16)
    plan = qatkit.plan(model, x)
    names = ("input", "weight_ih", "hidden", "weight_hh")
    assert list(reasons(plan)) == [f"cell.{name}_quantizer" for name in names]
    qatkit.prepare(model, x)
    qatkit.calibrate(model, [x], progress=False)
    model.eval()(x)


def test_a_table_that_its_forward_changes_stays_float() -> None:
    model = nn.Sequential(nn.Embedding(50, 16, max_norm=1.0), nn.Linear(16, 4))
    plan = qatkit.plan(model, INDICES)
    assert left(plan) == {"0": "max_norm changes the table while it is read"}
    qatkit.prepare(model, INDICES)
    assert type(model[0]) is nn.Embedding


def test_subclasses() -> None:
    class Named(nn.LSTM):
        label = "encoder"

    class Doubled(nn.GRU):
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            output, state = super().forward(input, hx)
            return 2 * output, state

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Named(16, 16)
            self.second = Doubled(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)[0])[0]

    model, x = Two(), torch.randn(5, 3, 16)
    plan = qatkit.plan(model, x)
    assert [layer.path for layer in plan.layers] == ["first"]
    assert "has its own forward" in left(plan)["second"]
    qatkit.prepare(model, x)
    assert model.first.label == "encoder"
    assert isinstance(model.first, qatkit.nn.QuantLSTM)


def test_computed_weights() -> None:
    weight_norm = torch.nn.utils.parametrizations.weight_norm
    model = Classifier()
    weight_norm(model.rnn, "weight_hh_l0")
    weight_norm(model.embedding)
    plan = qatkit.plan(model, INDICES)
    assert [layer.path for layer in plan.layers] == ["head"]
    assert all("has its own forward" in left(plan)[path] for path in ("rnn", "embedding"))


class Functional(nn.Module):
    """Layers that are called as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(50, 16))
        self.weights = nn.ParameterList(nn.LSTM(16, 16).parameters())
        self.head = nn.Linear(16, 4)

    def forward(self, indices: Tensor) -> Tensor:
        x = F.embedding(indices, self.table)
        state = x.new_zeros(x.shape[0], 16)
        state, _ = torch.lstm_cell(x[:, 0], (state, state), *self.weights)
        return self.head(state)


def test_functions_stay_float_and_say_so() -> None:
    assert left(qatkit.plan(Functional(), INDICES)) == {
        "embedding": "embedding is given its table; use torch.nn.Embedding",
        "lstm_cell": "lstm_cell is one function, with products inside; use torch.nn.LSTM",
    }


def test_operators_of_detection_stay_float_and_say_so() -> None:
    ops = pytest.importorskip("torchvision").ops

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offset = nn.Conv2d(3, 18, 3, padding=1)
            self.deform = ops.DeformConv2d(3, 8, 3, padding=1)
            self.norm = nn.GroupNorm(2, 8)
            self.align = ops.RoIAlign(2, 1.0, 2)
            self.levels = ops.MultiScaleRoIAlign(["0"], 2, 2)
            self.head = nn.Linear(8 * 4, 5)

        def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
            offset = self.offset(x)
            y = self.norm(self.deform(x, offset))
            y = y + ops.deform_conv2d(x, offset, self.deform.weight, padding=1)
            one = self.align(y, [boxes])
            several = self.levels({"0": y}, [boxes], [(8, 8)])
            return self.head((one + several).flatten(1))

    model, inputs = Detector(), (torch.randn(1, 3, 8, 8), torch.tensor([[0.0, 0.0, 4.0, 4.0]]))
    plan = qatkit.plan(model, inputs)
    assert {layer.path for layer in plan.layers} == {"offset", "head"}
    skipped = left(plan)
    for path, name in (
        ("deform", "deform_conv2d"),
        ("deform_conv2d", "deform_conv2d"),
        ("align", "roi_align"),
        ("levels", "roi_align"),
    ):
        assert skipped[path] == f"no quantized form of {name}: it interpolates between pixels"
    assert skipped["norm"] == "no quantized form of this layer (GroupNorm)"
    qatkit.prepare(model, inputs)
    qatkit.calibrate(model, [inputs], progress=False)
    assert model.eval()(*inputs).shape == (1, 5)


@pytest.mark.parametrize("dimensions", [1, 3])
def test_batch_norms_fold_into_other_dimensions(dimensions: int) -> None:
    conv = getattr(nn, f"Conv{dimensions}d")
    up = getattr(nn, f"ConvTranspose{dimensions}d")
    norm = getattr(nn, f"BatchNorm{dimensions}d")
    model = nn.Sequential(
        conv(3, 8, 3, padding=1), norm(8), nn.ReLU(), conv(8, 8, 3, groups=4), norm(8), nn.ReLU(),
        up(8, 4, 2, stride=2), norm(4), nn.LayerNorm((6,) * dimensions),
    )  # fmt: skip
    x = torch.randn(2, 3, *(5,) * dimensions)
    model(x)
    plan = qatkit.plan(model, x)
    assert {layer.path: layer.batch_norm for layer in plan.layers} == {"0": "1", "3": "4", "6": "7"}
    assert not plan.skipped
    before = model.eval()(x)
    qatkit.prepare(model, x)
    qatkit.calibrate(model, [x], progress=False)
    assert 0 < (model(x) - before).abs().mean() < 0.1
