"""ImageNet, or any ImageFolder: quantization-aware training of a torchvision classifier.

    python recipes/imagenet.py --data DIR --model resnet50 --weights DEFAULT
    torchrun --nproc-per-node 8 recipes/imagenet.py --data DIR --model resnet50 --amp bfloat16

DIR holds train/ and val/ with a folder of images per class. --settings picks what an engine's maker
recommends, of which every single option can be changed:

nvidia  max of the weights, 99.99th percentile of the activations over calibration data, ranges
        fixed from there on; 1 % of the learning rate of the float training, a tenth of its epochs,
        half a cosine down to 1 % of that
ti      ranges follow the data in training; batch norms freeze half way, ranges after them; a small
        learning rate
learned ranges are trained with the weights (LSQ), towards the outputs of the float model; for W4A4
        add --config tensorrt-w4a4
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torchvision
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2 as T

import qatkit
from qatkit import QuantConfig

SETTINGS: dict[str, dict[str, Any]] = {
    "nvidia": {
        "observer": "minmax",
        "calibration": "percentile",
        "epochs": 9,
        "lr": 1e-3,
        "final_lr": 0.01,
        "freeze_batch_norm_at": 1_000_000,
        "freeze_ranges_at": 0,
        "distill": 0.0,
    },
    "ti": {
        "observer": "shrink",
        "calibration": "shrink",
        "epochs": 10,
        "lr": 1e-4,
        "final_lr": 0.0,
        "freeze_batch_norm_at": -1,
        "freeze_ranges_at": -1,
        "distill": 0.0,
    },
    "learned": {
        "observer": "lsq",
        "calibration": "mse",
        "epochs": 10,
        "lr": 5e-3,
        "final_lr": 0.0,
        "freeze_batch_norm_at": 1_000_000,
        "freeze_ranges_at": 1_000_000,
        "distill": 1.0,
    },
}


def knob(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """Return a field of `Knobs` that is documented as a command-line option."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclass
class Knobs:
    """Everything there is to turn; each field is a command-line option."""

    data: str = knob("", "folder with train/ and val/")
    model: str = knob("resnet50", "any torchvision classifier")
    weights: str = knob("", "a state dict of torch.save, or a name such as DEFAULT to download")
    settings: str = knob("nvidia", "recommended settings, see above", tuple(SETTINGS))
    config: str = knob("tensorrt-int8", "preset of the quantization")
    observer: str = knob("", "observer of the activations (and, if lsq, of the weights)")
    calibration: str = knob("", "method of the calibration")
    calibration_images: int = knob(1024, "training images that set the first ranges")
    epochs: int = knob(-1, "epochs of training")
    max_steps: int = knob(0, "end an epoch after so many steps; 0: never")
    batch_size: int = knob(64, "images per step and process")
    lr: float = knob(-1.0, "peak learning rate for 256 images per step, scaled to those there are")
    final_lr: float = knob(-1.0, "share of it that is left at the end")
    weight_decay: float = knob(1e-4, "weight decay")
    freeze_batch_norm_at: int = knob(-2, "first epoch with frozen batch norms; -1: half way")
    freeze_ranges_at: int = knob(-2, "first epoch with frozen ranges; -1: behind half way")
    distill: float = knob(-1.0, "weight of the distance to the outputs of the float model")
    amp: str = knob("none", "type of the forward", ("none", "bfloat16", "float16"))
    image_size: int = knob(224, "height and width of an image")
    workers: int = knob(8, "processes that read images, per process that trains")
    device: str = knob("cuda" if torch.cuda.is_available() else "cpu", "where to train")
    onnx: str = knob("imagenet.onnx", "the file to write")
    json: str = knob("", "where to write the numbers; empty: nowhere")
    opset: int = knob(13, "ONNX opset")
    seed: int = knob(0, "seed of everything")


@dataclass(frozen=True)
class World:
    """This process among those that torchrun started.

    Attributes:
        rank: which one; 0 writes and prints.
        size: how many there are.
        device: where this one trains.
    """

    rank: int
    size: int
    device: torch.device

    def say(self, text: str) -> None:
        """Print in one process only."""
        if not self.rank:
            print(text, flush=True)


def join_world(device: str) -> World:
    """Join the processes of torchrun, or be alone."""
    if "WORLD_SIZE" not in os.environ:
        return World(0, 1, torch.device(device))
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return World(distributed.get_rank(), distributed.get_world_size(), torch.device(device))


# ---------------------------------------------------------------------------------------- data


def folders(knobs: Knobs) -> tuple[ImageFolder, ImageFolder, ImageFolder]:
    """Return the images for training, for calibration (not augmented) and for testing."""
    to_float = [
        T.ToImage(),
        T.ToDtype(torch.float32, scale=True),
        T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    size = knobs.image_size
    plain = T.Compose([T.Resize(size * 8 // 7), T.CenterCrop(size), *to_float])
    augmented = T.Compose([T.RandomResizedCrop(size), T.RandomHorizontalFlip(), *to_float])
    root = Path(knobs.data)
    try:
        train = ImageFolder(root / "train", augmented)
        test = ImageFolder(root / "val", plain)
    except FileNotFoundError as error:
        first_line = str(error).splitlines()[0].rstrip(".")
        fail(f"--data {knobs.data!r}: {first_line}; give train/ and val/ with class folders")
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[:5]
        fail(f"--data {knobs.data}: train/ and val/ differ in class folders {odd}")
    return train, ImageFolder(root / "train", plain), test


def training_batches(data: ImageFolder, knobs: Knobs, world: World) -> DataLoader[Any]:
    """Return a loader of this process's share of the training images."""
    if len(data) < world.size * knobs.batch_size:
        fail(
            f"--batch-size {knobs.batch_size}: {len(data)} training images are fewer than a step "
            f"of {world.size} processes takes; give less"
        )
    sampler: Any = None
    if world.size > 1:
        sampler = DistributedSampler(data, seed=knobs.seed, drop_last=True)
    return DataLoader(
        data,
        knobs.batch_size,
        sampler=sampler,
        shuffle=sampler is None,
        num_workers=knobs.workers,
        pin_memory=world.device.type == "cuda",
        drop_last=True,
        persistent_workers=knobs.workers > 0,
    )


def plain_batches(data: ImageFolder, chosen: Sequence[int], knobs: Knobs) -> DataLoader[Any]:
    """Return a loader of the chosen images in that order."""
    return DataLoader(Subset(data, chosen), knobs.batch_size, num_workers=knobs.workers)


def calibration_batches(data: ImageFolder, knobs: Knobs) -> Iterator[Tensor]:
    """Yield the same images in every process, so that all get the same ranges."""
    random = torch.Generator().manual_seed(knobs.seed)
    chosen = torch.randperm(len(data), generator=random)[: knobs.calibration_images]
    for x, _ in plain_batches(data, chosen.tolist(), knobs):
        yield x


# --------------------------------------------------------------------------------------- model


def build_model(knobs: Knobs, classes: int) -> nn.Module:
    """Return the float model."""
    if knobs.model not in torchvision.models.list_models(module=torchvision.models):
        fail(f"--model {knobs.model}: torchvision has no such classifier; try resnet50")
    options: dict[str, Any] = {"num_classes": classes}
    if knobs.model in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    if knobs.weights and not Path(knobs.weights).is_file():
        try:
            named = torchvision.models.get_model_weights(knobs.model)[knobs.weights]
        except KeyError:
            fail(
                f"--weights {knobs.weights}: no such file or weights; give DEFAULT or a state dict"
            )
        model: nn.Module = torchvision.models.get_model(knobs.model, weights=named)
        return model
    model = torchvision.models.get_model(knobs.model, **options)
    if knobs.weights:
        try:
            state = torch.load(knobs.weights, map_location="cpu", weights_only=True)
            model.load_state_dict(state)
        except Exception as error:
            first_line = " ".join(str(error).split())[:160]
            fail(f"--weights {knobs.weights}: {first_line}; give a state dict of {knobs.model}")
    return model


def quantization(knobs: Knobs) -> QuantConfig:
    """Return the preset with the observer of the settings."""
    config = QuantConfig.preset(knobs.config)
    weight = config.weight
    if knobs.observer == "lsq":
        weight = weight.replace(observer="lsq")
    activation = config.activation.replace(observer=knobs.observer)
    return dataclasses.replace(config, weight=weight, activation=activation)


# ------------------------------------------------------------------------- training and testing


def train_quantized(
    model: nn.Module, teacher: nn.Module, loader: DataLoader[Any], knobs: Knobs, world: World
) -> None:
    """Train the prepared model, in step with the other processes."""
    device, amp = world.device, getattr(torch, knobs.amp, None)
    lr = knobs.lr * knobs.batch_size * world.size / 256
    groups = qatkit.parameter_groups(model, lr=lr, weight_decay=knobs.weight_decay)
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    per_epoch = min(len(loader), knobs.max_steps or len(loader))
    total = max(1, knobs.epochs * per_epoch)
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            knobs.final_lr
            + (1 - knobs.final_lr) * (1 + math.cos(math.pi * min(step, total) / total)) / 2
        ),
    )
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    freeze = {
        name: value if value >= 0 else None
        for name in ("freeze_batch_norm_at", "freeze_ranges_at")
        for value in [getattr(knobs, name)]
    }
    schedule = qatkit.QATSchedule(model, max(1, knobs.epochs), **freeze)
    wrapped: nn.Module = model
    if world.size > 1:
        wrapped = DistributedDataParallel(model, find_unused_parameters=knobs.observer == "lsq")
    for epoch in range(knobs.epochs):
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(epoch)
        wrapped.train()
        started, loss_sum = time.perf_counter(), 0.0
        for _, (x, y) in zip(range(per_epoch), loader, strict=False):
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            with torch.autocast(device.type, amp) if amp else nullcontext():
                outputs = wrapped(x)
                loss = F.cross_entropy(outputs, y)
                if knobs.distill:
                    with torch.no_grad():
                        target = teacher(x).softmax(1)
                    loss = loss + knobs.distill * F.cross_entropy(outputs, target)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            cosine.step()
            loss_sum += loss.item()
        schedule.step()
        rate = per_epoch * knobs.batch_size * world.size / (time.perf_counter() - started)
        world.say(
            f"epoch {epoch + 1}/{knobs.epochs}: mean loss {loss_sum / per_epoch:.4f}, "
            f"{rate:.0f} images/s"
        )


def top1(model: nn.Module, loader: DataLoader[Any], world: World) -> float:
    """Return the percentage of right predictions of all processes on their shares."""
    model.eval()
    counts = torch.zeros(2, dtype=torch.float64, device=world.device)
    with torch.inference_mode():
        for x, y in loader:
            hits = model(x.to(world.device)).argmax(1) == y.to(world.device)
            counts += torch.stack([hits.sum(), torch.full_like(hits.sum(), len(y))])
    if world.size > 1:
        distributed.all_reduce(counts)
    return 100 * (counts[0] / counts[1]).item()


# ----------------------------------------------------------------------------------------- main


def fail(message: str) -> NoReturn:
    """End with one line and exit code 2."""
    print(f"imagenet.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse(argv: Sequence[str] | None) -> Knobs:
    """Return the knobs that the command line sets, and the recommended settings for the others."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in dataclasses.fields(Knobs):
        recommended = {name: row[field.name] for name, row in SETTINGS.items() if field.name in row}
        shown = f"by --settings, {recommended}" if recommended else repr(field.default)
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=type(field.default),
            choices=field.metadata["choices"],
            metavar=None if field.metadata["choices"] else field.name.upper().rsplit("_", 1)[-1],
            default=argparse.SUPPRESS,
            help=f"{field.metadata['help']} (default: {shown})",
        )
    given = vars(parser.parse_args(argv))
    knobs = Knobs(**{**SETTINGS[given.get("settings", Knobs.settings)], **given})
    for name in ("batch_size", "calibration_images", "image_size"):
        if getattr(knobs, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(knobs, name)}: give 1 or more")
    for name in ("onnx", "json"):
        path = getattr(knobs, name)
        if path and not Path(path).absolute().parent.is_dir():
            fail(f"--{name} {path}: its folder does not exist; make it, or give another path")
    return knobs


def run(knobs: Knobs, world: World) -> dict[str, Any]:
    """Run the recipe in this process and return the numbers."""
    started = time.perf_counter()
    torch.manual_seed(knobs.seed)
    config = quantization(knobs)

    # 1. Data and float model.
    train_set, calibration_set, test_set = folders(knobs)
    loader = training_batches(train_set, knobs, world)
    share = range(world.rank, len(test_set), world.size)
    test_loader = plain_batches(test_set, share, knobs)
    example = test_set[0][0][None].to(world.device)
    model = build_model(knobs, len(train_set.classes)).to(world.device)
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    numbers: dict[str, Any] = {"float_top1": top1(model, test_loader, world)}

    # 2. Post-training quantization: the same object, its ranges set by a look at training data.
    qatkit.prepare(model, example, config)
    images = calibration_batches(calibration_set, knobs)
    qatkit.calibrate(model, images, method=knobs.calibration, progress=not world.rank)
    numbers["ptq_top1"] = top1(model, test_loader, world)

    # 3. Quantization-aware training.
    torch.manual_seed(knobs.seed + world.rank)  # another augmentation in each process
    train_quantized(model, teacher, loader, knobs, world)
    numbers["qat_top1"] = top1(model, test_loader, world)

    # 4. Export, by one process.
    if not world.rank:
        report = qatkit.export_onnx(model, example, knobs.onnx, opset=knobs.opset)
        world.say(str(report))
    numbers["seconds"] = time.perf_counter() - started
    if knobs.json and not world.rank:
        Path(knobs.json).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    for name, value in numbers.items():
        world.say(f"{name:12} {value:.2f}")
    return numbers


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe."""
    knobs = parse(argv)
    world = join_world(knobs.device)
    try:
        return run(knobs, world)
    finally:
        if world.size > 1:
            distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except qatkit.QatkitError as error:
        fail(str(error))
