"""Measure what INT8 gains on a CPU: time of the float32 file over the INT8 file, in one engine.

    python scripts/bench_deploy.py --model resnet18 mobilenet_v2 resnet50

Every model of torchvision gets random weights from a fixed seed and the batch statistics of random
images, is prepared with each preset, calibrated and exported. One thread, batch 1. The files of
one engine take turns, so that a slow moment of the machine hits all of them, and the medians of
the CPU times are compared. `control` is the float file a second time: how far its ratio is from 1
is the error of the measurement. OpenVINO is told to run float32 as such, not as bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

import qatkit

PRESETS = ("tensorrt-int8", "onnxruntime-uint8", "openvino-int8")
INT8_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
Run = Callable[[], object]


def float_model(name: str, size: int) -> nn.Module:
    """Return a model with random weights and batch norms that have seen random images."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.momentum = None  # the mean over all batches
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
    with torch.no_grad():
        for _ in range(2):
            model.train()(torch.randn(4, 3, size, size))
    return model.eval()


def write_files(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Write the float file and one for each preset; print what lint and verification say."""
    x = torch.randn(1, 3, args.size, args.size)
    files = {"float32": folder / f"{name}.onnx"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            float_model(name, args.size), (x,), files["float32"], opset_version=13, dynamo=False
        )
    for preset in args.preset:
        model = qatkit.prepare(float_model(name, args.size), x, preset)
        data = [torch.randn(2, 3, args.size, args.size)]
        qatkit.calibrate(model, data, progress=False)
        files[preset] = folder / f"{name}.{preset}.onnx"
        report = qatkit.export_onnx(model, x, files[preset], dynamic_batch=False)
        print(str(report).replace(str(folder) + "/", ""), flush=True)
    return files


def in_onnxruntime(path: Path, x: torch.Tensor, threads: int) -> Run:
    """Return a function that runs a file once in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feeds)


def in_openvino(path: Path, x: torch.Tensor, threads: int) -> Run:
    """Return a function that runs a file once in OpenVINO."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    return lambda: request.infer({0: x.numpy()}, share_inputs=True)


ENGINES = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}


def measure(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each run, taken in turn, three in a row after one to warm up."""
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(rounds):
        for label, run in runs.items():
            run()
            for _ in range(3):
                started = time.process_time()
                run()
                seconds[label].append(time.process_time() - started)
    return seconds


def machine() -> dict[str, Any]:
    """Return the processor, those of its instructions that matter here, and the versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    flags = named.get("flags", named.get("Features", "")).split()
    packages = ("qatkit", "torch", "torchvision", "onnx", *ENGINES)
    return {
        "cpu": named.get("model name", platform.processor()),
        "family, model, stepping": [
            named.get(key, "?") for key in ("cpu family", "model", "stepping")
        ],
        "cores": os.cpu_count(),
        "int8 flags": [flag for flag in INT8_FLAGS if flag in flags],
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in packages},
    }


def package_version(name: str) -> str:
    """Return the version of an installed package, also of one that runs from its source."""
    return qatkit.__version__ if name == "qatkit" else version(name)


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = ["| model | engine | file | CPU ms | quartiles | float32 / file |", "|" + "---|" * 6]
    for row in results:
        low, middle, high = row["quartiles_ms"]
        lines.append(
            f"| {row['model']} | {row['engine']} | {row['file']} | {middle:.2f} "
            f"| {low:.2f}..{high:.2f} | {row['ratio']:.2f} |"
        )
    return "\n".join(lines)


def bench(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one model in every engine."""
    results = []
    x = torch.randn(1, 3, args.size, args.size)
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(name, args, Path(folder))
        for engine in args.engine:
            runs = {label: ENGINES[engine](path, x, args.threads) for label, path in files.items()}
            runs["control"] = ENGINES[engine](files["float32"], x, args.threads)
            seconds = measure(runs, args.rounds)
            base = statistics.median(seconds["float32"])
            for label, values in seconds.items():
                quartiles = [1000 * q for q in statistics.quantiles(values, n=4)]
                row = {"model": name, "engine": engine, "file": label, "quartiles_ms": quartiles}
                results.append({**row, "ratio": base / statistics.median(values)})
    return results


def main() -> None:
    """Measure every model in every engine and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["resnet18", "mobilenet_v2", "resnet50"])
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--preset", nargs="+", default=list(PRESETS))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15, help="of three runs of each file")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    parser.add_argument("--markdown", type=Path, help="write the table to this file too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    about = machine()
    print(json.dumps(about), flush=True)
    results = [row for name in args.model for row in bench(name, args)]
    setting = f"{args.threads} thread(s), 1x3x{args.size}x{args.size}, {args.rounds} rounds of 3"
    print(f"\n{setting}\n\n{table(results)}")
    if args.json is not None:
        document = {"machine": about, "setting": setting, "results": results}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    if args.markdown is not None:
        args.markdown.write_text(f"{json.dumps(about)}\n\n{setting}\n\n{table(results)}\n")


if __name__ == "__main__":
    main()
