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
