"""Two ranks train a prepared model: equal ranges, one collective for each forward."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_leaves

import qatkit
from qatkit.modes import quantizers
from qatkit.prepare import weight_quantizers
from tests.two_ranks import RANKS, needs_gloo, run_on_two_ranks

pytestmark = [pytest.mark.slow, needs_gloo]
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "barrier")


class Optional(nn.Module):
    """A layer that can be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.used = True

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.used else x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.extra = Optional()
        self.head = nn.Sequential(nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.body(x)).mean((2, 3))
        return self.head(self.extra(x))


def prepared(observer: str = "shrink") -> Net:
    torch.manual_seed(0)
    model = Net()
    activation = qatkit.QuantSpec(observer=observer)
    qatkit.prepare(model, torch.zeros(2, 3, 8, 8), qatkit.QuantConfig(activation=activation))
    return model.train()


def images(rank: int, step: int) -> Tensor:
    seed = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(4, 3, 8, 8, generator=seed) * (1 + 2 * rank)


def ranges(model: nn.Module) -> dict[str, Tensor]:
    weights = weight_quantizers(model)
    return {
        f"{path}.{name}": buffer.clone()
        for path, quantizer in quantizers(model)
        if path not in weights
        for name, buffer in quantizer.named_buffers()
    }


@contextmanager
def counted() -> Iterator[list[str]]:
    """Note the collectives that are called from Python."""
    calls: list[str] = []
    saved = {name: getattr(distributed, name) for name in COLLECTIVES}

    def noting(name: str) -> Any:
        return lambda *args, **kwargs: (calls.append(name), saved[name](*args, **kwargs))[1]

    try:
        for name in saved:
            setattr(distributed, name, noting(name))
        yield calls
    finally:
        for name, function in saved.items():
            setattr(distributed, name, function)


def train(model: nn.Module, rank: int, steps: range) -> None:
    for step in steps:
        model(images(rank, step)).square().mean().backward()


def work(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    model = prepared()
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    with counted() as calls:
        train(parallel, rank, range(1))
        found["first"] = ranges(model)
        train(parallel, rank, range(1, 4))
        found["trained"] = ranges(model), list(calls)

        calls.clear()
        model.extra.used = rank == 0  # a layer that one rank leaves out, and a batch of NaN
        parallel(images(rank, 4) if rank else torch.full((4, 3, 8, 8), torch.nan))
        found["uneven"] = ranges(model), list(calls)
        model.extra.used = True

        calls.clear()
        model.eval()(images(rank, 5))
        with qatkit.freeze_ranges(model.train()):
            model(images(rank, 5))
        found["silent"] = list(calls)

        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            train(copied, rank, range(6, 7))
            found.setdefault("copies", []).append((ranges(copied), list(calls)))
            calls.clear()

        with pytest.raises(RuntimeError):
            model(images(rank, 7)[:, :2])  # fails inside
        calls.clear()
        model(images(rank, 8))
        found["after an error"] = ranges(model), list(calls)

        calls.clear()
        model.stem(images(rank, 9))  # by itself
        found["a part"] = ranges(model), list(calls)

    widest = prepared("minmax")
    train(widest, rank, range(2))
    found["minmax"] = ranges(widest)
    found["accumulated"] = accumulated(rank)
    found["compiled"] = compiled(rank)
    return found


def accumulated(rank: int) -> tuple[dict[str, Tensor], int]:
    """Several forwards under `no_sync` before one backward, under gradient checkpointing."""
    model = prepared()
    parallel = nn.parallel.DistributedDataParallel(model)
    with counted() as calls:
        with parallel.no_sync():
            train(parallel, rank, range(2))
        train(parallel, rank, range(2, 3))
    return ranges(model), len(calls)


def compiled(rank: int) -> dict[str, Tensor]:
    """Return the ranges after training the whole model as one graph, collective included."""
    model = prepared()
    qatkit.calibrate(model, [images(0, 0)], progress=False)
    train(torch.compile(model, fullgraph=True, backend="eager"), rank, range(2))
    return ranges(model)


def expected(observer: str, steps: int) -> dict[str, Tensor]:
    """Return the ranges of the first quantizer in a process that sees the data of all ranks."""
    model = prepared(observer)
    for step in range(steps):
        model(torch.cat([images(rank, step) for rank in range(RANKS)]))
    return {key: value for key, value in ranges(model).items() if key.startswith("stem.0")}


def same(one: object, other: object) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other  # type: ignore


def test_two_ranks(tmp_path: Path) -> None:
    first, second = run_on_two_ranks(work, tmp_path)
    assert all(map(same, tree_leaves(first), tree_leaves(second)))
    assert len(tree_leaves(first)) == len(tree_leaves(second))

    ranges_after, calls = first["trained"]
    assert calls == ["all_reduce"] * 4
    assert all(value == 4 for key, value in ranges_after.items() if "num_batches" in key)
    # The range that both agree on, and not that of one of them.
    low = [min(images(rank, 0).min() for rank in chosen) for chosen in ((0,), (0, 1))]
    assert low[1] < first["first"]["stem.0.input_quantizer.min_val"] < low[0]

    after, calls = first["uneven"]
    assert calls == ["all_reduce"]
    # Rank 0 saw NaN, rank 1 had no such layer: the other's range counts, or there is none.
    assert after["stem.0.input_quantizer.num_batches"] == 5
    assert after["extra.layer.input_quantizer.num_batches"] == 4
    assert (
        after["extra.layer.input_quantizer.max_val"]
        == (ranges_after["extra.layer.input_quantizer.max_val"])
    )
    assert all(torch.isfinite(value).all() for value in after.values())

    assert first["silent"] == []
    assert [calls for _, calls in first["copies"]] == [["all_reduce"]] * 2
    assert first["after an error"][1] == ["all_reduce"]
    assert first["a part"][1] == ["all_reduce"]
    assert first["accumulated"][1] == 3
    # Both ranks calibrated with one batch, and trained with two.
    assert all(value == 4 for key, value in first["compiled"].items() if "num_batches" in key)

    for key, value in expected("minmax", 2).items():
        torch.testing.assert_close(first["minmax"][key], value, rtol=0, atol=0)


def gathering(rank: int) -> dict[str, Any]:
    """Train what `fully_shard` has split, beside a copy that is whole."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    found: dict[str, Any] = {}
    per_tensor = qatkit.QuantConfig(weight=qatkit.QuantSpec(observer="minmax"))
    x = torch.zeros(2, 3, 8, 8)
    torch.manual_seed(0)
    models = [qatkit.prepare(Net(), x, per_tensor).train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    split, whole = models
    # A convolution and its batch norm apart, so that the fold needs a weight of another part.
    for part in (*split.stem[:2], split.body, split.head):
        fully_shard(part)
    fully_shard(split)
    parallel = nn.parallel.DistributedDataParallel(whole, broadcast_buffers=False)
    for model in (split, parallel):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            model(images(rank, step)).square().mean().backward()
            optimizer.step()
    found["messages"] = []
    for call in (
        lambda: qatkit.plan(split, x),
        lambda: qatkit.save(split, "never.safetensors"),
        lambda: qatkit.export_onnx(split, x, "never.onnx"),
    ):
        with pytest.raises(qatkit.QatkitError) as caught:
            call()
        found["messages"].append(str(caught.value))
    report = qatkit.calibrate(split, [images(rank, 7)], method="percentile", progress=False)
    found["calibrated"] = report.samples
    qatkit.freeze_ranges(split).apply()
    found["split"] = get_model_state_dict(split, options=StateDictOptions(full_state_dict=True))
    found["whole"] = whole.state_dict()
    again = qatkit.prepare(Net(), x, per_tensor)
    if rank == 0:
        again.load_state_dict(found["split"])
        found["amax"] = again.stem[0].weight_quantizer.amax, again.stem[0]
    return found


def test_fully_sharded(tmp_path: Path) -> None:
    first, second = run_on_two_ranks(gathering, tmp_path)
    assert first["messages"] == second["messages"]
    assert all("FSDP" in message and "\n" not in message for message in first["messages"])
    assert first["calibrated"] == second["calibrated"] == 8
    parameters = [key for key in first["whole"] if key.endswith(("weight", "bias"))]
    for key in parameters:
        torch.testing.assert_close(first["split"][key], first["whole"][key])
    amax, layer = first["amax"]
    torch.testing.assert_close(amax, (layer.weight * layer.weight_fold_scale()).abs().max())
