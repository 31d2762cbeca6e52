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


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode(model: nn.Module) -> None:
    from torch.autograd import forward_ad

    direction = torch.randn_like(X)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(X, direction))).tangent
    expected = torch.func.jvp(model, (X,), (direction,))[1]
    torch.testing.assert_close(tangent, expected)
    x = X.clone().requires_grad_()
    grad = torch.autograd.grad(model(x), x, torch.ones_like(expected))[0]
    torch.testing.assert_close((grad * direction).sum(), expected.sum(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [8, 300])
def test_batched_gradients(size: int) -> None:
    quantizer = qatkit.TensorQuantizer(qatkit.QuantSpec(percentile=0.01))
    x = torch.randn(4, size, 300, requires_grad=True)
    quantizer(x.detach() * 0.8)
    y = quantizer(x)
    grads = torch.randn(2, *y.shape)
    batched = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)[0]
    each = [torch.autograd.grad(y, x, grad, retain_graph=True)[0] for grad in grads]
    assert torch.equal(batched, torch.stack(each))
    assert bool((each[0] == 0).any())
