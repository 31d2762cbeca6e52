"""Prepared models under those who want to see every operator: tracers and transforms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import qatkit

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model = qatkit.prepare(net, X)
    qatkit.calibrate(model, [X], progress=False)
    return model.eval()


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.filterwarnings("ignore")  # the tracer warns of each branch on a number
def test_a_trace_quantizes(model: nn.Module, gradient: bool) -> None:
    with torch.set_grad_enabled(gradient):
        traced = torch.jit.trace(model, X, check_trace=False)
    other = X.flip(0) * 0.9
    assert torch.equal(traced(other), model(other))


def test_what_fx_records_quantizes(model: nn.Module) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(model)(X)
    assert torch.equal(graph(X * 0.9), model(X * 0.9))


def test_a_dispatch_mode_changes_nothing(model: nn.Module) -> None:
    expected = model(X)
    with FlopCounterMode(display=False) as counter:
        assert torch.equal(model(X), expected)
    assert counter.get_total_flops() > 0


def test_transforms(model: nn.Module) -> None:
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    found = torch.func.grad(loss)(parameters, X)
    loss(parameters, X).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, X[:, None])
    for name, gradients in each.items():
        torch.testing.assert_close(gradients.sum(0), found[name], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.vmap(model)(X[:, None])[:, 0], model(X))
