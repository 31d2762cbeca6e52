"""The compiled loops, if there are any."""

from __future__ import annotations

import functools
from types import ModuleType


@functools.cache
def compiled_loops() -> ModuleType | None:
    """Return `qatkit.kernels.cpu.loops`, imported with the first tensor; ``None`` without Numba."""
    try:
        from qatkit.kernels.cpu import loops
    except ImportError:
        return None
    return loops
