"""Contract 5: torch.compile, autocast and distributed training."""

from __future__ import annotations

import copy
import socket

import pytest
import torch
from torch import nn

import qatkit
from qatkit.modes import quantizers
from tests.contract.zoo import tensors_of, train_step


def compiled(model, backend):
    return torch.compile(model, fullgraph=True, backend=backend)


@pytest.mark.slow
def test_compiles_in_eval(classifier):
    case = classifier.float
    model = classifier.copy().eval()
    with torch.no_grad():
        found = compiled(model, "eager")(*case.args)
    for a, b in zip(tensors_of(found), classifier.outputs, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.slow
def test_compiles_in_training(classifier):
    case = classifier.float
    if case.name not in ("resnet18", "mobilenet_v2", "shufflenet_v2_x0_5"):
        pytest.skip("takes the compiler minutes and has no construct that the other three have not")
    loss, gradients, _ = classifier.trained
    model = classifier.copy()
    backend = "aot_eager" if case.name == "resnet18" else "eager"
    found, others = train_step(case, compiled(model, backend))
    assert torch.isfinite(found)
    assert {name.removeprefix("_orig_mod.") for name in others} == gradients.keys()
    if not _is_random(model):
        torch.testing.assert_close(found, loss, rtol=1e-4, atol=1e-5)
    counts = {path: q.num_batches for path, q in quantizers(classifier.model)}
    assert [path for path, q in quantizers(model) if not q.num_batches > counts[path]] == []


def _is_random(model):
    """Tell whether a step uses random numbers, which compiled graphs draw in another order."""
    return any(
        type(m).__name__ in ("Dropout", "StochasticDepth") and m.p > 0 for m in model.modules()
    )


def test_bf16_autocast_step(light):
    case = light
    model = case.copy()
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = case.float.loss(model)
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32
            assert torch.isfinite(parameter.grad).all(), name
    for path, quantizer in quantizers(model):
        assert quantizer.min_val.dtype == quantizer.max_val.dtype == torch.float32, path
        assert torch.isfinite(quantizer.min_val).all(), path
        assert torch.isfinite(quantizer.max_val).all(), path


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.body(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("training", [True, False])
def test_a_small_model_compiles(training):
    x = torch.randn(2, 3, 16, 16)
    model = qatkit.prepare(Small(), x)
    qatkit.calibrate(model, [x], progress=False)
    model.train(training)
    expected = copy.deepcopy(model)(x)
    found = compiled(model, "eager")(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if training:
        found.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def _worker(rank, port, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    model = qatkit.prepare(Small(), torch.zeros(1, 3, 16, 16)).train()
    parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(parallel.parameters(), 0.1)
    torch.manual_seed(rank + 1)
    for _ in range(3):
        optimizer.zero_grad()
        parallel(torch.randn(4, 3, 16, 16) * (1 + rank)).pow(2).mean().backward()
        optimizer.step()
    torch.save(model.state_dict(), f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_hold_equal_ranges(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_worker, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    names = [key for key in first if "quantizer." in key]
    assert names
    assert [key for key in names if not torch.equal(first[key], second[key])] == []
    assert all(first[key] == 3 for key in names if key.endswith("input_quantizer.num_batches"))
    assert not torch.equal(first["stem.1.running_var"], second["stem.1.running_var"])


def test_a_step_with_frozen_ranges_and_batch_norms_changes_no_buffer(light):
    case = light
    model = case.copy()
    qatkit.freeze_ranges(model).apply()
    qatkit.freeze_batch_norm(model).apply()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    train_step(case.float, model)
    after = dict(model.named_buffers())
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
