"""The ImageNet recipe on a few made-up images: alone, in two processes, with wrong arguments."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("torchvision")
pytest.importorskip("onnxruntime")
from PIL import Image

RECIPE = Path(__file__).parents[2] / "recipes" / "imagenet.py"
CLASSES = ("dark", "grey", "light")
QUICK = ["--model=resnet18", "--image-size=32", "--batch-size=4", "--workers=0", "--device=cpu"]


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("imagenet_recipe", RECIPE)
    assert spec
    assert spec.loader
    module = sys.modules["imagenet_recipe"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of class folders; the classes differ in brightness."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for level, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(80 * level, 80 * level + 60, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{index}.png")
    return root


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ("nvidia", []),
        ("ti", ["--epochs=2", "--amp=bfloat16"]),
        ("learned", ["--config=tensorrt-w4a4"]),
    ],
)
def test_alone(
    settings: str, more: list[str], recipe: ModuleType, images: Path, tmp_path: Path
) -> None:
    out = {name: str(tmp_path / f"a.{name}") for name in ("onnx", "json")}
    arguments = [f"--data={images}", f"--settings={settings}", "--epochs=1", *QUICK, *more]
    numbers = recipe.main([*arguments, *(f"--{name}={path}" for name, path in out.items())])
    assert json.loads(Path(out["json"]).read_text()) == numbers
    assert set(numbers) == {"float_top1", "ptq_top1", "qat_top1", "seconds"}
    assert all(0 <= numbers[f"{name}_top1"] <= 100 for name in ("float", "ptq", "qat"))
    assert Path(out["onnx"]).is_file()


def test_settings_are_defaults_that_options_override(recipe: ModuleType) -> None:
    nvidia = recipe.parse(["--data=x"])
    assert (nvidia.calibration, nvidia.freeze_ranges_at, nvidia.lr) == ("percentile", 0, 1e-3)
    ti = recipe.parse(["--data=x", "--settings=ti", "--lr=0.5"])
    assert (ti.calibration, ti.freeze_ranges_at, ti.lr) == ("shrink", -1, 0.5)


def test_two_processes(images: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *(str(RECIPE), f"--data={images}", "--epochs=1", "--max-steps=1", *QUICK),
        *(f"--onnx={tmp_path / 'a.onnx'}", f"--json={tmp_path / 'a.json'}"),
    ]
    root = str(RECIPE.parents[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "a.onnx").is_file()
    numbers = json.loads((tmp_path / "a.json").read_text())
    assert numbers["float_top1"] * 9 / 100 == pytest.approx(round(numbers["float_top1"] * 0.09))
    assert done.stdout.count("float_top1") == 1  # one process prints


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "give train/ and val/ with class folders"),
        (["--data", "{images}", "--model", "resnet19"], "no such classifier"),
        (["--data", "{images}", "--weights", "nowhere.pt"], "no such file or weights"),
        (["--data", "{images}", "--batch-size", "100"], "are fewer than a step"),
        (["--data", "{images}", "--batch-size", "0"], "give 1 or more"),
        (["--data", "{images}", "--onnx", "no/where.onnx"], "its folder does not exist"),
    ],
)
def test_a_bad_argument_is_one_line_with_a_remedy(
    arguments: list[str],
    message: str,
    recipe: ModuleType,
    images: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [argument.format(images=images) for argument in arguments]
    with pytest.raises(SystemExit) as stopped:
        recipe.main([*QUICK, *given])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
