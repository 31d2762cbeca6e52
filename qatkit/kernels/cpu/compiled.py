"""The compiled loops, if there are any."""

from __future__ import annotations

import functools
import warnings
from types import ModuleType


@functools.cache
def compiled_loops() -> ModuleType | None:
    """Return `qatkit.kernels.cpu.loops`, imported with the first tensor.

    Numba is a dependency, but no reason to fail: ``None`` where it cannot be imported, because
    there is none for this Python yet or its libraries do not load, and where it must not compile.
    """
    try:
        from numba import config

        from qatkit.kernels.cpu import loops
    except ImportError:
        return None
    except Exception as error:
        warnings.warn(f"qatkit does without Numba, which fails to import: {error}", stacklevel=2)
        return None
    return None if getattr(config, "DISABLE_JIT", False) else loops
