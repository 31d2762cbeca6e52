"""What the numbers were taken on: processor, versions, date."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import qatkit

INT8_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
"""Instructions that matter to a CPU engine."""

PACKAGES = (
    *("qatkit", "torch", "torchvision", "numpy", "onnx", "onnxruntime", "onnxscript", "openvino"),
    *("nvidia-modelopt", "brevitas", "nncf"),
)


def machine() -> dict[str, Any]:
    """Return the processor, its instructions that matter, the versions, and today."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    flags = named.get("flags", named.get("Features", "")).split()
    versions = {name: version_of(name) for name in PACKAGES}
    return {
        "cpu": named.get("model name", platform.processor()),
        "family, model, stepping": "/".join(
            named.get(key, "?") for key in ("cpu family", "model", "stepping")
        ),
        "cores": os.cpu_count(),
        "int8 flags": [flag for flag in INT8_FLAGS if flag in flags],
        "python": platform.python_version(),
        "versions": {name: found for name, found in versions.items() if found},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat()
        if hasattr(datetime, "UTC")
        else datetime.date.today().isoformat(),
    }


def version_of(package: str) -> str:
    """Return the version of a package, ``""`` for one that is not installed."""
    if package == "qatkit":
        return qatkit.__version__
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
