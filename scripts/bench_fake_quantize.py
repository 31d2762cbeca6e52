"""Time fake quantize (forward + backward) and range estimation, in ns per element.

Variants are interleaved, medians of process CPU time, one thread. Memory is kept between rounds if
started as ``MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 python ...``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from qatkit.functional import fake_quantize, fake_quantize_unclipped, shrink_range


def both_ways(function: Callable[..., Tensor], x: Tensor, *args: object) -> Callable[[], object]:
    """Return a forward and backward pass of ``function`` as a call without arguments."""
    leaf, grad = x.clone().requires_grad_(), torch.ones_like(x)
    return lambda: torch.autograd.grad(function(leaf, *args), leaf, grad)


def variants(count: int) -> dict[str, Callable[[], object]]:
    """Return what is timed on ``count`` elements."""
    x = torch.randn(count // 100, 100)
    scale, zero = torch.tensor(0.02), torch.tensor(0, dtype=torch.int32)
    scales, zeros = torch.full((len(x),), 0.02), torch.zeros(len(x), dtype=torch.int32)
    native, native_channel = (
        torch.fake_quantize_per_tensor_affine,
        torch.fake_quantize_per_channel_affine,
    )
    return {
        "clone": x.clone,
        "native": both_ways(native, x, scale, zero, -128, 127),
        "native per-channel": both_ways(native_channel, x, scales, zeros, 0, -128, 127),
        "fake_quantize": both_ways(fake_quantize, x, scale, 0, -128, 127),
        "fake_quantize per-channel": both_ways(fake_quantize, x, scales, 0, -128, 127, 0),
        "unclipped": both_ways(fake_quantize_unclipped, x, scale),
        "unclipped per-channel": both_ways(fake_quantize_unclipped, x, scales, 0),
        "aminmax": x.aminmax,
        "shrink 0.01": lambda: shrink_range(x, 0.01),
        "shrink 1.0": lambda: shrink_range(x, 1.0),
        "minmax per-channel": lambda: shrink_range(x, 0.0, axis=0),
    }


def main() -> None:
    """Print one line for each variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    table: dict[str, list[float]] = {}
    for count in args.sizes:
        calls = variants(count)
        times: dict[str, list[int]] = {name: [] for name in calls}
        for _ in range(args.rounds):
            for name, call in calls.items():
                start = time.process_time_ns()
                call()
                times[name].append(time.process_time_ns() - start)
        for name, spent in times.items():
            table.setdefault(name, []).append(statistics.median(spent) / count)
    print(f"{'ns/element at':28}" + "".join(f"{count:>10.0e}" for count in args.sizes))
    for name, row in table.items():
        print(f"{name:28}" + "".join(f"{value:10.3f}" for value in row))


if __name__ == "__main__":
    main()
