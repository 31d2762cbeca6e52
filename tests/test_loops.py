"""Training loops as people write them: mixed precision, accumulation, compiled steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qatkit
from qatkit.modes import quantizers


def build(*, calibrated: bool = True) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    net.append(nn.Linear(8 * 36, 3))
    qatkit.prepare(net, torch.zeros(1, 3, 8, 8))
    if calibrated:
        qatkit.calibrate(net, [images(0)], progress=False)
    return net.train()


def images(step: int, count: int = 12) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(step))


def labels(count: int = 12) -> Tensor:
    return torch.arange(count) % 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_scaler(dtype: torch.dtype) -> None:
    net = build()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = functional.cross_entropy(net(images(1)), labels())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for path, quantizer in quantizers(net):
        assert quantizer.min_val.dtype == torch.float32, path
        assert all(torch.isfinite(end).all() for end in quantizer.range), path


def test_a_scaler_skips_a_step_that_overflows_and_the_ranges_stay_finite() -> None:
    net = build()
    before = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e30)
    x = images(1)
    x[0, 0, 0, 0] = torch.inf
    with torch.autocast("cpu", dtype=torch.float16):
        loss = net(x).square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 1e30
    for one, other in zip(net.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other)
    assert all(torch.isfinite(end).all() for _, q in quantizers(net) for end in q.range)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts: int) -> None:
    whole = build()
    qatkit.freeze_ranges(whole).apply()
    qatkit.freeze_batch_norm(whole).apply()
    split = copy.deepcopy(whole)
    functional.cross_entropy(whole(images(2)), labels()).backward()
    for x, y in zip(images(2).chunk(parts), labels().chunk(parts), strict=True):
        (functional.cross_entropy(split(x), y) / parts).backward()
    for one, other in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def counting() -> tuple[list[Any], Any]:
    """Return a compiler backend and the list in which it notes the graphs that it compiles."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    return graphs, backend


@pytest.mark.slow
def test_a_compiled_step_is_compiled_again_only_when_something_freezes() -> None:
    eager = build()
    net = copy.deepcopy(eager)
    graphs, backend = counting()

    def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(model(x), y)

    compiled: Any = torch.compile(loss_of, fullgraph=True, backend=backend)
    counts = []
    for model, function in ((eager, loss_of), (net, compiled)):
        schedule = qatkit.QATSchedule(model, 4, freeze_batch_norm_at=1, freeze_ranges_at=3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for epoch in range(4):
            for step in range(2):
                optimizer.zero_grad()
                function(model, images(2 * epoch + step), labels()).backward()
                optimizer.step()
                counts.append(len(graphs))
            schedule.step()
    assert counts == [0] * 8 + [1, 1, 2, 2, 2, 2, 3, 3]
    # A rounding flips where the two add up in another order: by steps of the grid, not more.
    for one, other in zip(net.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)
    assert all(q.num_batches > 6 for path, q in quantizers(net) if "input" in path)


@pytest.mark.slow
def test_forward_loss_and_backward_are_one_graph() -> None:
    config: Any = torch._dynamo.config
    if not hasattr(config, "trace_autograd_ops"):
        pytest.skip("this torch does not compile a backward inside of a step")
    net = build()
    twin = copy.deepcopy(net)
    graphs, backend = counting()

    def step(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        loss = functional.cross_entropy(net(x), y)
        return torch.autograd.grad(loss, list(net.parameters()))

    with config.patch(trace_autograd_ops=True):
        compiled: Any = torch.compile(step, fullgraph=True, backend=backend)
        for number in range(3):
            gradients = compiled(images(number), labels())
            twin.zero_grad()
            functional.cross_entropy(twin(images(number)), labels()).backward()
            for one, other in zip(gradients, twin.parameters(), strict=True):
                torch.testing.assert_close(one, other.grad, rtol=1e-3, atol=1e-4)
    assert len(graphs) == 1


def test_synchronized_batch_norms_fold_as_others() -> None:
    per_tensor = qatkit.QuantConfig(weight=qatkit.QuantSpec(observer="minmax"))
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    x = images(0)
    plans = [qatkit.plan(model, x, per_tensor) for model in (plain, synced)]
    assert [each.layers[0].batch_norm for each in plans] == ["1", "1"]
    assert plans[0].quantizers == plans[1].quantizers
    for model in (plain, synced):
        qatkit.prepare(model, x, per_tensor)
        qatkit.calibrate(model, [x], progress=False)
        model.train()(x).square().mean().backward()
    assert type(synced[1]) is nn.SyncBatchNorm
    for one, other in zip(plain.parameters(), synced.parameters(), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one.grad, other.grad)
    for one, other in zip(plain.buffers(), synced.buffers(), strict=True):
        assert torch.equal(one, other)
