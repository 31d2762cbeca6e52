"""A gradient is changed in place only where nobody can see it."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qatkit.kernels.cpu.sharing import is_unshared

KEPT: list[Tensor] = []


class Asking(torch.autograd.Function):
    """Notes the answer, and spoils the gradient where the answer allows it."""

    answers: ClassVar[list[bool]] = []

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Asking.answers.append(is_unshared(grad))
        if Asking.answers[-1]:
            grad.zero_()
        return grad


def ask(x: Tensor) -> Tensor:
    return Asking.apply(x)


class Keeping(torch.autograd.Function):
    """Returns a gradient that it holds itself."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        KEPT.append(torch.ones_like(grad))
        return KEPT[-1]


@pytest.fixture
def x() -> Tensor:
    Asking.answers.clear()
    KEPT.clear()
    torch.manual_seed(0)
    return torch.randn(2, 3, 4, 4, requires_grad=True)


@pytest.fixture
def conv() -> nn.Module:
    return nn.Conv2d(3, 3, 1)


def test_one_reader(x, conv):
    conv(ask(x)).sum().backward()
    assert Asking.answers == [True]


def test_two_readers(x, conv):
    y = ask(x)
    (conv(y) + conv(y)).sum().backward()
    assert Asking.answers == [True]


def test_two_branches_of_a_sum(x):
    y, z = ask(x), x * 1.0
    z.retain_grad()
    ((y + z) * 2).sum().backward()
    assert bool((z.grad == 2).all())


def test_two_branches_that_both_ask(x):
    ((ask(x) + ask(x)) * 2).sum().backward()
    assert True not in Asking.answers


def test_the_gradient_that_was_passed_in(x):
    grad = torch.ones_like(x)
    ask(x).backward(grad)
    assert Asking.answers == [False]
    assert bool((grad == 1).all())


def test_a_gradient_that_is_asked_for(x, conv):
    y = ask(x)
    of_y, _ = torch.autograd.grad(conv(y).sum(), [y, x])
    assert Asking.answers == [False]
    assert bool(of_y.any())


def test_a_gradient_that_is_retained(x, conv):
    y = ask(x)
    y.retain_grad()
    conv(y).sum().backward()
    assert bool(y.grad.any())


@pytest.mark.parametrize("alias", [lambda g: g, Tensor.detach, lambda g: g[0], Tensor.numpy])
def test_a_gradient_that_a_hook_keeps(x, conv, alias):
    y = ask(x)
    y.register_hook(lambda grad: KEPT.append(alias(grad)))
    conv(y).sum().backward()
    assert Asking.answers == [False]
    assert KEPT[0].any()


def test_a_gradient_that_a_hook_of_the_module_keeps(x, conv):
    conv.register_full_backward_hook(lambda module, into, out: KEPT.append(into[0]))
    conv(ask(x)).sum().backward()
    assert bool(KEPT[0].any())


def test_a_gradient_that_the_node_before_keeps(x):
    Keeping.apply(ask(x)).sum().backward()
    assert Asking.answers == [False]
    assert bool((KEPT[0] == 1).all())


def test_views_and_expanded_gradients(x):
    functional.linear(ask(x).flatten(1), torch.randn(5, 48)).sum().backward()
    ask(x).sum().backward()
    assert Asking.answers == [False, False]


def test_a_gradient_that_is_differentiated(x, conv):
    torch.autograd.grad(conv(ask(x)).square().sum(), x, create_graph=True)
    assert Asking.answers == [False]


def test_twice_through_the_same_graph(x, conv):
    loss = conv(ask(x)).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert Asking.answers == [True, True]
