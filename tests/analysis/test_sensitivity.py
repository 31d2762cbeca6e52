"""The sensitivity table against switching by hand, its rules, and what it leaves behind."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qatkit
from qatkit.analysis.parts import parts_of
from qatkit.modes import quantizers
from tests.training.nets import Net, X


class Attention(nn.Module):
    """A matrix product, a residual addition, attention as function and as layer, a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.embed(x)
        x = x + F.scaled_dot_product_attention(self.q(x), self.k(x), x)
        x = x + self.inner(x, x, x)[0]
        x = (x @ x.transpose(1, 2)) @ x
        return {"logits": self.head(x.mean(1)), "count": 3}


SEQUENCES = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(3))
MODELS = {"conv": (Net, X), "attention": (Attention, SEQUENCES)}


def prepared(kind: str, config=None):
    torch.manual_seed(1)
    build, x = MODELS[kind]
    model = build().eval()
    qatkit.prepare(model, x, config)
    qatkit.calibrate(model, [x], progress=False)
    return model, x


def logits(model, x):
    with torch.no_grad():
        result = model(x)
    return (result["logits"] if isinstance(result, dict) else result).double()


def sqnr(wanted, found):
    noise = (wanted - found).square().sum()
    return math.inf if noise == 0 else float(10 * torch.log10(wanted.square().sum() / noise))


def kl(wanted, found):
    p, q = torch.softmax(wanted, 1), torch.softmax(found, 1)
    return float((p * (p / q).log()).sum(1).mean())


@pytest.mark.parametrize("mode", ["leave-one-out", "one-at-a-time"])
@pytest.mark.parametrize("kind", MODELS)
def test_each_row_is_what_switching_by_hand_gives(kind: str, mode: str) -> None:
    model, x = prepared(kind)
    table = qatkit.sensitivity(model, [x[:1], x[1:]], mode=mode, progress=False)
    with qatkit.disable_quantization(model):
        wanted = logits(model, x)
    everything = logits(model, x)
    assert table.quantized.sqnr == pytest.approx(sqnr(wanted, everything), rel=1e-4)
    assert table.quantized.kl == pytest.approx(kl(wanted, everything), rel=1e-3, abs=1e-9)
    assert (table.unquantized.sqnr, table.unquantized.kl) == (math.inf, 0)
    for row in table.rows:
        for quantizer in dict(quantizers(model)).values():
            quantizer.quantize = mode == "leave-one-out"
        for path in row.part.quantizers:
            model.get_submodule(path).quantize = mode == "one-at-a-time"
        found = logits(model, x)
        assert row.quality.sqnr == pytest.approx(sqnr(wanted, found), rel=1e-3), row.name
        assert row.quality.kl == pytest.approx(kl(wanted, found), rel=1e-2, abs=1e-9), row.name


@pytest.mark.parametrize("kind", MODELS)
def test_every_quantizer_is_in_a_part_and_names_are_paths(kind: str) -> None:
    model, _ = prepared(kind)
    parts = parts_of(model, "test")
    covered = {path for part in parts for path in part.quantizers}
    assert covered == {path for path, _ in quantizers(model)}
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    for part in parts:
        assert model.get_submodule(part.name)


def test_a_layer_is_its_weights_and_inputs_together() -> None:
    model, _ = prepared("conv")
    parts = {part.name: part for part in parts_of(model, "test")}
    wanted = {f"layer1.conv2.{name}_quantizer" for name in ("input", "weight")}
    assert set(parts["layer1.conv2"].quantizers) == wanted
    assert parts["layer1.conv2"].weights == ("layer1.conv2.weight_quantizer",)
    layers = {name for name, part in parts.items() if part.kind == "layer"}
    assert layers == {"conv", *(f"layer{i}.conv{j}" for i in (1, 2) for j in (1, 2)), "fc"}
    attention = {part.name: part for part in parts_of(prepared("attention")[0], "test")}
    assert "inner.out_proj.weight_quantizer" in attention["inner"].quantizers
    assert attention["inner"].kind == "layer"
    assert [p for p in attention.values() if len(p.quantizers) == 2 and p.kind == "function"]


@pytest.mark.parametrize("kind", MODELS)
def test_the_rules_keep_exactly_that_in_float(kind: str) -> None:
    model, x = prepared(kind)
    table = qatkit.sensitivity(model, [x], progress=False)
    for count in (0, 1, 2, len(table.rows) - 1):
        fresh = MODELS[kind][0]()
        rules = table.rules(count)
        qatkit.prepare(fresh, x, qatkit.QuantConfig(rules=rules))
        left = {path for path, _ in quantizers(fresh)}
        own = {path for row in table.top(count) for path in row.part.quantizers}
        shared = {
            p for row in table.rows if row not in table.top(count) for p in row.part.quantizers
        }
        assert not left & (own - shared), count
    assert table.rules(0) == ()


class Products(nn.Module):
    """A product with a parameter, one of two activations, and one that reads a layer's input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        y = self.a(x)
        return self.b(F.linear(y, self.w) @ y.transpose(1, 2) @ x)


def test_a_function_leaves_the_quantizer_of_a_layer_to_the_layer() -> None:
    x = torch.randn(2, 8, 8)
    model = qatkit.prepare(Products().eval(), x)
    qatkit.calibrate(model, [x], progress=False)
    parts = {part.name: part for part in parts_of(model, "test")}
    weighted, shares = parts["linear_input_0_quantizer"], parts["matmul_1_input_0_quantizer"]
    assert weighted.weights == ("w_quantizer",)
    assert shares.shared == ("a.input_quantizer",)
    for part in parts.values():
        plan = qatkit.plan(Products(), x, qatkit.QuantConfig(rules=part.rules))
        left = {path for each in plan.quantizers for path in (each.path, *each.aliases)}
        assert not left & (set(part.quantizers) - set(part.shared)), part.name
        for layer in {"a", "b"} - {part.name}:
            assert {f"{layer}.input_quantizer", f"{layer}.weight_quantizer"} <= left, part.name
    losses = qatkit.bit_sensitivity(model, [x], (2, 8), progress=False)
    assert {each.name for each in losses.layers} == {"a", "b", weighted.name}
    found = qatkit.allocate_bits(losses, average_bits=4)
    fresh = qatkit.prepare(Products(), x, found.config())
    assert fresh.w_quantizer.spec.num_bits == found.bits[weighted.name]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    model, x = prepared("conv")
    for stream, progress, shown in [
        (Terminal(), True, True),
        (Terminal(), False, False),
        (io.StringIO(), True, False),
    ]:
        monkeypatch.setattr(sys, "stderr", stream)
        qatkit.sensitivity(model, [x], progress=progress)
        qatkit.bit_sensitivity(model, [x], (4,), progress=progress)
        text = stream.getvalue()
        assert ("sensitivity" in text and "layer" in text) == shown


def test_rules_survive_what_others_take_away() -> None:
    x, rows = MODELS["conv"][1], {part.name: part for part in parts_of(prepared("conv")[0], "test")}
    join = qatkit.Rule("layer1.add_quantizer", enabled=False)  # gone with the layers around it
    for layer in ("layer1.conv1", "layer1.conv2"):
        qatkit.plan(Net(), x, qatkit.QuantConfig(rules=(*rows[layer].rules, join)))
    for name in rows:
        others = tuple(rule for other in rows if other != name for rule in rows[other].rules)
        if rows[name].kind == "layer":
            left = qatkit.plan(Net(), x, qatkit.QuantConfig(rules=others))
            assert f"{name}.weight_quantizer" in {each.path for each in left.quantizers}


def test_ranking_and_top() -> None:
    model, x = prepared(
        "conv", qatkit.QuantConfig(rules=(qatkit.Rule("layer1.conv2", num_bits=2),))
    )
    for mode in ("leave-one-out", "one-at-a-time"):
        for metric in ("sqnr", "kl"):
            table = qatkit.sensitivity(model, [x], mode=mode, metric=metric, progress=False)
            assert table.top(1)[0].name == "layer1.conv2"
            values = [row.sensitivity for row in table.ranking]
            assert values == sorted(values, reverse=True)
    assert table.top(99) == table.ranking
    with pytest.raises(qatkit.QatkitError, match="0 or more"):
        table.top(-1)


def test_a_metric_of_the_user_decides() -> None:
    model, x = prepared("conv", qatkit.QuantConfig(rules=(qatkit.Rule("fc", num_bits=2),)))
    with qatkit.disable_quantization(model):
        target = logits(model, x)
    seen = []

    def closeness(model, batches):
        seen.append(batches)
        return -(logits(model, batches[0][0]) - target).abs().max()

    data = [(x, torch.zeros(4))]
    table = qatkit.sensitivity(model, iter(data), metric=closeness, progress=False)
    assert table.metric == "closeness"
    assert table.unquantized.score == 0
    assert table.top(1)[0].name == "fc"
    assert table.quantized.sqnr is None
    assert torch.equal(seen[0][0][1], torch.zeros(4))
    row = table.top(1)[0]
    assert row.sensitivity == pytest.approx(row.quality.score - table.quantized.score)


def state_of(model):
    return (
        [(p, q.quantize, q.observe, q.spec) for p, q in quantizers(model)],
        [module.training for module in model.modules()],
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        len(model._forward_hooks),
        (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()),
    )


def assert_same_state(before, after) -> None:
    assert before[:2] == after[:2]
    assert before[3] == after[3]
    for name, tensor in before[2].items():
        assert torch.equal(tensor, after[2][name]), name
    assert torch.equal(before[4][0], after[4][0])
    assert before[4][1] == after[4][1]
    assert (before[4][2] == after[4][2]).all()


class Noisy(Net):
    """Draws random numbers in eval mode too."""

    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))


@pytest.mark.parametrize("fails_at", [None, 1, 5])
def test_everything_is_as_before(fails_at) -> None:
    model = Noisy()
    qatkit.prepare(model, X)
    qatkit.calibrate(model, [X], progress=False)
    model.train()
    model.layer1.eval()
    model.fc.input_quantizer.observe = "always"
    qatkit.disable_quantization(model, "layer2.conv1").apply()
    before = state_of(model)
    calls = []

    def score(model, batches):
        assert not any(module.training for module in model.modules())
        calls.append(model(batches[0]).sum().item())
        random.random()
        if len(calls) == fails_at:
            raise RuntimeError("stop")
        return 1.0

    if fails_at:
        with pytest.raises(RuntimeError, match="stop"):
            qatkit.sensitivity(model, [X], metric=score, progress=False)
    else:
        table = qatkit.sensitivity(model, [X], metric=score, progress=False)
        assert "layer2.conv1" not in [row.name for row in table.rows]
        assert qatkit.sensitivity(model, [X], progress=False).unquantized.sqnr == math.inf
        with pytest.raises(qatkit.QatkitError, match="does not run on batch 0"):
            qatkit.sensitivity(model, [X[:, :1]], progress=False)
        table = qatkit.bit_sensitivity(model, [X], (2, 4), activations=True, progress=False)
        assert len(table.layers) == 5
    assert_same_state(before, state_of(model))


class Detector(nn.Module):
    """Returns as many boxes as score above a threshold."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)

    def forward(self, x):
        boxes = self.body(x)
        return [{"boxes": boxes[boxes[:, 0] > boxes[:, 0].median() + self.shift()]}]

    def shift(self):
        return float("inf") if not self.body.weight_quantizer.quantize else 0.0


def test_outputs_that_cannot_be_compared() -> None:
    model, x = Detector(), torch.randn(9, 4)
    model.body = qatkit.nn.QuantLinear(4, 6)
    model.train()
    model(x)
    with pytest.raises(qatkit.QatkitError, match=r"shapes.*give metric=a function"):
        qatkit.sensitivity(model, [x], progress=False)


def test_illegal_input() -> None:
    model, x = prepared("conv")
    fresh = qatkit.prepare(Net(), x)
    nan = torch.full_like(x, math.nan)
    for call, message in [
        (lambda: qatkit.sensitivity(Net(), [x]), "has no quantizers"),
        (lambda: qatkit.sensitivity(fresh, [x]), "has no range"),
        (lambda: qatkit.sensitivity(model, []), "no batches"),
        (lambda: qatkit.sensitivity(model, x), "iterable of batches"),
        (lambda: qatkit.sensitivity(model, [x], mode="loo"), "unknown mode"),
        (lambda: qatkit.sensitivity(model, [x], metric="psnr"), "metric='psnr'"),
        (lambda: qatkit.sensitivity(model, [x], metric=lambda *_: "good"), "one number"),
        (lambda: qatkit.sensitivity(model, [x], metric="kl", class_axis=7), "class_axis=7"),
        (lambda: qatkit.sensitivity(model, [x], batches=0), "positive integer"),
        (lambda: qatkit.sensitivity(model, [nan]), "NaN or Inf for batch 0"),
    ]:
        with pytest.raises(qatkit.QatkitError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_the_table_is_data() -> None:
    model, x = prepared("conv")
    table = qatkit.sensitivity(model, [x], progress=False)
    plain = table.to_dict()
    assert json.loads(json.dumps(plain))["rows"][0]["name"] == table.rows[0].name
    assert len(plain["rows"]) == len(table.rows)
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.mode = "other"  # type: ignore[misc]
    text = str(table)
    assert all(row.name in text for row in table.rows)
    assert text.index(table.ranking[0].name) < text.index("all in float")
    assert copy.deepcopy(table) == table


def test_a_model_prepared_in_eval_mode_stays_in_it() -> None:
    model, _ = prepared("attention")
    assert not any(module.training for module in model.modules())


def test_module_names_with_signs_of_globs() -> None:
    from qatkit.analysis.parts import literal

    assert qatkit.config.matches(literal("a[0]*?"), "a[0]*?.weight_quantizer")
    assert not qatkit.config.matches(literal("a[0]*?"), "a0bc")
