"""Run a function in two processes of a gloo group, and get what each of them returned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

RANKS = 2

needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch without gloo",
)


def run_on_two_ranks(work: Callable[[int], Any], folder: Path) -> tuple[Any, Any]:
    """Return ``work(0), work(1)``; ``work`` is a function of a module."""
    torch.multiprocessing.spawn(_start, (work, str(folder)), nprocs=RANKS)
    first, second = (torch.load(folder / f"{n}.pt", weights_only=False) for n in range(RANKS))
    return first, second


def _start(rank: int, work: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    try:
        torch.save(work(rank), Path(folder) / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()
