"""Measure the CUDA kernels and a training step on a GPU.

    python scripts/bench_gpu.py
    python scripts/bench_gpu.py --model resnet50 --batch 128 --size 224

First the operators: bandwidth of a copy, fake quantize as a share of it (the same bytes: one read,
one write; backward two reads, one write), and the percentile range in ns per element and in passes
(time over the time to read the data once at copy bandwidth). Then QAT step over float step, bf16
autocast, channels_last, eager and compiled, and whether the eager step can be captured into a CUDA
graph. Times are medians of CUDA events, variants taken in turn.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 5


def milliseconds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median time of each call, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + WARM_UP):
        for name, call in calls.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            torch.cuda.synchronize()
            if turn >= WARM_UP:
                times[name].append(start.elapsed_time(stop))
    return {name: statistics.median(values) for name, values in times.items()}


def operators(count: int, dtype: torch.dtype, rounds: int) -> None:
    """Print the table of the operators on ``count`` elements."""
    from qatkit.functional import fake_quantize, shrink_range

    x = torch.randn(count, device="cuda").to(dtype)
    positive, other, scale = x.relu(), torch.empty_like(x), torch.tensor(0.02, device="cuda")
    leaf, grad = x.clone().requires_grad_(), torch.ones_like(x)
    y = fake_quantize(leaf, scale, 0, -128, 127)
    calls: dict[str, Callable[[], Any]] = {
        "copy": lambda: other.copy_(x),
        "fake quantize": lambda: fake_quantize(x, scale, 0, -128, 127),
        "backward": lambda: torch.autograd.grad(y, leaf, grad, retain_graph=True),
        "min/max": lambda: shrink_range(x, 0.0),
        "percentile 0.01": lambda: shrink_range(x, 0.01),
        "percentile 1": lambda: shrink_range(x, 1.0),
        "percentile 0.01, relu": lambda: shrink_range(positive, 0.01),
    }
    times = milliseconds(calls, rounds)
    size = x.element_size()
    bandwidth = 2 * size * count / times["copy"] * 1e3
    print(f"\n{count:.0e} elements, {dtype}: copy {bandwidth / 1e9:.0f} GB/s")
    moved = {"fake quantize": 2, "backward": 3}
    for name, each in times.items():
        passes = each / 1e3 * bandwidth / (size * count)
        share = f"{moved[name] / passes:7.0%} of copy bandwidth" if name in moved else ""
        print(f"  {name:24} {each * 1e6 / count:8.4f} ns/element {passes:6.2f} passes {share}")


def make_step(
    model: nn.Module, run: Callable[..., Any], x: Tensor, y: Tensor
) -> Callable[[], None]:
    """Return a function that does one training step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(run(x), y)
        loss.backward()
        optimizer.step()

    return step


def steps(name: str, args: argparse.Namespace) -> None:
    """Print QAT step over float step."""
    import torchvision

    import qatkit

    torch.manual_seed(0)
    x = torch.randn(args.batch, 3, args.size, args.size, device="cuda")
    x = x.to(memory_format=torch.channels_last)
    y = torch.randint(1000, (args.batch,), device="cuda")
    model = torchvision.models.get_model(name).cuda().to(memory_format=torch.channels_last)
    qat = qatkit.prepare(copy.deepcopy(model), x[:1], args.config)
    qatkit.calibrate(qat, [x], progress=False)
    models = {"float": model, "control": copy.deepcopy(model), "qat": qat}
    models["qat frozen"] = copy.deepcopy(qat)
    qatkit.freeze_ranges(models["qat frozen"]).apply()
    calls = {label: make_step(m.train(), m, x, y) for label, m in models.items()}
    for label in () if args.no_compile else ("float", "qat", "qat frozen"):
        m = copy.deepcopy(models[label]).train()
        calls[f"{label} compiled"] = make_step(m, torch.compile(m, fullgraph=True), x, y)
    graph = captured(make_step(captured_model := copy.deepcopy(qat).train(), captured_model, x, y))
    if isinstance(graph, str):
        print(f"\nCUDA graph capture of the QAT step fails: {graph}")
    else:
        calls["qat CUDA graph"] = graph
    times = milliseconds(calls, args.rounds)
    print(f"\n{name}, batch {args.batch}x3x{args.size}x{args.size}, bf16 autocast, channels_last")
    for label, each in times.items():
        base = times["float compiled" if "compiled" in label else "float"]
        print(f"  {label:24} {each:9.2f} ms {each / base:7.3f} of the float step of its kind")


def captured(step: Callable[[], None]) -> Callable[[], None] | str:
    """Return the replay of ``step`` from a CUDA graph, or why it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return graph.replay


def main() -> None:
    """Print all tables, or one line where there is no GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**6, 10**7, 10**8])
    parser.add_argument("--model", nargs="+", default=["resnet50"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--config", default="tensorrt-int8", help="a preset")
    parser.add_argument("--no-compile", action="store_true", help="without compiled models")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} sees no CUDA device, nothing is measured")
        return
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, medians of {args.rounds}")
    for count in args.sizes:
        for dtype in (torch.float32, torch.bfloat16):
            operators(count, dtype, args.rounds)
    for name in args.model:
        steps(name, args)


if __name__ == "__main__":
    main()
