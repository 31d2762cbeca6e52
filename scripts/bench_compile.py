"""Measure ``torch.compile`` on a prepared model: what compiling costs, and what a step gains.

    python scripts/bench_compile.py --model resnet18 mobilenet_v2
    python scripts/bench_compile.py --model densenet121 vit_b_16 --steps 0 --eval

One line for each model, with ``fullgraph=True`` so that a graph break is an error: process CPU
seconds of Dynamo and of the compiler behind it until the first step is done, the float model's
beside them, graphs, and graphs that later steps added (recompilations). The steps of the compiled
and the eager QAT model, and of the compiled float model, take turns; medians of process CPU time
are compared. Caches are off. The script starts itself again with an allocator that keeps its
memory, because page faults otherwise decide such ratios.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from bench_step import MALLOC, cpu_name, measure
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

import qatkit

ENVIRONMENT = MALLOC | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
SETTINGS: dict[str, dict[str, Any]] = {"googlenet": {"init_weights": False}}


def build(name: str, size: int) -> nn.Module:
    """Return the torchvision model ``name`` with random weights."""
    settings = dict(SETTINGS.get(name, {}))
    if name.startswith("vit_"):
        settings["image_size"] = size
    if name in torchvision.models.list_models(torchvision.models.segmentation):
        settings["weights_backbone"] = None
    return torchvision.models.get_model(name, weights=None, **settings)


def make_step(model: Callable[..., Any], parameters: list[Tensor], x: Tensor) -> Callable[[], None]:
    """Return a function that does one training step on the mean square of all outputs."""
    optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        outputs = [out for out in tree_leaves(model(x)) if isinstance(out, Tensor)]
        sum(out.float().square().mean() for out in outputs).backward()
        optimizer.step()

    return step


def first_step(model: nn.Module, x: Tensor) -> tuple[Callable[[], None], dict[str, float]]:
    """Compile ``model``, do one step, and return the step and what compiling it took."""
    before = counters["stats"]["unique_graphs"]
    dynamo: list[float] = []
    started = time.process_time()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        dynamo.append(time.process_time() - started)
        return compile_fx(graph, inputs)

    step = make_step(
        torch.compile(model, fullgraph=True, backend=backend), list(model.parameters()), x
    )
    step()
    facts = {"dynamo": dynamo[0], "rest": time.process_time() - started - dynamo[0]}
    return step, facts | {"graphs": counters["stats"]["unique_graphs"] - before}


def evaluate(model: nn.Module, x: Tensor) -> float:
    """Return the largest difference of compiled and eager eval over the largest output."""
    torch._dynamo.reset()
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        wanted = [out for out in tree_leaves(model(x)) if isinstance(out, Tensor)]
        found = tree_leaves(torch.compile(model, fullgraph=True)(x))
    pairs = zip(found, wanted, strict=False)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)


def report(name: str, args: argparse.Namespace) -> str:
    """Return the line of one model."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(args.batch, 3, args.size, args.size)
    model = build(name, args.size)
    qat = qatkit.prepare(copy.deepcopy(model), x[:1], args.config)
    qatkit.calibrate(qat, [x], progress=False)
    evaluated = f"{evaluate(qat, x):10.1e}" if args.eval else " " * 10
    eager = copy.deepcopy(qat).train()
    steps = {"eager": make_step(eager, list(eager.parameters()), x)}
    compiled_float = 0.0
    if not args.only_qat:
        steps["float"], facts = first_step(model.train(), x)
        compiled_float = facts["dynamo"] + facts["rest"]
    steps["compiled"], facts = first_step(qat.train(), x)
    ratios = ["", ""]
    before = counters["stats"]["unique_graphs"]
    seconds = measure(steps, args.steps) if args.steps else {}
    medians = {label: statistics.median(values) for label, values in seconds.items()}
    if medians:
        ratios[0] = f"{medians['compiled'] / medians['eager']:.3f}"
        if "float" in medians:
            ratios[1] = f"{medians['compiled'] / medians['float']:.3f}"
    else:
        steps["compiled"]()
        steps["compiled"]()
    again = counters["stats"]["unique_graphs"] - before
    return (
        f"{name:22} {facts['dynamo']:7.1f} {facts['rest']:9.1f} {compiled_float:6.1f}"
        f" {facts['graphs']:6.0f} {again:10.0f} {ratios[0]:>9} {ratios[1]:>9} {evaluated}"
    )


def main() -> None:
    """Measure every model and print one table."""
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20, help="0 for compile times alone")
    parser.add_argument("--config", default="tensorrt-int8", help="a preset")
    parser.add_argument("--eval", action="store_true", help="also compile and compare eval")
    parser.add_argument("--only-qat", action="store_true", help="without the compiled float model")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {cpu_name()}")
    print(f"Python {platform.python_version()}, {args.threads} thread(s), {args.config}, medians")
    print(f"of {args.steps} steps, batch {args.batch}x3x{args.size}x{args.size}, memory kept")
    print(f"\n{'':22} {'CPU s to the first step':^24} {'':17} {'compiled step over':^19} eval:")
    print(
        f"{'model':22} {'Dynamo':>7} {'inductor':>9} {'float':>6} {'graphs':>6} {'recompiled':>10}"
        f" {'eager':>9} {'float':>9} {'difference':>10}"
    )
    for name in args.model:
        print(report(name, args), flush=True)


if __name__ == "__main__":
    main()
