"""The Triton kernels: in the interpreter everywhere, on the device where there is one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qatkit

CASES = Path(__file__).with_name("gpu_cases.py")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def run_cases(interpret):
    """Run the cases in a process of their own: Triton reads the variable when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    done = subprocess.run(
        command, cwd=CASES.parents[2], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@needs_triton
def test_kernels_in_the_interpreter():
    run_cases("1")


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_kernels_on_the_device():
    run_cases("0")


def test_the_kernels_are_not_imported_on_the_cpu():
    code = (
        "import sys, torch, qatkit\n"
        "y = qatkit.fake_quantize(torch.ones(3), 0.1, 0, -128, 127)\n"
        "found = [m for m in sys.modules if m == 'triton' or m.startswith('qatkit.kernels.gpu')]\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def small():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3),
        torch.nn.Flatten(),
        torch.nn.LazyLinear(4),
    )


@pytest.fixture
def prepared():
    x = torch.randn(4, 3, 12, 12, device="cuda")
    model = small().cuda()
    model(x)
    model = qatkit.prepare(model, x)
    qatkit.calibrate(model, [x], progress=False)
    return model.train(), x


@pytest.mark.gpu
@needs_gpu
def test_a_step_reads_nothing_back(prepared):
    model, x = prepared
    model(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
def test_a_step_is_captured_into_a_graph(prepared):
    model, x = prepared
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(x).sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x).sum().backward()
    counts = [q.num_batches.clone() for q in model.modules() if hasattr(q, "num_batches")]
    graph.replay()
    after = [q.num_batches for q in model.modules() if hasattr(q, "num_batches")]
    assert all(int(b) == int(a) + 1 for a, b in zip(counts, after, strict=True))
