"""Export one model of torchvision and print time and memory: `export` runs it in a new process."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torchvision

import qatkit


def main(name: str, front_end: str, config: str, threads: str) -> None:
    """Measure one export, after it a second one without lint and verification."""
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    x = torch.randn(1, 3, 224, 224)
    model = qatkit.prepare(torchvision.models.get_model(name).eval(), x, config)
    qatkit.calibrate(model, [torch.randn(2, 3, 224, 224)], progress=False)
    size = sum(each.numel() * each.element_size() for each in model.parameters())
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.onnx"
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        idle, wall, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
        report = qatkit.export_onnx(model, x, path, front_end=front_end)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        most = memory("VmHWM")
        started = time.process_time()
        qatkit.export_onnx(model, x, path, front_end=front_end, lint=False, verify=False)
        bare = time.process_time() - started
        found = {
            "model": size / 1e6,
            "idle": idle / 1e6,
            "most": most / 1e6,
            "peak": (most - idle) / size,
            "cpu": cpu,
            "wall": wall,
            "bare": bare,
            "file": path.stat().st_size / 1e6,
            "verified": "yes" if report.verify is not None and report.verify.ok else "NO",
        }
    print(json.dumps(found))


def memory(field: str) -> int:
    """Return a field of the status of this process, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main(*sys.argv[1:])
