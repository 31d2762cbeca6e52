"""The sweep over torchvision: one row, the parts of a model, the limits, and the tables."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("onnxruntime")

import qatkit

# One for each way to build a network, and how many of their weighted operators may stay float.
REPRESENTATIVES = {
    "convnext_tiny": 0,
    "deeplabv3_mobilenet_v3_large": 0,
    "efficientnet_b0": 0,
    "fasterrcnn_mobilenet_v3_large_320_fpn": 0,
    "googlenet": 0,
    "mnasnet0_5": 0,
    "mobilenet_v3_small": 0,
    "raft_small": 1,  # the correlation of two feature maps
    "regnet_y_400mf": 0,
    "shufflenet_v2_x0_5": 0,
    "squeezenet1_1": 0,
    "swin_t": 0,
}

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def zoo() -> SimpleNamespace:
    """The modules of the script, imported as it imports them."""
    names = ("zoo_models", "zoo_row", "zoo")
    sys.path.insert(0, str(SCRIPTS))
    try:
        loaded: list[ModuleType] = [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(SCRIPTS))
    return SimpleNamespace(models=loaded[0], row=loaded[1], main=loaded[2])


def options(zoo, *arguments):
    return zoo.main.parse(list(arguments))


@pytest.mark.slow
@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_a_representative_goes_the_whole_way(zoo, name, tmp_path):
    row = zoo.row.run(name, 0, 13, tmp_path, lambda _: None)
    assert row["status"] == "ok", row["reason"]
    assert row["files"] == "whole"
    assert row["error"] == 0
    assert row["weighted"] - row["quantized"] <= REPRESENTATIVES[name]


def test_the_row_of_a_model_counts_what_is_in_its_file(zoo, tmp_path):
    reported = []
    row = zoo.row.run("mobilenet_v3_small", 0, 13, tmp_path, lambda one: reported.append({**one}))
    assert row["status"] == "ok", row["reason"]
    assert (row["kind"], row["input"], row["files"]) == ("classification", "2x3x64x64", "whole")
    assert row["quantized"] == row["weighted"] == 54
    assert row["adds_quantized"] == row["adds"] == 6
    assert row["error"] == row["warn"] == 0
    assert row["codes"] > 1e6
    assert row["differ"] <= row["codes"] * 1e-5
    moved, parameters = map(int, row["moved"].split("/"))
    assert 0.9 * parameters < moved <= parameters == 142
    assert [one["phase"] for one in reported] == list(zoo.row.PHASES)
    assert all(row[phase] >= 0 for phase in zoo.row.PHASES)


def test_an_error_is_the_reason_and_its_phase_is_named(zoo, tmp_path, monkeypatch):
    def build(name, seed):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 1, bias=False))
        return zoo.models.Case(name, "classification", model.eval(), (torch.randn(2, 3, 4, 4),))

    def infinite(case, model):
        return model(*case.args).sum() * float("inf")

    monkeypatch.setattr(zoo.row, "build", build)
    monkeypatch.setattr(zoo.row, "loss_of", infinite)
    row = zoo.row.run("mine", 0, 13, tmp_path, lambda _: None)
    assert (row["status"], row["phase"]) == ("failed", "train")
    assert "the gradient of 0.weight and 2 more is not finite" in row["reason"]
    assert "export" not in row


class Boxes(nn.Module):
    """Exports in parts only: its own forward cannot be traced."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.heads = nn.ModuleDict({"box": nn.Conv2d(8, 4, 1), "mask": nn.ConvTranspose2d(8, 2, 2)})

    def forward(self, x):
        x = self.backbone(x)
        found = torch.linalg.eig(x[0, 0]).eigenvalues.abs()
        return self.heads["box"](x), self.heads["mask"](x), found


def test_a_model_that_does_not_export_is_exported_in_parts(zoo, tmp_path):
    case = zoo.models.Case("boxes", "detection", Boxes().eval(), (torch.randn(2, 3, 8, 8),))
    zoo.models.settle(case)
    row = {"model": "boxes", "reason": ""}
    course = zoo.row.Course(row, lambda _: None)
    zoo.row.train(course, case)
    zoo.row.export(course, case, 13, tmp_path)
    assert not row["reason"]
    assert row["files"].split() == ["backbone", "heads.box", "heads.mask"]
    assert row["quantized"] == row["weighted"] == 3
    assert "eig" in row["whole"]
    assert {path.stem for path in tmp_path.glob("*.onnx")} == set(row["files"].split())


def test_float_operators_and_adds_are_counted_as_float(zoo, tmp_path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            x = x + self.one(x)
            return self.two(x) + x.sigmoid()

    x = torch.randn(2, 3, 8, 8)
    rules = (qatkit.Rule("two", enabled=False),)
    model = qatkit.prepare(Mixed(), x, qatkit.QuantConfig(rules=rules))
    qatkit.calibrate(model, [x], progress=False)
    qatkit.export_onnx(model, x, tmp_path / "a.onnx")
    import onnx

    from qatkit.export.lint import open_view

    counts = zoo.row.structure(open_view(onnx.load(tmp_path / "a.onnx")))
    assert counts == {"weighted": 2, "quantized": 1, "adds": 2, "adds_quantized": 1}


@pytest.mark.parametrize(
    ("limits", "reason"),
    [(["--time-limit", "0.1"], "limit of 0.1 s"), (["--memory-limit", "20"], "MB of 20 MB")],
)
def test_a_model_over_a_limit_is_killed_and_keeps_its_row(zoo, limits, reason):
    if "memory" in limits[0] and not Path("/proc/self/status").exists():
        pytest.skip("the resident memory of a process is read from /proc")
    row = zoo.main.measure("resnet18", options(zoo, *limits))
    assert (row["model"], row["status"]) == ("resnet18", "failed")
    assert reason in row["reason"]


def test_the_tables_and_a_resumed_sweep(zoo, tmp_path, monkeypatch, capsys):
    ran = []

    def measure(name, args):
        ran.append(name)
        bad = {"status": "failed", "phase": "export", "reason": "a | b"}
        return {"model": name, "status": "ok", "quantized": 1, "weighted": 2} | (
            bad if name == "resnet34" else {}
        )

    monkeypatch.setattr(zoo.main, "measure", measure)
    table, text = tmp_path / "zoo.csv", tmp_path / "zoo.md"
    given = ["zoo.py", "--csv", str(table), "--markdown", str(text), "--models"]
    monkeypatch.setattr(sys, "argv", [*given, "resnet34"])
    zoo.main.main()
    monkeypatch.setattr(sys, "argv", [*given, "resnet[13]?", "--resume"])
    zoo.main.main()
    assert ran == ["resnet34", "resnet18"]
    monkeypatch.setattr(sys, "argv", [*given, "resnet18"])
    zoo.main.main()
    assert ran[2:] == ["resnet18"]
    assert list(zoo.main.read_csv(table)) == ["resnet18", "resnet34"]
    lines = text.read_text().splitlines()
    assert "1 of 2 models went the whole way" in text.read_text()
    assert lines[-2].startswith("| resnet18 |")
    assert "| 1/2 |" in lines[-2]
    assert "2 of 4 weighted operators" in text.read_text()
    assert lines[-1].endswith("| export: a \\| b |")
    assert "resnet18 ok 1 2" in capsys.readouterr().out


def test_every_float_model_of_torchvision_is_listed_once(zoo):
    names = zoo.models.list_models("*")
    assert len(names) == len(set(names)) > 100
    assert not any(name.startswith("quantized_") for name in names)
    assert zoo.models.list_models("resnet1?", "vit_b_32") == ["resnet18", "vit_b_32"]
