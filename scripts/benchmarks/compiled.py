"""`torch.compile` on a prepared model: what compiling costs, and what a step gains.

With ``fullgraph=True``, so that a graph break is an error: process CPU seconds of Dynamo and of
inductor until the first step is done, the float model's beside them, graphs, and graphs that later
steps added (recompilations). The steps of the compiled and the eager QAT model, and of the compiled
float model, take turns.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

import qatkit
from benchmarks.measuring import medians, take_turns
from benchmarks.tables import Bar, Cell, Result, Table

KEEPS_MEMORY = True
BAR = 1.05
"""The most that a compiled step may take, over the eager one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--model", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20, help="0 for compile times alone")
    parser.add_argument("--config", default="tensorrt-int8", help="a preset")
    parser.add_argument("--eval", action="store_true", help="also compile and compare eval")


def run(args: argparse.Namespace) -> Result:
    """Measure every model."""
    from torch._inductor import config

    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(args.threads)
    rows, bars = [], []
    with config.patch(force_disable_caches=True):
        for name in args.model:
            row, ratio = _measure(name, args)
            rows.append(row)
            if ratio is not None:
                bars.append(Bar(f"{name}: compiled QAT step over eager", ratio, BAR))
    columns = (
        *("model", "Dynamo s", "inductor s", "both, float model s", "graphs", "recompilations"),
        *("step over eager", "step over compiled float", "eval difference"),
    )
    table = Table(
        "torch.compile, inductor",
        f"Batch {args.batch}x3x{args.size}x{args.size}, {args.config}, {args.threads} thread(s), "
        f"fullgraph, no caches, medians of {args.steps} steps in turn, memory kept.",
        columns,
        tuple(rows),
    )
    return Result((table,), tuple(bars))


def _measure(name: str, args: argparse.Namespace) -> tuple[tuple[Cell, ...], float | None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(args.batch, 3, args.size, args.size)
    model = _build(name, args.size)
    qat = qatkit.prepare(copy.deepcopy(model), x[:1], args.config)
    qatkit.calibrate(qat, [x], progress=False)
    difference = _difference_in_eval(qat, x) if args.eval else None
    eager = copy.deepcopy(qat).train()
    steps = {"eager": _make_step(eager, list(eager.parameters()), x)}
    steps["float"], of_float = _first_step(model.train(), x)
    steps["compiled"], facts = _first_step(qat.train(), x)
    before = counters["stats"]["unique_graphs"]
    middle = medians(take_turns(steps, args.steps, warm_up=2)) if args.steps else {}
    for _ in range(0 if args.steps else 2):
        steps["compiled"]()
    again = counters["stats"]["unique_graphs"] - before
    ratios: list[Cell] = [None, None]
    if middle:
        ratios = [middle["compiled"] / middle[label] for label in ("eager", "float")]
    took = facts["dynamo"], facts["inductor"], of_float["dynamo"] + of_float["inductor"]
    row = (name, *took, int(facts["graphs"]), again, *ratios, difference)
    return row, middle["compiled"] / middle["eager"] if middle else None


def _build(name: str, size: int) -> nn.Module:
    """Return the torchvision model ``name`` with random weights."""
    settings: dict[str, Any] = {"init_weights": False} if name == "googlenet" else {}
    if name.startswith("vit_"):
        settings["image_size"] = size
    if name in torchvision.models.list_models(torchvision.models.segmentation):
        settings["weights_backbone"] = None
    return torchvision.models.get_model(name, weights=None, **settings)


def _make_step(
    model: Callable[..., Any], parameters: list[Tensor], x: Tensor
) -> Callable[[], None]:
    """Return a function that does one training step on the mean square of all outputs."""
    optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        outputs = [out for out in tree_leaves(model(x)) if isinstance(out, Tensor)]
        torch.stack([out.float().square().mean() for out in outputs]).sum().backward()
        optimizer.step()

    return step


def _first_step(model: nn.Module, x: Tensor) -> tuple[Callable[[], None], dict[str, float]]:
    """Compile ``model``, do one step, and return the step and what compiling it took."""
    from torch._inductor.compile_fx import compile_fx

    before = counters["stats"]["unique_graphs"]
    dynamo: list[float] = []
    started = time.process_time()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        dynamo.append(time.process_time() - started)
        return compile_fx(graph, inputs)

    whole = torch.compile(model, fullgraph=True, backend=backend)
    step = _make_step(whole, list(model.parameters()), x)
    step()
    rest = time.process_time() - started - dynamo[0]
    graphs = counters["stats"]["unique_graphs"] - before
    return step, {"dynamo": dynamo[0], "inductor": rest, "graphs": graphs}


def _difference_in_eval(model: nn.Module, x: Tensor) -> float:
    """Return the largest difference of compiled and eager eval over the largest output."""
    torch._dynamo.reset()
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        wanted = [out for out in tree_leaves(model(x)) if isinstance(out, Tensor)]
        found = tree_leaves(torch.compile(model, fullgraph=True)(x))
    pairs = zip(found, wanted, strict=False)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)
