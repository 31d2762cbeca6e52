"""Weights and activations that are quantized ahead change nothing but the time."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qatkit
from qatkit.nn.fused_activation import FusedActivation
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
    """Undo what works ahead."""
    for module in model.modules():
        if isinstance(module, FusedActivation):
            module.__class__ = type(module).__mro__[2]  # the float class
        if isinstance(module, TensorQuantizer):
            module.is_plain_weight = lambda x: False  # type: ignore[method-assign]
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


def fused(model: nn.Module) -> list[str]:
    """Return the paths of the fused activations."""
    return [path for path, m in model.named_modules() if isinstance(m, FusedActivation)]


def test_only_activations_with_one_reader_are_fused() -> None:
    assert fused(prepared()) == ["stem.2", "relu"]


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


@pytest.mark.parametrize("where", ["stem", "stem.2", "relu"])
def test_a_hook_sees_the_activation_itself(where: str) -> None:
    model, seen = prepared(), []
    model.get_submodule(where).register_forward_hook(lambda *call: seen.append(call[2].detach()))
    model(X)
    reference = plain(prepared())
    reference.get_submodule(where).register_forward_hook(
        lambda *call: seen.append(call[2].detach())
    )
    reference(X)
    assert torch.equal(seen[0], seen[1])


def test_part_of_a_model_by_itself() -> None:
    model, reference = prepared(), plain(prepared())
    for each in (model, reference):
        train(each, 1)
    x = torch.rand(2, 8, 5, 5)
    assert torch.equal(model.depthwise(x), reference.depthwise(x))
    assert torch.equal(model.stem(X), qatkit_stem(reference, model))


def qatkit_stem(reference: nn.Module, model: nn.Module) -> Tensor:
    """Return what the stem gives on the grid of its reader, as a fused one does in training."""
    quantizer = copy.deepcopy(reference.depthwise.input_quantizer)
    return quantizer(reference.stem(X))


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


def test_nothing_is_kept_after_a_forward() -> None:
    model = prepared()
    model(X)
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 5, 12, 12))
    quantizers = [m for m in model.modules() if isinstance(m, TensorQuantizer)]
    assert all(quantizer._ahead is None for quantizer in quantizers)


def test_a_plan_from_json_fuses_the_same() -> None:
    plan = qatkit.plan(Net(), X)
    again = type(plan).from_dict(plan.to_dict())
    assert again == plan
    assert [each.path for each in again.fused] == ["stem.2", "relu"]
