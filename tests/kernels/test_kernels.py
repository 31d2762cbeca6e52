from __future__ import annotations

import pytest
import torch

from qatkit.kernels import cpu, portable


@pytest.mark.parametrize("percentile", [0.0, 0.01, 0.2, 3.0, 40.0])
@pytest.mark.parametrize("shape", [(1, 5), (1, 30_001), (4, 9_000)])
def test_paths_agree(shape, percentile):
    x = torch.randn(shape)
    for fast, reference in zip(
        cpu.shrink(x, percentile), portable.shrink(x, percentile), strict=True
    ):
        assert torch.equal(fast, reference)


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("k", [1, 3, 40])
def test_block_extremes_are_the_extremes(k, largest):
    x = torch.randn(3, 5000)
    want = x.topk(k, dim=1, largest=largest).values
    assert torch.equal(portable.extremes(x, k, 32, largest=largest), want)


@pytest.mark.parametrize("percentile", [0.01, 0.1, 0.3, 1.0, 20.0, 49.0])
@pytest.mark.parametrize("count", [3000, 70001])
def test_rows_of_all_sorts(percentile: float, count: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(count)
    odd = [x.sort().values, torch.cat([torch.zeros(count), x]), torch.randint(0, 5, (count,)) - 2.0]
    for row in (
        x,
        x.relu(),
        x.relu()[1:],
        (-x).relu().neg()[3:],
        x * 1e-5 + 3,
        x * 1e6,
        x.abs().pow(4),
        *odd,
    ):
        expected = portable.shrink(row[None], percentile)
        assert cpu.shrink_row(row, percentile) == (expected[0].item(), expected[1].item())
