"""What the doctests of the package leave out."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["qatkit/kernels/gpu/*"]
