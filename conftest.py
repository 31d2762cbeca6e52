"""What is not collected with its folder."""

from __future__ import annotations

import importlib.util

collect_ignore = ["tests/kernels/gpu_cases.py"]  # test_gpu.py runs it
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["qatkit/kernels/gpu/*"]
