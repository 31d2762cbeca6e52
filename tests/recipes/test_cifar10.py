"""The CIFAR-10 recipe on a few made-up images, and on the real ones where they are."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("tqdm")

RECIPE = Path(__file__).parents[2] / "recipes" / "cifar10.py"
FIELDS = ["float_top1", "ptq_top1", "qat_top1", "onnx_top1", "flips", "seconds"]
LOADER = """
import numpy as np

def arrays(split):
    count = {"train": 96, "test": 40}[split]
    rng = np.random.default_rng(count)
    labels = np.arange(count) % 10
    noise = rng.integers(0, 100, (count, 32, 32, 3))
    return (noise + 15 * labels[:, None, None, None]).astype(np.uint8), labels.astype(np.int64)
"""


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cifar10_recipe", RECIPE)
    assert spec
    assert spec.loader
    module = sys.modules["cifar10_recipe"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(recipe: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder and a float network of random weights."""
    root = tmp_path_factory.mktemp("cifar10")
    (root / "load.py").write_text(LOADER)
    torch.manual_seed(0)
    torch.save(recipe.ResNet(3).state_dict(), root / "net.pt")
    return root


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    return [
        *("--net=resnet20", f"--init={folder / 'net.pt'}", f"--data={folder}", "--images=64"),
        *("--batch-size=16", "--calibration-images=32", f"--onnx={out / 'a.onnx'}"),
        *(f"--json={out / 'a.json'}", *more),
    ]


def test_ptq_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    given = arguments(folder, tmp_path, "--mode=ptq", "--wbits=8", "--abits=8")
    command = [sys.executable, str(RECIPE), *given]
    environment = {"PYTHONPATH": str(RECIPE.parents[1]), "PATH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "a.json").read_text())
    assert list(numbers) == FIELDS
    assert numbers["qat_top1"] is None
    assert numbers["flips"] <= 2
    assert abs(numbers["onnx_top1"] - numbers["ptq_top1"]) <= 100 * numbers["flips"] / 40
    assert "W8A8, 40 test images" in done.stdout
    assert "0 ERROR, 0 WARN" in done.stdout


def test_qat_is_the_same_for_the_same_seed(
    recipe: ModuleType, folder: Path, tmp_path: Path
) -> None:
    runs = []
    for index, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(index)
        out.mkdir()
        bits = ("--mode=qat", "--wbits=2", "--abits=3", f"--seed={seed}")
        numbers = recipe.main(arguments(folder, out, *bits))
        assert list(numbers) == FIELDS
        assert numbers["qat_top1"] is not None
        assert json.loads((out / "a.json").read_text()) == numbers
        runs.append((out / "a.onnx").read_bytes())
    assert runs[0] == runs[1] != runs[2]


def test_two_processes_train_like_one(recipe: ModuleType, folder: Path, tmp_path: Path) -> None:
    weights = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
        given = arguments(folder, out, "--mode=qat", "--wbits=4", "--abits=4")
        command = [sys.executable, *launcher, str(RECIPE), *given]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RECIPE.parents[1])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("qat_top1") == 1  # one process prints
        assert list(json.loads((out / "a.json").read_text())) == FIELDS
        file = onnx.load(out / "a.onnx")
        weights.append(
            [onnx.numpy_helper.to_array(each) for each in file.graph.initializer if each.dims]
        )
    for one, two in zip(*weights, strict=True):
        steps = abs(one.astype("float64") - two).max() / max(abs(one).max(), 1e-12)
        assert steps < 1 / 4  # one step of the grid of the coarsest weights at most


def test_which_tensors_have_few_bits(recipe: ModuleType) -> None:
    net = recipe.ResNet(3).eval()
    config = recipe.quantization(recipe.Knobs(mode="ptq", wbits=3, abits=4))
    plan = recipe.qatkit.plan(net, torch.zeros(1, 3, 32, 32), config)
    few = {each.path for each in plan.quantizers if each.spec.num_bits < 8}
    inner = {f"layer{s}.{b}.conv{c}" for s in (1, 2, 3) for b in (0, 1, 2) for c in (1, 2)}
    assert few == {f"{each}.{role}_quantizer" for each in inner for role in ("input", "weight")}
    assert all(each.spec.num_bits == 8 for each in plan.quantizers if each.path not in few)


@pytest.mark.parametrize(("net", "layers"), [("resnet20", 20), ("resnet32", 32), ("resnet56", 56)])
def test_depths(net: str, layers: int, recipe: ModuleType) -> None:
    made = recipe.ResNet(recipe.NETS[net])
    weighted = [one for one in made.modules() if isinstance(one, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(weighted) == layers
    assert made(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_augmented_images_are_shifted_and_mirrored(recipe: ModuleType) -> None:
    pixels = torch.arange(1, 1 + 32 * 32).reshape(1, 1, 32, 32).expand(64, 3, -1, -1)
    changed = recipe.augment(pixels, torch.Generator().manual_seed(0))
    assert changed.shape == pixels.shape
    padded = torch.nn.functional.pad(pixels[0], (4, 4, 4, 4))
    windows = [
        [padded[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)],
        [padded[:, i : i + 32, j : j + 32].flip(2) for i in range(9) for j in range(9)],
    ]
    kinds = [
        next(k for k in (0, 1) if any(torch.equal(image, one) for one in windows[k]))
        for image in changed
    ]
    assert 16 < sum(kinds) < 48
    again = recipe.augment(pixels, torch.Generator().manual_seed(0))
    assert torch.equal(changed, again)


def test_the_model_is_that_of_the_checkpoints(recipe: ModuleType) -> None:
    folder = recipe.SHARED_DATA
    if not (folder / "resnet56.pt").is_file():
        pytest.skip(f"{folder} has no checkpoints")
    for net, file in (("resnet20", "resnet20_jpeg.pt"), ("resnet56", "resnet56.pt")):
        recipe.load_net(recipe.Knobs(net=net, init=str(folder / file)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--wbits=1"], "--wbits 1: give 2 to 8"),
        (["--abits=9"], "--abits 9: give 2 to 8"),
        (["--images=97"], "the folder has 96 for training; give fewer"),
        (["--images=0"], "--images 0: give 1 or more"),
        (["--images=15"], "--images 15: give 16 or more, one --batch-size"),
        (["--data=nowhere"], "has no load.py; give the folder of the CIFAR-10 files"),
        (["--init=nowhere.pt"], "give a file of torch.save"),
        (["--init={folder}/load.py"], "is no file of torch.save"),
        (["--net=resnet56"], "lacks 'layer1.3.bn1.bias'; give a checkpoint of resnet56"),
        (["--onnx=no/where.onnx"], "its folder does not exist; make it"),
        (["--json=no/where.json"], "its folder does not exist; make it"),
    ],
)
def test_a_bad_argument_is_one_line_with_a_remedy(
    given: list[str],
    message: str,
    recipe: ModuleType,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = [argument.format(folder=folder) for argument in given]
    with pytest.raises(SystemExit) as stopped:
        recipe.main([*arguments(folder, tmp_path, "--mode=ptq"), *more])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "a.json").exists()
