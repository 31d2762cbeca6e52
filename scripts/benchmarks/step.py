"""What quantization adds to a training step: QAT step over float step, in process CPU time.

A step is forward, cross entropy, backward and SGD on one fixed batch of random images. The
variants take turns step by step. `control` is a second float copy.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn

import qatkit
from benchmarks import peers
from benchmarks.measuring import medians, quartiles, take_turns
from benchmarks.tables import Bar, Cell, Result, Table

KEEPS_MEMORY = True

BARS = {"resnet18": (1.12, 1.08), "mobilenet_v2": (1.22, 1.12)}
"""The most that a step may take, with ranges by percentile on every forward, and frozen."""

QAT, FROZEN = "qatkit, range on every forward", "qatkit, ranges frozen"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--model", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--config", default="tensorrt-int8", help="a preset")
    parser.add_argument(
        "--peers", nargs="*", choices=peers.PEERS, default=list(peers.PEERS), metavar="PEER"
    )


def run(args: argparse.Namespace) -> Result:
    """Measure every model."""
    torch.set_num_threads(args.threads)
    tables, bars, notes = [], [], []
    for name in args.model:
        table, found, missing = _measure(name, args)
        tables += [table, _parts(name, args)]
        notes += [f"{name}: {label}: {reason}" for label, reason in missing.items()]
        if name in BARS:
            observing, frozen = BARS[name]
            bars += [
                Bar(f"{name}: {QAT}", found[QAT], observing),
                Bar(f"{name}: {FROZEN}", found[FROZEN], frozen),
            ]
    return Result(tuple(tables), tuple(bars), tuple(notes))


def _parts(name: str, args: argparse.Namespace) -> Table:
    """Measure steps in which only some quantizers work."""
    x, y, model, qat = _models(name, args)
    frozen = copy.deepcopy(qat)
    qatkit.freeze_ranges(frozen).apply()
    models = {
        "float": model,
        "all switched off": _only(frozen, ()),
        "weights, own ranges": _only(qat, (True,)),
        "weights, ranges frozen": _only(frozen, (True,)),
        "other tensors, range on every forward": _only(qat, (False,)),
        "other tensors, ranges frozen": _only(frozen, (False,)),
        "all, range on every forward": qat,
        "all, ranges frozen": frozen,
    }
    runs = {label: make_step(each, x, y) for label, each in models.items()}
    middle = medians(take_turns(runs, args.steps, warm_up=2))
    rows = tuple(
        (label, 1000 * value, 1000 * (value - middle["float"]), value / middle["float"])
        for label, value in middle.items()
    )
    quantizers = [each for each in qat.modules() if isinstance(each, qatkit.TensorQuantizer)]
    weights = sum(each.spec.axis is not None for each in quantizers)
    return Table(
        f"where the time of a step goes, {name}",
        f"{weights} quantizers of weights, {len(quantizers) - weights} of other tensors; as above.",
        ("quantizers that work", "CPU ms/step", "over float, ms", "over float"),
        rows,
    )


def _only(model: nn.Module, of_weights: tuple[bool, ...]) -> nn.Module:
    """Return a copy in which only quantizers of weights (True) or of other tensors (False) work."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if not isinstance(module, qatkit.TensorQuantizer):
            continue
        if (module.spec.axis is not None) not in of_weights:
            module.quantize, module.observe = False, "never"
    return model


def _models(name: str, args: argparse.Namespace) -> tuple[Tensor, Tensor, nn.Module, nn.Module]:
    """Return a batch with its labels, a float model, and a prepared one with ranges."""
    torch.manual_seed(0)
    x = torch.randn(args.batch, 3, args.size, args.size)
    y = torch.randint(1000, (args.batch,))
    model = torchvision.models.get_model(name)
    qat = qatkit.prepare(copy.deepcopy(model), x[:1], args.config)
    qatkit.calibrate(qat, [x], progress=False)
    for _ in range(3):  # ranges calibrated in eval say nothing about an untrained net in training
        make_step(qat, x, y)()
    return x, y, model, qat


def make_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Return a function that does one training step."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def _measure(name: str, args: argparse.Namespace) -> tuple[Table, dict[str, float], dict[str, str]]:
    """Return the table of one model, the ratios, and the reasons for what is missing."""
    x, y, model, qat = _models(name, args)
    models = {"float": model, "float again (control)": copy.deepcopy(model), QAT: qat}
    models[FROZEN] = copy.deepcopy(qat)
    qatkit.freeze_ranges(models[FROZEN]).apply()
    others, missing = peers.build(model, x, args.peers, lambda each: make_step(each, x, y)())
    runs = {label: make_step(each, x, y) for label, each in (models | others).items()}
    seconds = take_turns(runs, args.steps, warm_up=2)
    middle = medians(seconds)
    ratios = {label: value / middle["float"] for label, value in middle.items()}
    rows: list[tuple[Cell, ...]] = []
    for label, values in seconds.items():
        low, high = (1000 * each for each in quartiles(values))
        rows.append((label, 1000 * middle[label], f"{low:.1f}..{high:.1f}", ratios[label]))
    rows += [(label, None, f"left out: {reason}", None) for label, reason in missing.items()]
    table = Table(
        f"training step, {name}",
        f"Batch {args.batch}x3x{args.size}x{args.size}, {args.config}, {args.threads} thread(s), "
        f"medians of {args.steps} steps in turn, eager, memory kept.",
        ("variant", "CPU ms/step", "quartiles", "over float"),
        tuple(rows),
    )
    return table, ratios, missing
