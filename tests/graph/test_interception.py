"""Blocks that no graph can hold run as they are, and their products get quantized operands."""

from __future__ import annotations

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qatkit
from qatkit import QatkitError, Rule
from qatkit.graph.interception import InterceptedBlock
from qatkit.modes import quantizers

X = torch.linspace(-2, 2, 2 * 10 * 16).sin().reshape(2, 10, 16)


class Attention(nn.Module):
    """Branches on a size, keeps an attribute and opens a context: nothing for a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mix = nn.Parameter(torch.eye(16))
        self.seen = None

    def forward(self, x):
        if x.shape[1] > 100:
            x = x[:, :100]
        self.seen = x.shape
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(1, 2) / math.sqrt(16)
        with torch.no_grad():
            near = torch.einsum("bic,bjc->bij", q, k)
        return self.out(F.linear(torch.matmul((scores + near).softmax(-1), v), self.mix))


class Own(nn.Conv2d):
    """Pads as much as the size of its input wants."""

    def forward(self, x):
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1, 0, 1))
        return F.conv2d(x, self.weight, self.bias, self.stride)


class Helper(nn.Module):
    """Computes in a method that the model calls, not in its forward."""

    def correlate(self, a, b):
        if a.shape != b.shape:
            raise ValueError("shapes")
        return torch.bmm(a, b.transpose(1, 2))


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.helper = nn.Linear(16, 16), Helper()
        self.inner = Attention()

    def forward(self, x):
        y = self.inner(self.first(x))
        if y.mean() > 1e9:
            return y
        return self.helper.correlate(y, x)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), Attention(), nn.Linear(16, 16))


@pytest.fixture
def model():
    model = net()
    qatkit.prepare(model, X)
    qatkit.calibrate(model, [X], progress=False)
    return model.eval()


PATHS = {
    "1.matmul_input_0_quantizer",
    "1.matmul_input_1_quantizer",
    "1.einsum.left_quantizer",
    "1.einsum.right_quantizer",
    "1.matmul_1_input_0_quantizer",
    "1.matmul_1_input_1_quantizer",
    "1.linear_input_0_quantizer",
    "1.mix_quantizer",
}


def test_every_product_is_quantized(model):
    assert isinstance(model[1], InterceptedBlock)
    assert isinstance(model[1], Attention)
    paths = {path for path, _ in quantizers(model)}
    assert paths >= PATHS
    assert all(quantizer.calibrated for path, quantizer in quantizers(model) if path in PATHS)
    plain = net().eval()
    with qatkit.disable_quantization(model):
        assert torch.equal(model(X), plain(X))
    assert 0 < (model(X) - plain(X)).abs().max() < 0.1 * plain(X).abs().max()


def test_a_product_sees_its_operands_on_the_grid(model):
    seen = []
    original = torch.matmul

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is original:
                seen.append(args)
            return func(*args, **(kwargs or {}))

    with Spy():
        model(X)
    weights = model[1].matmul_1_input_0_quantizer
    codes = seen[-1][0] / weights.scale
    assert torch.allclose(codes, codes.round(), atol=1e-3)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(model, copied):
    twin = copied(model)
    assert torch.equal(twin(X), model(X))
    assert isinstance(twin[1], InterceptedBlock)
    twin[1].matmul_input_0_quantizer.set_range(-1e-3, 1e-3)
    assert not torch.equal(twin(X), model(X))
    assert twin[1]._qatkit_depth is not model[1]._qatkit_depth


def test_checkpoint(model, tmp_path):
    qatkit.save(model, tmp_path / "model.qatkit")
    twin = qatkit.load(net(), tmp_path / "model.qatkit").eval()
    assert torch.equal(twin(X), model(X))


def test_training_observes_and_learns(model):
    before = model[1].matmul_input_0_quantizer.max_val.clone()
    model.train()(10 * X).square().mean().backward()
    assert model[1].matmul_input_0_quantizer.max_val > before
    assert model[1].mix.grad.abs().sum() > 0
    assert model[1].seen == X.shape


def test_compiles_whole(model):
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(X), model(X), atol=1e-6)


@pytest.mark.parametrize("front_end", ["legacy", "dynamo"])
def test_exports(model, tmp_path, front_end):
    path = tmp_path / "model.onnx"
    report = qatkit.export_onnx(model, X, path, front_end=front_end)
    assert report.verify.ok
    assert not [one for one in qatkit.lint_onnx(path) if one.level != "INFO"]


def test_functions_of_children_are_not_its_own():
    model = Outer()
    plan = qatkit.plan(model, X)
    assert {one.path for one in plan.interceptions} == {"", "inner"}
    plain = copy.deepcopy(model).eval()
    qatkit.prepare(model, X)
    qatkit.calibrate(model, [X], progress=False)
    assert model.bmm_input_0_quantizer.calibrated
    model.eval()
    with qatkit.disable_quantization(model):
        assert torch.equal(model(X), plain(X))


def test_an_error_in_a_child_leaves_no_trace(model):
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 10, 15))
    expected = model(X)

    def fail(module, args):
        raise KeyError("no")

    handle = model[1].out.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        model(X)
    handle.remove()
    assert torch.equal(model(X), expected)


def test_a_subclass_with_a_forward_of_its_own():
    image = torch.linspace(-1, 1, 3 * 81).reshape(1, 3, 9, 9)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Own(8, 8, 3))
    qatkit.prepare(model, image)
    paths = {path for path, _ in quantizers(model)}
    assert {"1.weight_quantizer", "1.conv2d_input_0_quantizer"} <= paths
    assert model[1].weight_quantizer.spec.axis == 0


def test_a_rule_leaves_it_in_float():
    config = qatkit.QuantConfig(rules=(Rule("1.matmul*", enabled=False),))
    model = qatkit.prepare(net(), X, config)
    paths = {path for path, _ in quantizers(model)}
    assert not any("matmul" in path for path in paths)
    assert "1.einsum.left_quantizer" in paths


class Several(nn.Module):
    """Multiplies once more where the sequence is long."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(16, 16)

    def forward(self, x):
        y = self.f(x)
        if x.shape[1] > 10:
            y = y @ torch.eye(16)
        return y @ y.transpose(1, 2)


def test_another_number_of_products_is_an_error():
    model = qatkit.prepare(nn.Sequential(Several()), X)
    qatkit.calibrate(model, [X], progress=False)
    with pytest.raises(
        QatkitError, match=r"^0: its forward calls matmul 2 times.*Rule\('0.matmul\*'"
    ):
        model(torch.randn(2, 12, 16))


class Loop(nn.Module):
    """Shares one block between calls with different numbers of products."""

    def __init__(self):
        super().__init__()
        self.block = Several()

    def forward(self, x):
        return self.block(x).sum() + self.block(torch.cat((x, x), 1)).sum()


def test_calls_that_cannot_be_counted_stay_float():
    plan = qatkit.plan(Loop(), X)
    assert plan.interceptions == ()
    assert any("block.matmul" in skip.path for skip in plan.skipped)


def test_inference_mode(model):
    expected = model(X)
    with torch.inference_mode():
        assert torch.equal(model(X), expected)


def test_threads(model):
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        expected = model(X)
        results = list(pool.map(lambda _: torch.equal(model(X), expected), range(40)))
    assert all(results)
