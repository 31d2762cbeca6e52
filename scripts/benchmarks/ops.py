"""Single operators: fake quantize, what it saves for the backward, and the percentile range."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import version_of
from benchmarks.measuring import MALLOC, default_allocator, medians, take_turns
from benchmarks.tables import Bar, Cell, Result, Table
from qatkit import QuantSpec
from qatkit.config import ACTIVATION, WEIGHT
from qatkit.functional import fake_quantize, shrink_range
from qatkit.quantizer import TensorQuantizer

Function = Callable[[Tensor], Tensor]

KEEPS_MEMORY = True
"""Whether the script runs with an allocator that keeps its memory."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--size", type=int, default=10**6, help="elements of the fake quantize")
    parser.add_argument("--range-sizes", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--range-rounds", type=int, default=7)


def run(args: argparse.Namespace) -> Result:
    """Measure all three."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(args.size // 100, 100)
    times, bars, notes = _fake_quantize(x, args.rounds)
    ranges, more = _ranges(args)
    parts = _parts(x, args.rounds), _saved(x), *ranges, _range_parts(args)
    return Result((times, *parts), (*bars, *more), notes)


def _fake_quantize(x: Tensor, rounds: int) -> tuple[Table, tuple[Bar, ...], tuple[str, ...]]:
    scale, zero = torch.tensor(0.02), torch.tensor(0, dtype=torch.int32)
    affine = torch.tensor(-20, dtype=torch.int32)
    scales, zeros = torch.linspace(0.01, 0.03, len(x)), torch.zeros(len(x), dtype=torch.int32)
    tensor, channel = torch.fake_quantize_per_tensor_affine, torch.fake_quantize_per_channel_affine
    natives: dict[str, Function] = {
        "per-tensor": lambda t: tensor(t, scale, zero, -128, 127),
        "affine": lambda t: tensor(t, scale, affine, -128, 127),
        "per-channel": lambda t: channel(t, scales, zeros, 0, -128, 127),
    }
    own: dict[str, Function] = {
        "per-tensor": lambda t: fake_quantize(t, scale, 0, -128, 127),
        "affine": lambda t: fake_quantize(t, scale, affine, -128, 127),
        "per-channel": lambda t: fake_quantize(t, scales, 0, -128, 127, 0),
    }
    functions = {f"torch native, {name}": each for name, each in natives.items()}
    functions |= {f"qatkit, {name}": each for name, each in own.items()}
    others, notes = _other_quantizers(x)
    functions |= others
    runs: dict[str, Callable[[], object]] = {
        "clone": x.clone().clone,
        **{label: _both_ways(each, x) for label, each in functions.items()},
        "clone again (control)": x.clone().clone,
    }
    seconds = medians(take_turns(runs, rounds, warm_up=3))
    equal = {
        f"qatkit, {name}": "yes" if _equal(own[name], natives[name], x) else "NO" for name in own
    }
    rows = tuple(
        (label, 1e9 * value / x.numel(), value / seconds["clone"], equal.get(label, ""))
        for label, value in seconds.items()
    )
    table = Table(
        f"fake quantize, forward + backward, {x.numel():.0e} elements",
        f"One thread, medians of {rounds} rounds in turn, each variant on memory of its own, which "
        "it finds out of the cache; memory kept. torch.equal is checked in this run, value and "
        "gradient.",
        ("variant", "ns/element", "over clone", "torch.equal to native"),
        rows,
    )
    limits = {"per-tensor": 1.5, "affine": 1.5, "per-channel": 2.0}
    bars = tuple(
        Bar(
            f"fake quantize {name}, over clone", seconds[f"qatkit, {name}"] / seconds["clone"], most
        )
        for name, most in limits.items()
    )
    return table, bars, notes


def _parts(x: Tensor, rounds: int) -> Table:
    """Time the passes over memory that a fake quantize is made of."""
    steps, gradient = torch.randn_like(x), torch.randn_like(x)
    inputs = {name: x.clone() for name in ("read", "gated", "coded", "codes")}
    warnings.filterwarnings("ignore", "torch.quantize_per_tensor")
    codes = torch.quantize_per_tensor(inputs["codes"], 0.02, 0, torch.qint8)
    small = torch.randn(1)
    passes: dict[str, Callable[[], object]] = {
        "clone": x.clone().clone,
        "x * (1 / scale), a new buffer": lambda: inputs["read"].mul(50.0),
        "round_": steps.round_,
        "clamp_": lambda: steps.clamp_(-128, 127),
        "mul_": lambda: steps.mul_(1.0),
        "quantize_per_tensor to qint8": lambda: torch.quantize_per_tensor(
            inputs["coded"], 0.02, 0, torch.qint8
        ),
        "dequantize": codes.dequantize,
        "hardtanh_backward, the whole backward": lambda: torch.ops.aten.hardtanh_backward(
            gradient, inputs["gated"], -2.56, 2.54
        ),
        "both ways of one element: calls and autograd": _both_ways(
            lambda t: fake_quantize(t, 0.02, 0, -128, 127), small
        ),
    }
    seconds = medians(take_turns(passes, rounds, warm_up=3))
    rows = tuple(
        (label, 1e9 * value / x.numel(), value / seconds["clone"])
        for label, value in seconds.items()
    )
    return Table(
        f"where the time of a fake quantize goes, {x.numel():.0e} elements",
        f"The operators of PyTorch that it is made of, as above, medians of {rounds} rounds. The "
        "last row is a fixed cost, here spread over the elements.",
        ("pass", "ns/element", "over clone"),
        rows,
    )


def _both_ways(function: Function, x: Tensor) -> Callable[[], object]:
    leaf, gradient = x.clone().requires_grad_(), torch.ones_like(x)
    return lambda: torch.autograd.grad(function(leaf), leaf, gradient)


def _equal(function: Function, native: Function, x: Tensor) -> bool:
    """Tell whether values and gradients are equal, at the ends and ties of the grid too."""
    edges = torch.tensor([-2.57, -2.55, -2.56, 2.53, 2.54, 2.55, 2.56, 0.01, 0.03, -0.01, 0.0])
    x = x.clone()
    x.view(-1)[: len(edges)] = edges
    gradient = torch.randn_like(x)
    results = []
    for each in (function, native):
        leaf = x.clone().requires_grad_()
        value = each(leaf)
        results.append((value, torch.autograd.grad(value, leaf, gradient)[0]))
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _other_quantizers(x: Tensor) -> tuple[dict[str, Function], tuple[str, ...]]:
    """Return the fake quantizers of other tools, and what to say about those that are missing."""

    def torch_ao() -> Function:
        from torch.ao.quantization import FusedMovingAvgObsFakeQuantize

        return FusedMovingAvgObsFakeQuantize()

    def modelopt() -> Function:
        from modelopt.torch.quantization.nn import TensorQuantizer as Other

        quantizer = Other()
        quantizer.amax = torch.tensor(2.56)
        return quantizer

    def brevitas() -> Function:
        from brevitas.nn import QuantIdentity

        return QuantIdentity().train()

    makers = {
        "torch.ao, fused observer": ("torch", torch_ao),
        "modelopt, range known": ("nvidia-modelopt", modelopt),
        "brevitas, default": ("brevitas", brevitas),
    }
    found: dict[str, Function] = {}
    notes = []
    for label, (package, make) in makers.items():
        if not version_of(package):
            notes.append(f"{label}: {package} is not installed")
            continue
        try:
            found[label] = make()
            _both_ways(found[label], x)()
        except Exception as error:  # whatever another tool raises
            found.pop(label, None)
            notes.append(f"{label}: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
    return found, tuple(notes)


def _saved(x: Tensor) -> Table:
    """Count the bytes that each quantizer keeps for the backward."""

    def quantizer(spec: QuantSpec, how: str) -> Function:
        channels = None if spec.axis is None else x.shape[spec.axis]
        each = TensorQuantizer(spec, channels).train()
        each(x)
        if how == "frozen":
            each.observe = "never"
        return each

    native = torch.fake_quantize_per_tensor_affine
    scale, zero = torch.tensor(0.02), torch.tensor(0, dtype=torch.int32)
    cases: dict[str, Function] = {
        "torch native, per-tensor": lambda t: native(t, scale, zero, -128, 127),
        "activation, range on every forward": quantizer(ACTIVATION, "observing"),
        "activation, range frozen": quantizer(ACTIVATION, "frozen"),
        "weight, range on every forward": quantizer(WEIGHT, "observing"),
        "weight, range frozen": quantizer(WEIGHT, "frozen"),
    }
    rows: list[tuple[Cell, ...]] = []
    for label, function in cases.items():
        saved, new = _saved_bytes(function, x)
        rows.append((label, saved / x.numel(), new / x.numel()))
    return Table(
        "bytes per element saved for the backward",
        "torch.autograd.graph.saved_tensors_hooks, behind a ReLU, each storage once. *new*: not in "
        "the memory of the input, which the ReLU saves anyway, nor of the result, which the layer "
        "behind saves.",
        ("quantizer", "saved", "new"),
        tuple(rows),
    )


def _saved_bytes(function: Function, x: Tensor) -> tuple[int, int]:
    """Return the bytes that a function saves, and those in memory that is not there anyway."""
    given = torch.relu(x.clone().requires_grad_())
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(given)
    there = {each.untyped_storage().data_ptr() for each in (given, result)}
    return sum(saved.values()), sum(count for at, count in saved.items() if at not in there)


def _ranges(args: argparse.Namespace) -> tuple[list[Table], list[Bar]]:
    tables: list[Table] = []
    bars: list[Bar] = []
    for kept in (True, False):
        found = _in_a_process(args, kept)
        name = "memory kept" if kept else "the default allocator"
        columns = (
            *("elements", "data", "percentile", "aminmax ns", "control", "published loop ns"),
            *("qatkit ns", "times faster", "bins apart"),
        )
        keys = ("floor", "control", "loop", "qatkit", "faster", "bins apart")
        rows = tuple(
            (f"{one['size']:.0e}", one["data"], f"{one['percentile']:g}", *(one[k] for k in keys))
            for one in found
        )
        tables.append(
            Table(
                f"percentile range, {name}",
                f"ns per element, one thread, medians of {args.range_rounds} rounds in turn; "
                "*times faster* is the median of the ratios of a round; *control*: aminmax over "
                "aminmax. *bins apart*: of 256; where the percentile is a whole number K of "
                "elements, qatkit leaves out K and the loop fewer.",
                columns,
                rows,
            )
        )
        bars += _range_bars(found, kept)
    return tables, bars


def _range_bars(found: list[dict[str, Any]], kept: bool) -> list[Bar]:
    """Return the bars: 4x at 1e6 with memory kept, 8x at 1e7 without, never slower."""
    where = "memory kept" if kept else "default allocator"
    bars = [
        Bar(f"percentile range, slowest case, {where}", min(o["faster"] for o in found), 1.0, False)
    ]
    size, least = (10**6, 4.0) if kept else (10**7, 8.0)
    for kind in ("gaussian", "relu"):
        usual = [o for o in found if o["size"] == size and o["data"] == kind]
        usual = [o for o in usual if o["percentile"] == min(each["percentile"] for each in usual)]
        bars += [
            Bar(
                f"percentile range at {size:.0e}, {kind}, p = {o['percentile']:g} %, {where}",
                o["faster"],
                least,
                at_most=False,
            )
            for o in usual
        ]
    return bars


def _range_parts(args: argparse.Namespace) -> Table:
    """Time the passes over memory that the search of a range is made of, there and here."""
    found: dict[str, list[float]] = {}
    for count in args.range_sizes:
        seconds = medians(take_turns(_range_passes(count), 3 * args.range_rounds, warm_up=2))
        for label, value in seconds.items():
            found.setdefault(label, []).append(1e9 * value / count)
    return Table(
        "where the time of a percentile range goes",
        "Operators of PyTorch on that many elements, ns per element; *few*: at most 0.01 % go, of "
        "each side; *histogram*: more go; *loop*: what the published one does instead.",
        ("pass", *(f"{count:.0e}" for count in args.range_sizes)),
        tuple((label, *values) for label, values in found.items()),
    )


def _range_passes(count: int) -> dict[str, Callable[[], object]]:
    x = torch.randn(count)
    steps, codes = torch.rand(count).mul_(255), torch.randint(256, (count,), dtype=torch.uint8)
    whole, blocks_RB = torch.randint(256, (count,)), x[: count // 128 * 128].view(-1, 128)
    most = max(1, count // 10_000)
    maxima = blocks_RB.amax(1)
    few = min(most, len(maxima))
    chosen = maxima.topk(few).indices
    return {
        "aminmax, the floor": x.aminmax,
        "amin and amax": lambda: (x.amin(), x.amax()),
        "few: maxima of blocks of 128": lambda: blocks_RB.amax(1),
        "few: top k of these": lambda: maxima.topk(few, sorted=False),
        "few: those blocks, their top k": lambda: (
            blocks_RB.index_select(0, chosen).view(-1).topk(most)
        ),
        "histogram: x - low": lambda: x.sub(0.5),
        "histogram: * factor, round": lambda: steps.mul_(1.0).round_(),
        "histogram: to uint8": lambda: steps.to(torch.uint8),
        "histogram: bincount of uint8": lambda: torch.bincount(codes, minlength=256),
        "loop: to int32": steps.int,
        "loop: bincount of int64": lambda: torch.bincount(whole, minlength=256),
        "a range of 64 elements: the fixed cost": lambda: shrink_range(x[:64], 5.0),
    }


def _in_a_process(args: argparse.Namespace, kept: bool) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.percentile_range", "--sizes"]
    command += [*map(str, args.range_sizes), "--rounds", str(args.range_rounds)]
    scripts = Path(__file__).parents[1]
    environment = default_allocator() | (MALLOC if kept else {})
    root = os.pathsep.join(filter(None, [str(scripts.parent), environment.get("PYTHONPATH", "")]))
    done = subprocess.run(
        command,
        cwd=scripts,
        env=environment | {"PYTHONPATH": root},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    cases: list[dict[str, Any]] = json.loads(done.stdout)
    return cases
