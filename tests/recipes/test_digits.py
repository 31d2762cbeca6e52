"""The recipe end to end: on the digits, on a folder of images, and with wrong arguments."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
from PIL import Image

RECIPE = Path(__file__).parents[2] / "recipes" / "digits.py"
CLASSES = ("dark", "grey", "light")


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits_recipe", RECIPE)
    assert spec
    assert spec.loader
    module = sys.modules["digits_recipe"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RECIPE), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def table(output: str) -> dict[str, str]:
    """Return the rows of the table at the end by their name, in the first 22 columns."""
    lines = output.partition(" top-1\n")[2].splitlines()
    return {line[:22].strip(): line[22:].strip() for line in lines if not line.startswith(" ")}


def number(text: str) -> float:
    return float(text.split()[0])


def make_images(root: Path, per_class: int = 8, size: int = 40) -> Path:
    """Write a tree of class folders; the classes differ in brightness."""
    rng = np.random.default_rng(0)
    for level, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for index in range(per_class):
            pixels = rng.integers(80 * level, 80 * level + 60, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


@pytest.mark.slow
def test_digits(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    rows = table(done.stdout)
    print(done.stdout)
    top1 = {name: number(rows[name]) for name in ("float", "PTQ", "QAT", "ONNX Runtime")}
    assert top1["float"] >= 97
    assert top1["PTQ"] >= top1["float"] - 0.5
    assert top1["QAT"] >= top1["float"] - 0.5
    assert number(rows["differing predictions"]) <= 2
    assert abs(top1["ONNX Runtime"] - top1["QAT"]) <= 100 * 2 / 450 + 0.01
    assert "opset 13" in rows["file"]
    assert (tmp_path / "digits_qdq.onnx").stat().st_size == pytest.approx(
        1e6 * number(rows["file"].split(", ")[1]), abs=1e5
    )


@pytest.mark.slow
@pytest.mark.parametrize("two_trees", [False, True])
def test_a_folder_of_images_and_another_model(two_trees: bool, tmp_path: Path) -> None:
    for part in ("train", "val") if two_trees else (".",):
        make_images(tmp_path / "images" / part)
    quick = ["--epochs=1", "--qat-epochs=1", "--batch-size=4", "--image-size=32"]
    done = run(tmp_path, "--data=images", "--model=mobilenet_v2", "--out=small.onnx", *quick)
    assert done.returncode == 0, done.stderr
    images = 24 if two_trees else 6
    assert table(done.stdout)["differing predictions"].endswith(f"of {images}")
    assert (tmp_path / "small.onnx").is_file()


def one_file(folder: Path) -> None:
    (folder / "cat").mkdir()
    (folder / "cat" / "notes.txt").touch()


def no_val(folder: Path) -> None:
    make_images(folder / "train", per_class=1)


def other_classes(folder: Path) -> None:
    make_images(folder / "train", per_class=1)
    make_images(folder / "val" / "more", per_class=1)


BAD_DATA = {
    "missing": (lambda folder: folder.rmdir(), "no such folder; give one that holds"),
    "empty": (lambda folder: None, "should hold a folder of images per class"),
    "no image": (one_file, "should hold a folder of images per class"),
    "no val": (no_val, "has train/ but no val/; add it"),
    "other classes": (other_classes, "differ in class folders"),
    "few": (lambda folder: make_images(folder, per_class=1), "too few images to split; give 4"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line_with_a_remedy(
    case: str, recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = BAD_DATA[case]
    folder = tmp_path / "images"
    folder.mkdir()
    damage(folder)
    with pytest.raises(SystemExit) as stopped:
        recipe.main(["--data", str(folder)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet19"], "no such classifier; resnet"),
        (["--out", "nowhere/x.onnx"], "its folder does not exist; make it"),
        (["--config", "tensorrt-int9"], "tensorrt-int8"),
        (["--weights", "nowhere.pt"], "give a file of torch.save"),
    ],
)
def test_a_bad_argument_is_one_line_with_a_remedy(
    arguments: list[str], message: str, recipe: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        recipe.main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
