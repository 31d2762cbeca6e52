"""Training with the short way of the common quantizers is training with the general one."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qatkit
from qatkit.quantizer import TensorQuantizer

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolutions with both ReLUs, some of whose results have more than one reader."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding=1, bias=False)
        self.norm, self.relu = nn.BatchNorm2d(8), nn.ReLU()
        self.point = nn.Conv2d(8, 8, 1)
        self.both = nn.ReLU()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.relu(self.norm(self.depthwise(x)))
        y = self.both(self.point(x))
        return self.head((y + torch.sigmoid(y)).mean((2, 3)))


def prepared() -> nn.Module:
    """Return the same prepared network each time."""
    torch.manual_seed(0)
    return qatkit.prepare(Net(), X)


def plain(model: nn.Module) -> nn.Module:
    """Let every quantizer take the general way."""
    for module in model.modules():
        if isinstance(module, TensorQuantizer):
            module._is_plain = lambda x: False  # type: ignore[method-assign]
    return model


def train(model: nn.Module, steps: int = 4) -> dict[str, Tensor]:
    """Return the state after some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return dict(model.state_dict())


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Tell whether two states are the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_training_is_the_same() -> None:
    assert equal(train(prepared()), train(plain(prepared())))


def test_training_with_frozen_ranges_is_the_same() -> None:
    models = prepared(), plain(prepared())
    for model in models:
        train(model, 2)
        qatkit.freeze_ranges(model).apply()
    assert equal(train(models[0]), train(models[1]))


def test_copies_work_by_themselves() -> None:
    model = prepared()
    train(model, 2)
    twin, other = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    expected = train(plain(copy.deepcopy(model)))
    assert equal(train(twin), expected)
    assert equal(train(other), expected)


def test_a_weight_that_changes_in_between_is_quantized_again() -> None:
    model = prepared()
    reference = plain(copy.deepcopy(model))

    def double(layer: nn.Module, _: object) -> None:
        with torch.no_grad():
            layer.weight.mul_(2)

    for each in (model, reference):
        each.point.register_forward_pre_hook(double)
    model.train()
    assert torch.equal(model(X), reference(X))


def test_a_quantizer_that_is_switched_in_between_counts() -> None:
    model = prepared()
    reference = plain(copy.deepcopy(model))
    for each in (model, reference):
        each.stem.register_forward_hook(
            lambda *_, each=each: each.point.weight_quantizer.__setattr__("quantize", False)
        )
    assert torch.equal(model(X), reference(X))


def test_part_of_a_model_by_itself() -> None:
    model, reference = prepared(), plain(prepared())
    for each in (model, reference):
        train(each, 1)
    x = torch.rand(2, 8, 5, 5)
    assert torch.equal(model.depthwise(x), reference.depthwise(x))
    assert torch.equal(model.stem(X), reference.stem(X))


def test_a_weight_that_a_hook_changes_unseen_by_autograd() -> None:
    model, reference = prepared(), plain(prepared())

    def clip(layer: nn.Module, _: object) -> None:
        layer.weight.data.clamp_(-0.05, 0.05)

    for each in (model, reference):
        each.point.register_forward_pre_hook(clip)
    assert equal(train(model), train(reference))


def test_a_weight_whose_data_are_replaced_in_a_forward() -> None:
    class Normed(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.point.weight.data = torch.renorm(self.point.weight.data, 2, 0, 0.1)
            return super().forward(x)

    results = []
    for change in (lambda model: model, plain):
        torch.manual_seed(0)
        results.append(train(change(qatkit.prepare(Normed(), X))))
    assert equal(*results)


def test_a_layer_that_is_replaced_is_let_go() -> None:
    model = prepared()
    train(model, 1)
    old = weakref.ref(model.head)
    model.head = nn.Linear(8, 2)
    model(X).sum().backward()
    gc.collect()
    assert old() is None


def test_a_layer_that_is_skipped_remembers_nothing() -> None:
    class Skipping(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.stem(x)

    torch.manual_seed(0)
    model = qatkit.prepare(Net(), X)
    model.forward = Skipping.forward.__get__(model)
    model(X).sum().backward()
    assert model.stem[0].weight_quantizer.num_batches == 1
    assert model.point.weight_quantizer.num_batches == 0
    copy.deepcopy(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    results = []
    for model in (prepared(), plain(prepared())):
        stem, rest = model.stem, nn.Sequential(model.depthwise, model.norm, model.relu, model.point)
        x = X.clone().requires_grad_()
        y = checkpoint(rest, checkpoint(stem, x, use_reentrant=reentrant), use_reentrant=reentrant)
        y.square().mean().backward()
        results.append((y.detach(), x.grad, model.point.weight.grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_part_of_a_forward_in_a_checkpoint() -> None:
    class Checkpointing(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.norm(self.depthwise(checkpoint(self.stem, x, use_reentrant=False))))
            y = self.both(checkpoint(self.point, x, use_reentrant=True))
            return self.head((y + torch.sigmoid(y)).mean((2, 3)))

    results = []
    for change in (lambda model: model, plain):
        model = prepared()
        model.forward = Checkpointing.forward.__get__(model)
        results.append(train(change(model)))
    assert equal(*results)


def test_an_error_in_a_forward_leaves_a_model_that_works() -> None:
    model = prepared()
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 5, 12, 12))
    assert equal(train(copy.deepcopy(model)), train(plain(model)))
