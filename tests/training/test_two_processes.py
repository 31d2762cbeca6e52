"""Two processes: a bad batch of one is skipped by both, and statistics are those of all data."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qatkit.training.batch_norm import reestimate_batch_norm
from qatkit.training.nan_guard import NanGuard
from tests.training.nets import W4A4, net, sgd

RANKS = 2


def data(rank: int, step: int) -> Tensor:
    """Return batches that differ by rank; in step 1 the second rank has a NaN."""
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(10 * rank + step))
    if (rank, step) == (1, 1):
        x[0, 0, 0, 0] = float("nan")
    return x


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    try:
        model = net(W4A4)
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = sgd(model)
        guard = NanGuard(parallel)
        skipped = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(4):
                loss = parallel(data(rank, step)).square().mean()
                skipped.append(guard.skip(loss))
                if skipped[-1]:
                    continue
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        trained = {name: value.clone() for name, value in model.state_dict().items()}
        reestimate_batch_norm(parallel, [data(rank, step) for step in (2, 3)], progress=False)
        words = [str(each.message) for each in caught if "skipped" in str(each.message)]
        found = {"skipped": skipped, "words": words, "trained": trained}
        torch.save({**found, "state": model.state_dict()}, Path(folder) / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=RANKS)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for found in (first, second):
        assert found["skipped"] == [False, True, False, False]
        assert all(bool(torch.isfinite(value).all()) for value in found["state"].values())
    assert first["words"] == []
    assert len(second["words"]) == 1
    assert "batch 1 skipped" in second["words"][0]
    assert "the input of the model is not finite" in second["words"][0]
    for name in first["trained"]:
        if "bn" not in name:
            assert torch.equal(first["trained"][name], second["trained"][name]), name
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())
    # The statistics at the first batch norm are those of the batches of both processes.
    model = net(W4A4)
    model.load_state_dict(first["state"])
    reestimate_batch_norm(
        model, [data(rank, step) for rank in (0, 1) for step in (2, 3)], progress=False
    )
    for name in ("bn.running_mean", "bn.running_var"):
        assert torch.allclose(model.state_dict()[name], first["state"][name], atol=1e-6)
