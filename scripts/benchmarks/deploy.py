"""What INT8 gains on a CPU: time of the float32 file over the INT8 file, in one engine.

Every model of torchvision gets random weights from a fixed seed and the batch statistics of random
images, is prepared with each preset, calibrated and exported. One thread, batch 1. The files of
one engine take turns, and `control` is the float file a second time. OpenVINO is told to run
float32 as such, not as bfloat16.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import torch
import torchvision
from torch import nn

import qatkit
from benchmarks.machine import version_of
from benchmarks.measuring import Run, medians, quartiles, take_turns
from benchmarks.tables import Cell, Result, Table

KEEPS_MEMORY = False

PRESETS = ("tensorrt-int8", "onnxruntime-uint8", "openvino-int8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--model", nargs="+", default=["resnet18", "mobilenet_v2", "resnet50"])
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--preset", nargs="+", default=list(PRESETS))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15, help="of three runs of each file")


def run(args: argparse.Namespace) -> Result:
    """Measure every model in every engine."""
    torch.set_num_threads(args.threads)
    present = [name for name in args.engine if version_of(name)]
    notes = [f"{name} is not installed" for name in args.engine if name not in present]
    rows = [row for name in args.model for row in _measure(name, present, args, notes)]
    table = Table(
        "INT8 on a CPU",
        f"{args.threads} thread(s), 1x3x{args.size}x{args.size}, medians of CPU times of "
        f"{args.rounds} rounds of 3, files in turn.",
        ("model", "engine", "file", "CPU ms", "quartiles", "float32 / file"),
        tuple(rows),
    )
    return Result((table,), notes=tuple(notes))


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


def write_files(
    name: str, args: argparse.Namespace, folder: Path, notes: list[str]
) -> dict[str, Path]:
    """Write the float file and one for each preset; note what is not clean and verified."""
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
        levels = [finding.level for finding in report.findings]
        errors, warned = levels.count("ERROR"), levels.count("WARN")
        if errors or warned or report.verify is None or not report.verify.ok:
            notes.append(f"{name}, {preset}: {' '.join(str(report).split())[:300]}")
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


def _measure(
    name: str, engines: list[str], args: argparse.Namespace, notes: list[str]
) -> list[tuple[Cell, ...]]:
    """Measure one model in every engine."""
    rows: list[tuple[Cell, ...]] = []
    x = torch.randn(1, 3, args.size, args.size)
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(name, args, Path(folder), notes)
        for engine in engines:
            runs = {label: ENGINES[engine](path, x, args.threads) for label, path in files.items()}
            runs["float32 again (control)"] = ENGINES[engine](files["float32"], x, args.threads)
            seconds = take_turns(runs, args.rounds, warm_up=0, in_a_row=3, rest=1)
            middle = medians(seconds)
            for label, values in seconds.items():
                low, high = (1000 * each for each in quartiles(values))
                ratio = middle["float32"] / middle[label]
                spread = f"{low:.2f}..{high:.2f}"
                rows.append((name, engine, label, 1000 * middle[label], spread, ratio))
    return rows
