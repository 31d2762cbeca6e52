"""Two processes train together: both must hold the same quantizers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qatkit.nn as qnn
from qatkit.config import WEIGHT
from qatkit.spec import QuantSpec

RANKS = 2


def network() -> nn.Sequential:
    torch.manual_seed(0)
    conv = qnn.QuantConv2d(3, 4, 3, weight_spec=WEIGHT.replace(axis=None))
    net = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    net.append(qnn.QuantLinear(64, 2, input_spec=QuantSpec(observer="average")))
    conv.fold(net[1])
    return net


def data(rank: int, step: int) -> Tensor:
    """Return batches that differ by rank; on the last step the second rank has no finite number."""
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(10 * rank + step))
    return torch.full_like(x, float("nan")) if (rank, step) == (1, 2) else (1 + 3 * rank) * x


def work(rank: int, folder: str, kind: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    try:
        net = network().train()
        if kind == "quantizers":
            for step in range(3):
                net[0].input_quantizer(data(rank, step))
        else:
            model = nn.parallel.DistributedDataParallel(net, broadcast_buffers=kind == "broadcast")
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            for step in range(2):
                optimizer.zero_grad()
                model(data(rank, step)).square().mean().backward()
                optimizer.step()
        torch.save(net.state_dict(), Path(folder) / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("kind", ["broadcast", "no broadcast", "quantizers"])
def test_all_ranks_hold_the_same_ranges(kind: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path), kind), nprocs=RANKS)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    # Without broadcast each rank has batch norm statistics of its own, and so a folded weight.
    part = "input_quantizer" if kind == "no broadcast" else "quantizer"
    ranges = [name for name in first if part in name]
    assert len(ranges) == (6 if kind == "no broadcast" else 12)
    assert all(torch.equal(first[name], second[name]) for name in ranges)
    if kind == "quantizers":
        # The rank without a finite number does not drag the range towards zero.
        assert first["0.input_quantizer.max_val"] > 2
    else:
        assert torch.equal(first["4.weight"], second["4.weight"])
