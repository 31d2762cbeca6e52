"""A rewritten block does what its forward did; one that a graph cannot hold is not rewritten."""

from __future__ import annotations

import copy
import random
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qatkit
from qatkit.graph.rewrite import RewrittenBlock

X = torch.linspace(-2, 2, 2 * 4 * 6 * 6).reshape(2, 4, 6, 6)


class Block(nn.Module):
    """A residual join behind two convolutions, with something odd in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(4, 4, 3, padding=1)
        self.c2 = nn.Conv2d(4, 4, 3, padding=1)
        self.p, self.flag, self.feature = 0.0, True, None
        self.register_buffer("steps", torch.zeros(()))

    def join(self, x):
        x = self.c1(x)
        return self.c2(x) + x

    def forward(self, x):
        return self.join(x)


class Stash(Block):
    def forward(self, x):
        self.feature = x
        return self.join(x)


class Counts(Block):
    def forward(self, x):
        self.steps += 1
        return self.join(x)


class NoGrad(Block):
    def forward(self, x):
        with torch.no_grad():
            x = self.c1(x)
        return self.c2(x) + x


class Autocast(Block):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.join(x)


class Draws(Block):
    def forward(self, x):
        return x if random.random() < 0 else self.join(x)


class MakesTensor(Block):
    def forward(self, x):
        return self.join(x * torch.tensor(2.0))


class Dropout(Block):
    def forward(self, x):
        return F.dropout(self.join(x), self.p, self.training)


UNFIT = {
    Stash: "writes its attribute 'feature'",
    Counts: "writes its attribute 'steps'",
    NoGrad: "no_grad or autocast",
    Autocast: "no_grad or autocast",
    Draws: "random numbers",
    MakesTensor: "a tensor of numbers",
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_a_graph_cannot_hold_keeps_its_forward(kind):
    model = kind().eval()
    expected = copy.deepcopy(model)(X)
    plan = qatkit.plan(model, X)
    assert plan.blocks == ()
    assert any(UNFIT[kind] in skip.reason for skip in plan.skipped)
    qatkit.prepare(model, X)
    assert model.steps == 0
    assert model.feature is None
    with qatkit.disable_quantization(model):
        assert torch.equal(model(X), expected)


def test_a_plain_block_is_rewritten():
    assert isinstance(qatkit.prepare(Block(), X), RewrittenBlock)


def test_settings_that_change_later_are_followed():
    model = qatkit.prepare(Dropout(), X).train()
    assert isinstance(model, RewrittenBlock)
    with qatkit.disable_quantization(model):
        assert not (model(X) == 0).any()
        model.p = 0.9
        assert (model(X) == 0).float().mean() > 0.5
        twin = copy.deepcopy(model)
        twin.p = 0.0
        assert not (twin(X) == 0).any()
        assert (model(X) == 0).any()


class WritesView(Block):
    def forward(self, x):
        x = x.clone()
        a = self.c1(x)
        x[:, :2].mul_(3.0)
        return a, self.c2(x)


class Assigns(Block):
    def forward(self, x):
        x = x.clone()
        a = self.c1(x)
        x[:, :2] = 0
        return a, self.c2(x)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        x += self.c(x)
        return x


class Caller(nn.Module):
    """Reads its tensor again after a block has written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.c1 = InPlace(), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        x = x.clone()
        self.i(x)
        return (self.c1(x),)


@pytest.mark.parametrize("kind", [WritesView, Assigns, Caller])
def test_writes_in_place_are_seen(kind):
    model = kind().eval()
    with torch.no_grad():
        expected = copy.deepcopy(model)(X)
    qatkit.prepare(model, X)
    qatkit.calibrate(model, [X], progress=False)
    with torch.no_grad():
        found = model(X)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < 0.05 * b.norm()


def test_an_in_place_add_in_a_sequential_is_quantized():
    model = qatkit.prepare(nn.Sequential(nn.Conv2d(4, 4, 1), InPlace(), nn.Conv2d(4, 2, 1)), X)
    assert isinstance(model[1], RewrittenBlock)


def test_arguments_by_position_by_keyword_and_by_default_are_the_same():
    class Options(Block):
        def forward(self, x, flag=False, scale=None):
            return self.join(x) if not flag else self.join(x) + 1

    model = qatkit.prepare(Options(), X).eval()
    qatkit.calibrate(model, [X], progress=False)
    expected = model(X)
    assert torch.equal(model(x=X), expected)
    assert torch.equal(model(X, False, scale=None), expected)
    assert torch.equal(model(X, scale=X), expected)  # another form, the same operations
    with pytest.raises(qatkit.QatkitError, match="another form"):
        model(X, True)


def test_hooks_between_layer_and_norm_keep_the_norm(tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model[0].register_forward_hook(lambda module, given, result: result * 2)
    model.eval()
    plan = qatkit.plan(model, X)
    assert plan.layers[0].batch_norm is None
    qatkit.prepare(model, X)
    qatkit.calibrate(model, [X], progress=False)
    assert qatkit.export_onnx(model, X, tmp_path / "a.onnx", lint=False).verify.ok


def test_a_layer_alone_is_a_model():
    model = qatkit.prepare(nn.Linear(4, 2), torch.zeros(1, 4))
    assert [entry.path for entry in qatkit.plan(model, X).quantizers] == [
        "input_quantizer",
        "weight_quantizer",
    ]


def test_the_axis_of_a_rule_is_taken_literally():
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 2))
    rule = qatkit.Rule("0", weight=qatkit.QuantSpec(axis=1, observer="minmax"))
    plan = qatkit.plan(net, X, qatkit.QuantConfig(rules=(rule,)))
    assert plan.quantizers[1].spec.axis == 1


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(n, 4, 1) for n in (4, 4, 8))

    def forward(self, x):
        y = self.a(x)
        return self.c(torch.cat([y, 10 * x], 1)) + self.b(y)


def test_batch_memory_keeps_one_scale_in_a_group():
    activation = qatkit.QuantSpec(memory="batch")
    model = qatkit.prepare(Concat(), X, qatkit.QuantConfig(activation=activation)).train()
    assert model.b.input_quantizer.peers == (model.c.input_quantizer,)
    model(X)
    model(X)
    assert model.b.input_quantizer.scale == model.c.input_quantizer.scale


def test_a_fixed_range_stays_out_of_groups():
    fixed = qatkit.QuantSpec(observer="fixed", fixed_range=(-1.0, 1.0))
    config = qatkit.QuantConfig(rules=(qatkit.Rule("b", activation=fixed),))
    model = qatkit.prepare(Concat(), X, config)
    assert model.b.input_quantizer.peers == ()


@pytest.mark.parametrize("data", [torch.zeros(0, 4, 6, 6), torch.full((1, 4, 6, 6), float("nan"))])
def test_no_data_is_no_calibration(data):
    model = qatkit.prepare(nn.Sequential(nn.Conv2d(4, 4, 1)), X)
    report = qatkit.calibrate(model, [data], progress=False)
    assert report.unreached == ("0.input_quantizer",)
    assert not model[0].input_quantizer.calibrated


def test_a_plan_that_fails_leaves_nothing_behind(monkeypatch):
    model = Block()
    before = {name: set(module.__dict__) for name, module in model.named_modules()}

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["qatkit.prepare"], "rewrite", fail)
    with pytest.raises(KeyboardInterrupt):
        qatkit.prepare(model, X)
    assert type(model) is Block
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
