"""Handwritten digits: from a float torchvision model to a fine-tuned, verified INT8 ONNX file.

    python recipes/digits.py                                  # scikit-learn's digits
    python recipes/digits.py --data DIR --model mobilenet_v2  # your images, your model

DIR is a tree of class folders, DIR/cat/1.jpg, of which a quarter is kept for testing; or two such
trees, DIR/train and DIR/val. With --weights the training starts from a checkpoint of your own.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import onnxruntime
import torch
import torchvision
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2 as T
from tqdm import tqdm

import qatkit


def knob(default: Any, text: str) -> Any:
    """Return a field of `Knobs` that is documented as a command-line option."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass
class Knobs:
    """Everything there is to turn; each field is a command-line option."""

    data: str = knob("", "folder of images, see above; empty: scikit-learn's digits")
    model: str = knob("resnet18", "any torchvision classification model")
    weights: str = knob("", "state dict to start from; tensors of another shape are left out")
    out: str = knob("digits_qdq.onnx", "the file to write")
    config: str = knob("tensorrt-int8", "preset of the quantization")
    opset: int = knob(13, "ONNX opset")
    image_size: int = knob(0, "height and width of an image; 0: what suits the model and the data")
    batch_size: int = knob(32, "images per step")
    epochs: int = knob(5, "epochs of float training")
    lr: float = knob(0.03, "peak learning rate of the float training")
    qat_epochs: int = knob(2, "epochs of quantization-aware fine-tuning")
    qat_lr: float = knob(0.003, "peak learning rate of the fine-tuning")
    weight_decay: float = knob(5e-4, "weight decay of both trainings")
    calibration_batches: int = knob(16, "training batches that set the first ranges")
    device: str = knob("cuda" if torch.cuda.is_available() else "cpu", "where to train")
    seed: int = knob(0, "seed of everything")


# ---------------------------------------------------------------------------------------- data


def digits(size: int) -> tuple[Dataset[Any], Dataset[Any], int]:
    """Return training set, test set and class count of 1,797 real digits, a quarter for testing."""
    bunch = load_digits()
    x = torch.from_numpy(bunch.images).float()[:, None] / 8 - 1  # (N, 1, 8, 8), -1..1
    x = nn.functional.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    data = TensorDataset(x.expand(-1, 3, -1, -1), torch.from_numpy(bunch.target).long())
    train, test = split(bunch.target)
    return Subset(data, train), Subset(data, test), 10


def images(root: Path, size: int) -> tuple[Dataset[Any], Dataset[Any], int]:
    """Return training set, test set and class count of an ImageFolder tree."""
    to_float = [
        T.ToImage(),
        T.ToDtype(torch.float32, scale=True),
        T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    augmented = T.Compose(
        [T.RandomResizedCrop(size, scale=(0.5, 1.0)), T.RandomHorizontalFlip(), *to_float]
    )
    plain = T.Compose([T.Resize(size * 8 // 7), T.CenterCrop(size), *to_float])
    if not root.is_dir():
        fail(f"--data {root}: no such folder; give one that holds a folder of images per class")
    two_trees = (root / "train").is_dir()
    if two_trees and not (root / "val").is_dir():
        fail(f"--data {root}: has train/ but no val/; add it, or give a tree of class folders")
    try:
        train: Any = ImageFolder(root / "train" if two_trees else root, augmented)
        test: Any = ImageFolder(root / "val" if two_trees else root, plain)
    except FileNotFoundError as error:
        first_line = str(error).splitlines()[0].rstrip(".")
        fail(f"--data {root}: {first_line}; it should hold a folder of images per class")
    classes = train.classes
    if test.classes != classes:
        odd = sorted(set(classes) ^ set(test.classes))
        fail(f"--data {root}: train/ and val/ differ in class folders {odd}; make them the same")
    if not two_trees:
        try:
            chosen = split(train.targets)
        except ValueError:
            fail(f"--data {root}: too few images to split; give 4 or more of each class")
        train, test = Subset(train, chosen[0]), Subset(test, chosen[1])
    return train, test, len(classes)


def split(targets: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the indices of three quarters for training and one for testing, always the same."""
    everything = list(range(len(targets)))
    train, test = train_test_split(everything, test_size=0.25, stratify=targets, random_state=0)
    return train, test


# --------------------------------------------------------------------------------------- model


def choose_size(knobs: Knobs) -> int:
    """Return the image size: what the model was made for, smaller for the digits' 8x8 pixels."""
    known = torchvision.models.list_models(module=torchvision.models)
    if knobs.model not in known:
        close = difflib.get_close_matches(knobs.model, known, n=3, cutoff=0)
        fail(f"--model {knobs.model}: torchvision has no such classifier; {', '.join(close)} exist")
    if knobs.image_size:
        return knobs.image_size
    fixed_size = knobs.model.startswith(("vit", "maxvit", "inception"))
    if knobs.data or fixed_size:
        weights = next(iter(torchvision.models.get_model_weights(knobs.model)))
        return int(weights.transforms().crop_size[0])
    return 32 if knobs.model.startswith(("resne", "wide_resnet")) else 64


def build_model(knobs: Knobs, size: int, classes: int) -> nn.Module:
    """Return the torchvision model, with a stem for small images where it is a ResNet."""
    options: dict[str, Any] = {}
    if knobs.model in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    elif knobs.model.startswith("vit"):
        options = {"image_size": size}
    elif knobs.model.startswith("maxvit"):
        options = {"input_size": (size, size)}
    model: nn.Module = torchvision.models.get_model(knobs.model, num_classes=classes, **options)
    stem = getattr(model, "conv1", None)
    if size < 64 and isinstance(stem, nn.Conv2d) and stem.kernel_size == (7, 7):
        model.conv1 = nn.Conv2d(3, stem.out_channels, 3, padding=1, bias=False)
    if knobs.weights:
        try:
            state = torch.load(knobs.weights, map_location="cpu", weights_only=True)
        except OSError as error:
            fail(f"--weights {knobs.weights}: {error.strerror}; give a file of torch.save")
        own = model.state_dict()
        fits = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
        model.load_state_dict(fits, strict=False)
        print(f"{knobs.weights}: {len(fits)} of the model's {len(own)} tensors loaded")
    return model.to(knobs.device)


# ------------------------------------------------------------------------- training and testing


def fit(
    model: nn.Module,
    loader: DataLoader[Any],
    knobs: Knobs,
    epochs: int,
    lr: float,
    schedule: qatkit.QATSchedule | None = None,
) -> None:
    """Train with SGD under a one-cycle learning rate; ``schedule`` is stepped once an epoch."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=knobs.weight_decay
    )
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=max(1, epochs * len(loader))
    )
    kind = "QAT" if schedule else "float"
    for epoch in range(1, epochs + 1):
        model.train()
        total = 0.0
        bar = tqdm(loader, desc=f"{kind} epoch {epoch}/{epochs}", leave=False, disable=None)
        for x, y in bar:
            loss = nn.functional.cross_entropy(model(x.to(knobs.device)), y.to(knobs.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
            total += loss.item()
        if schedule:
            schedule.step()
        print(f"{kind} epoch {epoch}/{epochs}: mean loss {total / len(loader):.4f}")


def predict(model: nn.Module, loader: DataLoader[Any], knobs: Knobs, name: str) -> torch.Tensor:
    """Return the predicted class of every image, (N,)."""
    model.eval()
    bar = tqdm(loader, desc=f"testing {name}", leave=False, disable=None)
    with torch.inference_mode():
        return torch.cat([model(x.to(knobs.device)).argmax(1).cpu() for x, _ in bar])


def predict_onnx(path: str, loader: DataLoader[Any]) -> torch.Tensor:
    """Return the same from ONNX Runtime, as the file says: without graph optimizations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    bar = tqdm(loader, desc="testing ONNX Runtime", leave=False, disable=None)
    return torch.cat(
        [torch.from_numpy(session.run(None, {name: x.numpy()})[0]).argmax(1) for x, _ in bar]
    )


# ----------------------------------------------------------------------------------------- main


def fail(message: str) -> NoReturn:
    """End with one line and exit code 2."""
    print(f"digits.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse(argv: Sequence[str] | None) -> Knobs:
    """Return the knobs that the command line sets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in dataclasses.fields(Knobs):
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=type(field.default),
            default=field.default,
            metavar=field.name.upper().rsplit("_", 1)[-1],
            help=f"{field.metadata['help']} (default: {field.default!r})",
        )
    return Knobs(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the recipe and return the numbers of its table."""
    knobs = parse(argv)
    started = time.perf_counter()
    torch.manual_seed(knobs.seed)
    if not Path(knobs.out).absolute().parent.is_dir():
        fail(f"--out {knobs.out}: its folder does not exist; make it, or give another path")
    try:
        config = qatkit.QuantConfig.preset(knobs.config)
    except qatkit.QatkitError as error:
        fail(f"--config: {error}")

    # 1. Data and model.
    size = choose_size(knobs)
    train_set, test_set, classes = images(Path(knobs.data), size) if knobs.data else digits(size)
    workers = 2 if knobs.data else 0
    train_loader = DataLoader(
        train_set,
        knobs.batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=len(train_set) > knobs.batch_size,  # a rest of one image breaks batch norm
    )
    test_loader = DataLoader(test_set, 2 * knobs.batch_size, num_workers=workers)
    targets = torch.cat([y for _, y in test_loader])
    example = next(iter(test_loader))[0][:1].to(knobs.device)
    model = build_model(knobs, size, classes)
    print(
        f"{knobs.model}, {classes} classes, {size}x{size}, {len(train_set)} training images, "
        f"{len(test_set)} test images, {knobs.device}"
    )

    # 2. Float.
    fit(model, train_loader, knobs, knobs.epochs, knobs.lr)
    predictions = {"float": predict(model, test_loader, knobs, "float")}

    # 3. Post-training quantization: the same object, its ranges set by a look at training data.
    qatkit.prepare(model, example, config)
    qatkit.calibrate(model, train_loader, batches=knobs.calibration_batches)
    predictions["PTQ"] = predict(model, test_loader, knobs, "PTQ")

    # 4. Quantization-aware fine-tuning: the same training loop, at a tenth of the learning rate.
    schedule = qatkit.QATSchedule(model, knobs.qat_epochs)
    fit(model, train_loader, knobs, knobs.qat_epochs, knobs.qat_lr, schedule)
    predictions["QAT"] = predict(model, test_loader, knobs, "QAT")

    # 5. Export; the file is linted and compared with the model on the way.
    report = qatkit.export_onnx(model, example, knobs.out, opset=knobs.opset)
    predictions["ONNX Runtime"] = predict_onnx(knobs.out, test_loader)

    # 6. One table.
    top1 = {name: 100 * (p == targets).double().mean().item() for name, p in predictions.items()}
    differing = int((predictions["QAT"] != predictions["ONNX Runtime"]).sum())
    rows = {
        **{name: f"{value:.2f} %" for name, value in top1.items()},
        "differing predictions": f"{differing} of {len(targets)}",
        "file": f"{report.path}, {report.size_bytes / 1e6:.1f} MB, opset {report.opset}",
        "Q / DQ nodes": f"{report.quantize_nodes} / {report.dequantize_nodes}",
        "lint findings": str(len(report.findings)),
        "verified": f"{report.verify.differing} of {report.verify.codes} codes differ",
        "time": f"{time.perf_counter() - started:.0f} s",
    }
    print(f"\n{'':22} top-1")
    for name, value in rows.items():
        print(f"{name:22} {value}")
    for finding in report.findings:
        print(f"  {finding}")
    if not report.verify.ok:
        print(f"  WARNING: {report.verify}")
    return {
        **top1,
        "differing": differing,
        "size_bytes": report.size_bytes,
        "quantize_nodes": report.quantize_nodes,
        "dequantize_nodes": report.dequantize_nodes,
        "findings": len(report.findings),
    }


if __name__ == "__main__":
    try:
        main()
    except qatkit.QatkitError as error:
        fail(str(error))
