"""An activation and its reader in one pass: the same bits, and nobody sees anything else."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import qatkit
from qatkit.kernels.cpu.compiled import compiled_loops
from qatkit.kernels.cpu.gradients import SMALL
from qatkit.nn import links
from qatkit.nn.sequential import Sequential

pytestmark = pytest.mark.skipif(compiled_loops() is None, reason="Numba is not installed")

SIZES = {"small": 9, "large": 71}
assert 2 * 16 * SIZES["small"] ** 2 <= SMALL < 2 * 32 * SIZES["large"] ** 2


@pytest.fixture(params=SIZES)
def x(request: pytest.FixtureRequest) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, *2 * (SIZES[request.param],), generator=generator)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Block(nn.Module):
    """A join, which makes qatkit write the forward, and both kinds of ReLU as functions."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace)
        self.conv3 = nn.Conv2d(32, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)), inplace=self.relu.inplace)
        return torch.relu(self.conv3(y) + x)


def layer(inputs: int, outputs: int, activation: nn.Module) -> nn.Sequential:
    norm = nn.BatchNorm2d(outputs)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), norm, activation)


def net(inplace: bool = True) -> nn.Module:
    """Return a network with links in Sequentials, across them, and in a block."""
    return nn.Sequential(
        layer(3, 32, nn.ReLU6(inplace)),
        nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.ReLU()),
        nn.Sequential(layer(32, 32, nn.Hardtanh(-0.5, 1.5)), nn.Conv2d(32, 32, 1)),
        Block(inplace),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.ReLU(),
        nn.Linear(16, 5),
    )


def prepared(x: Tensor, make: Callable[[], nn.Module] = net) -> nn.Module:
    torch.manual_seed(0)
    model = qatkit.prepare(make(), x)
    qatkit.calibrate(model, [x], progress=False)
    return model.train()


class Counting:
    """Counts the links that were one pass, and can keep them from being so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.allowed, self._original = 0, True, links._on_grid_of
        monkeypatch.setattr(links, "_on_grid_of", self)

    def __call__(self, *args: object) -> Tensor | None:
        y = self._original(*args) if self.allowed else None
        self.count += y is not None
        return y


@pytest.fixture
def linked(monkeypatch: pytest.MonkeyPatch) -> Counting:
    return Counting(monkeypatch)


def train(model: nn.Module, x: Tensor, steps: int = 4) -> list[Tensor]:
    """Return outputs, gradients and the state after some steps, the last ones frozen."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    found = []
    for step in range(steps):
        if step == steps // 2:
            qatkit.freeze_ranges(model).apply()
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = model(leaf)
        optimizer.zero_grad()
        y.square().mean().backward()
        optimizer.step()
        found += [y.detach(), leaf.grad]
    model.eval()
    with torch.no_grad():
        found.append(model(x))
    return [*found, *(each.clone() for each in model.state_dict().values())]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_training_is_the_same(x, layout, linked, threads):
    x = x.to(memory_format=layout)
    fast = train(prepared(x).to(memory_format=layout), x)
    assert linked.count == 6 * 5  # in four steps and in eval
    linked.allowed = False
    assert same(fast, train(prepared(x).to(memory_format=layout), x))
    assert linked.count == 6 * 5


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vgg11_bn", "densenet121"])
def test_torchvision(name, linked):
    models = pytest.importorskip("torchvision").models
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def make() -> nn.Module:
        return models.get_model(name, num_classes=5)

    fast = train(prepared(x, make), x, steps=2)
    assert linked.count >= 3 * 3
    linked.allowed = False
    assert same(fast, train(prepared(x, make), x, steps=2))


def test_odd_numbers_are_left_to_the_modules(linked):
    x = torch.randn(2, 3, *2 * (SIZES["large"],))
    for odd in (math.nan, math.inf):
        results = []
        for linked.allowed in (True, False):
            model = prepared(x)
            broken = x.clone()
            broken[0, 0, 0, 0] = odd
            y = model(broken)
            y.nan_to_num(1.0).sum().backward()
            gradients = [p.grad.nan_to_num(1.0) for p in model.parameters() if p.grad is not None]
            results.append([y, *gradients, *model.state_dict().values()])
        assert same(*([each.nan_to_num(1.0) for each in one] for one in results))


MODULES = ["0.1", "0.2", "1.0", "1.0.input_quantizer", "3.bn1", "3.relu", "3.conv2", "0", "2.0"]


@pytest.mark.parametrize("path", MODULES)
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_hook_sees_what_the_module_gets_and_returns(path, kind, x, linked):
    seen = []
    for linked.allowed in (True, False):
        model, found = prepared(x, partial(net, inplace="backward" not in kind)), []

        def note(module, *values, found=found):
            tensors = tree_leaves(values)
            found += [each.detach().clone() for each in tensors if isinstance(each, Tensor)]

        getattr(model.get_submodule(path), f"register_{kind}_hook")(note)
        model(x.clone().requires_grad_()).square().sum().backward()
        seen.append(found)
    assert same(*seen)
    assert seen[0]
    assert 0 < linked.count < 6


def test_a_hook_on_all_modules(x, linked):
    model, found = prepared(x), []
    handle = register_module_forward_hook(lambda module, *_: found.append(type(module)))
    try:
        model(x)
    finally:
        handle.remove()
    assert linked.count == 0
    assert found.count(nn.ReLU6) == 1
    assert found.count(nn.Hardtanh) == 1


def test_a_mode_sees_each_function(x, linked):
    class Names(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.names.append(function.__name__)
            return function(*args, **kwargs or {})

    model = prepared(x)
    with Names() as seen:
        model(x)
    assert linked.count == 0
    assert seen.names.count("relu") + seen.names.count("relu_") >= 3


def test_a_forward_that_was_replaced(x, linked):
    model = prepared(x)
    calls: list[int] = []
    relu = model[0][2]
    relu.forward = lambda y: (calls.append(1), functional.relu6(y))[1]
    model(x)
    assert calls == [1]
    assert linked.count == 5


def test_part_of_a_chain(x, linked):
    model, reference = prepared(x), prepared(x)
    stem, activated = model[0], model[:2]
    linked.allowed = False
    expected = reference[0](x), reference[:2](x)
    linked.allowed = True
    assert torch.equal(stem(x), expected[0])
    assert torch.equal(activated(x), expected[1])
    assert linked.count == 1  # in model[:2], between its parts
    assert float(expected[0].detach().max()) > 0.1


def test_copies_and_pickles(x, linked):
    model = prepared(x)
    expected = train(copy.deepcopy(model), x)
    assert same(train(pickle.loads(pickle.dumps(model)), x), expected)
    assert isinstance(model, Sequential)
    assert repr(model).startswith("Sequential(")
    fresh = net()
    assert fresh.state_dict().keys() <= model.state_dict().keys()


def test_saved_for_the_backward(linked):
    x = torch.randn(2, 3, *2 * (SIZES["large"],))
    sizes = []
    for linked.allowed in (True, False):
        model, storages = prepared(x), {}

        def pack(tensor: Tensor, storages=storages) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        qatkit.freeze_ranges(model).apply()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept = model(x)
        sizes.append(sum(storages.values()))
        del kept
    activation = 4 * 2 * 32 * SIZES["large"] ** 2
    assert sizes[0] <= sizes[1] - 5 * activation * (1 - 1 / 16)


def test_second_derivatives_and_several_gradients_at_once(x, linked):
    results = []
    for linked.allowed in (True, False):
        model = prepared(x)
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        (first,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf, retain_graph=True)
        vectors = torch.stack([torch.ones_like(y), torch.randn(y.shape)])
        torch.manual_seed(0)
        (many,) = torch.autograd.grad(y, leaf, torch.ones_like(vectors), is_grads_batched=True)
        results.append([first.detach(), second, many])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_backward_that_runs_twice(x, linked):
    model = prepared(x)
    leaf = x.clone().requires_grad_()
    loss = model(leaf).square().sum()
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert torch.equal(first, torch.autograd.grad(loss, leaf)[0])
    assert linked.count == 6


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_checkpointing(reentrant, frozen, x, linked):
    results = []
    for linked.allowed in (True, False):
        model = prepared(x)
        if frozen:
            qatkit.freeze_ranges(model).apply()
        leaf = x.clone().requires_grad_()
        y = checkpoint(model[:4], leaf, use_reentrant=reentrant)
        y.square().mean().backward()
        gradients = [each.grad for each in model[:4].parameters() if each.grad is not None]
        ranges = [each for name, each in model.state_dict().items() if "_val" in name]
        results.append([y.detach(), leaf.grad, *gradients, *ranges])
    assert same(*results)


def test_what_reads_twice_is_no_link(linked):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(True)
            self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x))
            z = self.relu(y)
            return self.left(z) + torch.sigmoid(z)

    x = torch.randn(2, 3, 8, 8)
    fast = train(prepared(x, Twice), x)
    assert linked.count == 0
    assert len(fast) > 0


def test_fx_and_compile_see_plain_modules(linked):
    x = torch.randn(2, 3, 9, 9)
    model = prepared(x, lambda: nn.Sequential(layer(3, 4, nn.ReLU()), nn.Conv2d(4, 4, 1))).eval()
    expected = model(x)
    assert linked.count == 1
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    assert linked.count == 1
