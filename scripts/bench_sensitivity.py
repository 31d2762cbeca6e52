"""Measure `qatkit.sensitivity` of resnet50: each layer left out once, with a progress bar.

    python scripts/bench_sensitivity.py --images 8 --size 112

Random weights do: the time does not depend on them. The calibration is not in it.
"""

from __future__ import annotations

import argparse
import time

import torch
import torchvision

import qatkit


def main() -> None:
    """Print the worst layers and the time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, default=112, help="height and width of an image")
    parser.add_argument("--top", type=int, default=5, help="how many of the worst to print")
    given = parser.parse_args()
    torch.manual_seed(0)
    model = torchvision.models.resnet50().eval()
    images = torch.randn(given.images, 3, given.size, given.size)
    qatkit.prepare(model, images[:1])
    qatkit.calibrate(model, [images], progress=False)
    wall, cpu = time.perf_counter(), time.process_time()
    table = qatkit.sensitivity(model, [images])
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    for each in table.top(given.top):
        print(f"{each.name}: {each.sensitivity:.4g}")
    weighted = sum(isinstance(m, torch.nn.Conv2d | torch.nn.Linear) for m in model.modules())
    print(
        f"{len(table.rows)} rows ({weighted} weighted layers) in {wall:.1f} s, CPU {cpu:.1f} s, "
        f"{torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
