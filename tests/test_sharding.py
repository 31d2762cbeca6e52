"""Calibration on two ranks, each with its part of the data, against one process with all of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qatkit
from tests.two_ranks import RANKS, needs_gloo, run_on_two_ranks

METHODS = (None, "minmax", "ema", "average", "channel-mean", "max", "percentile", "entropy", "mse")
FAILING: dict[str, Callable[[int], dict[str, Any]]] = {
    "one rank fails": lambda rank: {"data": [torch.zeros(1, 4, 8, 8)] if rank else batches()},
    "no data at all": lambda rank: {"data": []},
    "order matters": lambda rank: {"data": batches(), "method": "entropy-exact"},
}


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten())
    return qatkit.prepare(net.append(nn.Linear(64, 2)), torch.zeros(1, 3, 8, 8))


def batches() -> list[Tensor]:
    """Return five batches, an odd number, one with NaN and one with nothing else."""
    seed = torch.Generator().manual_seed(3)
    found = [torch.randn(2, 3, 8, 8, generator=seed) * (1 + n) for n in range(5)]
    found[1][0], found[3][:] = torch.nan, torch.nan
    return found


def work(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for method in METHODS:
        net = model()
        shard = batches()[rank::RANKS]
        report = qatkit.calibrate(net, shard, method=method, progress=False)
        found[str(method)] = report, net.state_dict()
    net = model()
    report = qatkit.calibrate(net, [] if rank else batches(), progress=False)
    found["all on rank 0"] = report.samples
    before = copy.deepcopy(net.state_dict())
    for name, case in FAILING.items():
        with pytest.raises(qatkit.QatkitError) as caught:
            qatkit.calibrate(net, progress=False, **case(rank))
        found[name] = str(caught.value)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    return found


@needs_gloo
@pytest.mark.slow
def test_two_ranks_calibrate_as_one_process(tmp_path: Path) -> None:
    first, second = run_on_two_ranks(work, tmp_path)
    for method in METHODS:
        net = model()
        wanted = qatkit.calibrate(net, batches(), method=method, progress=False), net.state_dict()
        for report, state in (first[str(method)], second[str(method)]):
            assert report == wanted[0], method
            torch.testing.assert_close(state, wanted[1], rtol=0, atol=0)
    assert first["all on rank 0"] == second["all on rank 0"] == 10
    assert "rank 1 failed" in first["one rank fails"]
    assert "does not run on batch 0" in second["one rank fails"]
    for case, part in (("no data at all", "no batches"), ("order matters", "take 'entropy'")):
        assert first[case] == second[case]
        assert part in first[case]
