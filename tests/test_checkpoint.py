"""One safetensors file: all of the state goes in and comes out, and a bad file changes nothing."""

from __future__ import annotations

import copy
import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import qatkit
from qatkit.calibrate import calibrate
from qatkit.checkpoint import FORMAT, load, save
from qatkit.config import QuantConfig, Rule
from qatkit.errors import MissingExtraError, QatkitError, QatkitTypeError
from qatkit.freeze import freeze_batch_norm, freeze_ranges
from qatkit.modes import disable_quantization, quantizers
from qatkit.nn.batchnorm import statistics_are_frozen
from qatkit.prepare import plan_of, prepare
from qatkit.version import __version__

X = torch.linspace(-2, 3, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


class Block(nn.Module):
    """A residual block, so that a forward is rewritten and a quantizer has two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return self.relu(y)


class Net(nn.Module):
    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.Sequential(Block(), Block())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, classes)
        self.tied = nn.Linear(4, classes)
        self.tied.weight = self.fc.weight
        self.register_buffer("step", torch.tensor(3))
        self.register_buffer("nothing", torch.zeros(0, 2))
        self.register_buffer("transposed", torch.arange(6.0).reshape(2, 3).t())
        self.register_buffer("part", torch.arange(100.0)[7:9])

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.blocks(self.stem(x))).flatten(1)
        return self.fc(x) + self.tied(x)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(1)
    model = prepare(Net(), X, QuantConfig(rules=(Rule("stem", num_bits=6),))).train()
    model(X)
    calibrate(model, [X])
    disable_quantization(model, "tied").apply()
    return model


@pytest.fixture
def model(trained: nn.Module) -> nn.Module:
    return copy.deepcopy(trained)


def snapshot(model: nn.Module) -> dict[str, Any]:
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    return {"tensors": tensors, "types": [type(m) for m in model.modules()]}


def unchanged(model: nn.Module, before: dict[str, Any]) -> bool:
    now = snapshot(model)
    same = now["tensors"].keys() == before["tensors"].keys()
    return (
        same
        and now["types"] == before["types"]
        and all(torch.equal(now["tensors"][n], t) for n, t in before["tensors"].items())
    )


def names_in(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


def flags(model: nn.Module) -> dict[str, Any]:
    return {path: (q.quantize, q.observe) for path, q in quantizers(model)}


def step(model: nn.Module) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = model.train()(X).square().mean()
    loss.backward()
    optimizer.step()
    return loss


@pytest.mark.parametrize("frozen", [False, True])
def test_round_trip(model: nn.Module, tmp_path: Path, frozen: bool) -> None:
    if frozen:
        freeze_ranges(model).apply()
        freeze_batch_norm(model.blocks[1]).apply()
    path = tmp_path / "net.safetensors"
    save(model, path)
    fresh = Net()
    parameters = dict(fresh.named_parameters())
    twin = load(fresh, path)
    assert twin is fresh
    assert all(parameter is parameters[n] for n, parameter in twin.named_parameters())
    assert plan_of(twin) == plan_of(model)
    assert flags(twin) == flags(model)
    ours, theirs = twin.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert statistics_are_frozen(twin.blocks[1].bn1) == frozen
    assert not statistics_are_frozen(twin.blocks[0].bn1)
    assert torch.equal(twin.eval()(X), model.eval()(X))
    for _ in range(2):
        assert torch.equal(step(twin), step(model))
    a, b = twin.state_dict(), model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_the_file(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save(model, str(path))
    with safe_open(path, framework="pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    header = json.loads(metadata["qatkit"])
    assert (header["format"], header["version"]) == (FORMAT, __version__)
    assert header["aliases"]["tied.weight"] == "fc.weight"
    assert "tied.weight" not in names
    assert names | set(header["aliases"]) == set(model.state_dict())
    assert path.stat().st_size < 200_000
    assert names_in(tmp_path) == ["net.safetensors"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_into_a_prepared_model(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save(model, path)
    step(model)
    freeze_batch_norm(model).apply()
    freeze_ranges(model).apply()
    twin = load(model, path)
    assert not statistics_are_frozen(twin.blocks[0].bn1)
    assert {observe for _, observe in flags(twin).values()} == {"training"}
    with torch.no_grad():
        assert torch.equal(twin.eval()(X), load(Net(), path).eval()(X))


def test_replaces_a_file_and_follows_a_link(model: nn.Module, tmp_path: Path) -> None:
    target, link = tmp_path / "real", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    save(model, link)
    assert link.is_symlink()
    load(Net(), target)


@pytest.mark.parametrize("place", ["missing/net", ".", "file/net"])
def test_a_path_that_cannot_be_written(model: nn.Module, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(QatkitError, match="cannot be written") as caught:
        save(model, tmp_path / place)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names_in(tmp_path) == ["file"]


def test_a_write_that_fails_keeps_the_old_file(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(QatkitError, match="No space left on device"):
        save(model, path)
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["net"]


def test_save_refuses(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(QatkitError, match=r"Net is not prepared; call qatkit\.prepare"):
        save(Net(), tmp_path / "x")
    with pytest.raises(QatkitTypeError, match=r"not a torch\.nn\.Module"):
        save(None, tmp_path / "x")  # type: ignore[arg-type]
    model.register_buffer("ghost", torch.zeros(2, device="meta"))
    with pytest.raises(QatkitError, match=r"'ghost' is a tensor without data"):
        save(model, tmp_path / "x")
    assert names_in(tmp_path) == []


class Extra(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"a": 1}

    def set_extra_state(self, state: Any) -> None: ...


def test_save_refuses_what_is_no_tensor(tmp_path: Path) -> None:
    net = prepare(nn.Sequential(nn.Linear(2, 2), Extra(2, 2)), torch.ones(1, 2))
    with pytest.raises(QatkitError, match=r"'1\._extra_state' is a dict"):
        save(net, tmp_path / "x")


# --------------------------------------------------------------------------------- bad files


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Change the header and the tensors of a file."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["qatkit"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header, tensors)
    save_file(tensors, path, {"qatkit": json.dumps(header)})


def quantizer_named(name: str) -> Callable[[Any, Any], None]:
    def change(header: Any, tensors: Any) -> None:
        header["plan"]["quantizers"][0]["path"] = name

    return change


def site_named(name: str) -> Callable[[Any, Any], None]:
    def change(header: Any, tensors: Any) -> None:
        header["plan"]["blocks"][0]["sites"][0]["quantizer"] = name

    return change


BROKEN: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "format": (lambda h, t: h.update(format=99), "has format 99 of qatkit .*reads format 1"),
    "no plan": (lambda h, t: h.pop("plan"), "KeyError: 'plan'"),
    "odd plan": (lambda h, t: h.update(plan=[1]), "plan cannot be used"),
    "bad bits": (
        lambda h, t: h["plan"]["quantizers"][0]["spec"].update(num_bits=99),
        r"QuantSpec\(num_bits=99\)",
    ),
    "unknown field": (lambda h, t: h["plan"]["config"].update(new=1), "plan cannot be used"),
    "missing tensor": (lambda h, t: t.pop("stem.weight"), "lacks 'stem.weight', which Net has"),
    "extra tensor": (lambda h, t: t.update(a=torch.ones(1)), "has 'a', which Net lacks"),
    "shape": (
        lambda h, t: t.update({"stem.bias": torch.ones(5)}),
        r"'stem.bias' is \(5,\) torch.float32 and in Net \(4,\)",
    ),
    "dtype": (lambda h, t: t.update({"stem.bias": torch.ones(4).half()}), r"torch\.float16 and in"),
    "alias": (lambda h, t: h["aliases"].update({"tied.weight": "gone"}), "lacks the tensor 'gone'"),
    "switches": (lambda h, t: h["quantizers"].popitem(), "differ in"),
    "observe": (
        lambda h, t: next(iter(h["quantizers"].values())).update(observe="now"),
        "observe='now'",
    ),
    "frozen": (lambda h, t: h["frozen_batch_norms"].append("stem"), "differ in 'stem'"),
    "quantizer": (quantizer_named("nowhere.input_quantizer"), "fits nowhere in Net"),
    "code": (quantizer_named('stem.x"] or exit() or ["'), "fits nowhere in Net"),
    "code in a site": (site_named("a or exit()"), "which is no quantizer of it"),
    "layer": (lambda h, t: h["plan"]["layers"][0].update(path="gone"), "expects a .* at 'gone'"),
    "block": (lambda h, t: h["plan"]["blocks"][0].update(path="gone"), "'gone'"),
    "node": (
        lambda h, t: h["plan"]["blocks"][0]["sites"][0].update(source=999),
        "plan cannot be used",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("fresh", [True, False], ids=["float", "prepared"])
def test_a_broken_file_changes_nothing(
    case: str, fresh: bool, model: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "net.safetensors"
    save(model, path)
    change, message = BROKEN[case]
    rewritten(path, change)
    target = Net() if fresh else model
    before = snapshot(target)
    other = f"{message}|prepared by another plan"
    with pytest.raises(QatkitError, match=message if fresh else other) as caught:
        load(target, path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert unchanged(target, before)
    assert (plan_of(target) is None) == fresh


def test_files_of_another_kind(tmp_path: Path) -> None:
    target = Net()
    before = snapshot(target)
    text, plain, truncated = tmp_path / "text", tmp_path / "plain", tmp_path / "truncated"
    text.write_text("hello, this is text")
    save_file({"a": torch.ones(2)}, plain)
    truncated.write_bytes(plain.read_bytes()[:-3])
    torch.save({"a": 1}, tmp_path / "pickle")
    for name, message in (
        ("gone", "no such file; give one that qatkit.save wrote"),
        ("text", "cannot be read as safetensors"),
        ("truncated", "cannot be read as safetensors"),
        ("pickle", "cannot be read as safetensors"),
        (".", "cannot be read as safetensors"),
        ("plain", "holds tensors but no plan"),
    ):
        with pytest.raises(QatkitError, match=message) as caught:
            load(target, tmp_path / name)
        assert "\n" not in str(caught.value)
    assert unchanged(target, before)


def test_another_model(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save(model, path)
    for target, message in (
        (Net(classes=7), r"'fc.weight' is \(4, 4\) torch.float32 and in Net \(7, 4\)"),
        (nn.Sequential(nn.Linear(2, 2)), "Sequential"),
        (nn.Linear(2, 2), "Linear"),
    ):
        before = snapshot(target)
        with pytest.raises(QatkitError, match=message):
            load(target, path)
        assert unchanged(target, before)
    with pytest.raises(QatkitError, match="is prepared by another plan"):
        load(prepare(Net(), X), path)
    with pytest.raises(QatkitTypeError, match=r"not a torch\.nn\.Module"):
        load(None, path)  # type: ignore[arg-type]


def test_without_safetensors(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.safetensors"
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'qatkit\[save\]'"):
        save(model, path)
    with pytest.raises(MissingExtraError, match=r"pip install 'qatkit\[save\]'"):
        load(Net(), path)


def test_views_of_one_storage(tmp_path: Path) -> None:
    def net() -> nn.Module:
        made = nn.Sequential(nn.Linear(4, 4))
        base = torch.arange(8.0)
        made.register_buffer("whole", base)
        made.register_buffer("square", base.view(2, 4))
        made.register_buffer("head", base[:3])
        return made

    model = prepare(net(), torch.ones(1, 4))
    save(model, tmp_path / "x")
    twin = load(net(), tmp_path / "x")
    assert torch.equal(twin.square, model.square)
    assert torch.equal(twin.head, model.head)


@pytest.mark.parametrize("observer", ["minmax", "lsq"])
def test_the_widths_of_a_schedule(tmp_path, observer):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    x = torch.randn(16, 8)
    spec = qatkit.QuantSpec(observer=observer, num_bits=4)
    model = qatkit.prepare(net(), x, qatkit.QuantConfig(activation=spec))
    qatkit.calibrate(model, [x], progress=False)
    schedule = qatkit.QATSchedule(model, 4, bits={0: 8, 1: 6, 2: 4})
    schedule.step()
    qatkit.save(model, tmp_path / "model.safetensors")
    again = qatkit.load(net(), tmp_path / "model.safetensors")
    assert again[0].input_quantizer.spec.num_bits == 6
    assert torch.equal(again.eval()(x), model.eval()(x))
