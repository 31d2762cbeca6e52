"""CIFAR-10: from a float ResNet of He et al. to a low-bit network in a verified ONNX file.

    python recipes/cifar10.py --mode ptq --net resnet20 --init FILE.pt --wbits 8 --abits 8
    python recipes/cifar10.py --mode qat --net resnet20 --init FILE.pt --wbits 4 --abits 4
    torchrun --nproc-per-node 2 recipes/cifar10.py --mode qat ...

--wbits and --abits are the widths of the weights and of the inputs of all convolutions but the
first. First and last layer, the skip inputs of the residual additions and the input of the last
pooling have 8 bits. With ptq no label is looked at. With qat follow --epochs over --images training
images, always the same ones, with the outputs of the float network as targets. Everything is
measured on all test images, the written file in ONNX Runtime. Under torchrun each process trains
on its part of every batch; what comes before the training all do alike, what comes after the first
one does.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import onnxruntime
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import qatkit
from qatkit import QuantConfig, QuantSpec, Rule

NETS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}  # blocks in a stage
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SWAPPED = 1.5  # rounding a code otherwise moved a logit by 0.6 at most, at 4 bits
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # torchrun
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def knob(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """Return a field of `Knobs` that is documented as a command-line option."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclass
class Knobs:
    """Everything there is to turn; each field is a command-line option."""

    mode: str = knob("qat", "post-training quantization, or training after it", ("ptq", "qat"))
    net: str = knob("resnet20", "the network", tuple(NETS))
    init: str = knob("", "state dict of the trained float network, a file of torch.save")
    wbits: int = knob(8, "bits of the weights, 2..8")
    abits: int = knob(8, "bits of the activations, 2..8")
    images: int = knob(20000, "training images to use, a fixed choice whatever the seed")
    epochs: int = knob(1, "how often the training sees each of them")
    seed: int = knob(0, "order and augmentation of the training images, choice for calibration")
    data: str = knob(
        str(SHARED_DATA) if SHARED_DATA.is_dir() else "data",
        "folder with load.py, whose arrays(split) returns images and labels",
    )
    onnx: str = knob("cifar10.onnx", "the file to write")
    json: str = knob("", "where to write the numbers; empty: nowhere")
    opset: int = knob(13, "ONNX opset")
    calibration_images: int = knob(1024, "training images that set the first ranges")
    calibration: str = knob(
        "mse", "how these set the ranges of activations", tuple(qatkit.observers.CALIBRATORS)
    )
    batch_size: int = knob(64, "images per training step")
    lr: float = knob(0.0, "peak learning rate of the weights; 0: what suits the bits")
    range_lr: float = knob(0.0, "peak learning rate of the ranges; 0: what suits the bits")


# ---------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Images:
    """Images (N, 3, 32, 32) uint8 with labels (N,) int64."""

    pixels: Tensor
    labels: Tensor

    def __getitem__(self, index: Any) -> Images:
        """Return some of them."""
        return Images(self.pixels[index], self.labels[index])

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.labels)

    def batches(self, size: int) -> Iterator[Images]:
        """Yield all, in order."""
        for start in range(0, len(self), size):
            yield self[start : start + size]


def load_images(folder: Path) -> tuple[Images, Images]:
    """Return the training and the test images."""
    loader = folder / "load.py"
    if not loader.is_file():
        fail(f"--data {folder}: has no load.py; give the folder of the CIFAR-10 files")
    spec = importlib.util.spec_from_file_location("cifar10_load", loader)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        splits = [module.arrays(split) for split in ("train", "test")]
    except OSError as error:
        fail(f"--data {folder}: {error.filename}: {error.strerror}; give the complete folder")
    train, test = (
        Images(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y))
        for x, y in splits
    )
    return train, test


def normalize(pixels: Tensor) -> Tensor:
    """Return what the network takes, (N, 3, 32, 32) float32."""
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    return ((pixels / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def augment(pixels: Tensor, random: torch.Generator) -> Tensor:
    """Shift each image by up to 4 pixels into black, and mirror every other one."""
    count, size = len(pixels), pixels.shape[-1]
    shift = torch.randint(0, 9, (2, count, 1), generator=random)
    mirrored = torch.rand(count, 1, generator=random) < 0.5
    steps = torch.arange(size)
    rows, columns = shift[0] + steps, shift[1] + torch.where(mirrored, size - 1 - steps, steps)
    padded = F.pad(pixels, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    picked = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


# --------------------------------------------------------------------------------------- model


class Block(nn.Module):
    """Two convolutions and a skip connection without parameters (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """Make the layers."""
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.extra = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(y + x)


class ResNet(nn.Module):
    """The network of He et al. for small images, 6 * blocks + 2 layers deep."""

    def __init__(self, blocks: int) -> None:
        """Make the layers."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks)
        self.layer2 = self._stage(16, 32, blocks)
        self.layer3 = self._stage(32, 64, blocks)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
        first = Block(inputs, outputs, outputs // inputs)
        return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, 32, 32) to (N, 10)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def load_net(knobs: Knobs) -> ResNet:
    """Return the trained float network."""
    net = ResNet(NETS[knobs.net]).to(memory_format=torch.channels_last)
    if not knobs.init:
        fail("--init: give the state dict of the float network, a file of torch.save")
    try:
        state = torch.load(knobs.init, map_location="cpu", weights_only=True)
    except OSError as error:
        fail(f"--init {knobs.init}: {error.strerror}; give a file of torch.save")
    except Exception as error:
        fail(f"--init {knobs.init}: is no file of torch.save ({str(error).splitlines()[0][:80]})")
    if not isinstance(state, dict):
        fail(f"--init {knobs.init}: holds a {type(state).__name__}; give a state dict")
    own = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    given = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    wrong = sorted(own.keys() ^ given.keys())
    if wrong:
        kind = "lacks" if wrong[0] in own else "has a strange"
        fail(f"--init {knobs.init}: {kind} {wrong[0]!r}; give a checkpoint of {knobs.net}")
    for key, tensor in own.items():
        if given[key].shape != tensor.shape:
            shapes = f"{tuple(given[key].shape)}, not {tuple(tensor.shape)}"
            fail(f"--init {knobs.init}: {key} is {shapes}; give a checkpoint of {knobs.net}")
    net.load_state_dict(given, strict=False)
    return net.eval()


# ----------------------------------------------------------------------------------- quantization


def quantization(knobs: Knobs) -> QuantConfig:
    """Return the widths and observers: learned ranges in training, fixed ones without."""
    learned = knobs.mode == "qat"
    weight = QuantSpec(
        num_bits=knobs.wbits,
        axis=0,
        narrow_range=True,
        observer="lsq" if learned or knobs.wbits < 8 else "minmax",  # lsq starts at least squares
        memory="latest",
    )
    activation = QuantSpec(num_bits=knobs.abits, observer="lsq" if learned else "minmax")
    return QuantConfig(
        weight=weight,
        activation=activation,
        first_last_bits=8,
        unsigned_activations=knobs.abits < 8,
        rules=(Rule("*.add_quantizer", num_bits=8), Rule("mean_quantizer", num_bits=8)),
    )


def calibrate(net: nn.Module, train: Images, knobs: Knobs) -> None:
    """Set the ranges, and round few bits well, by some training images without their labels."""
    random = torch.Generator().manual_seed(knobs.seed)
    some = train[torch.randperm(len(train), generator=random)[: knobs.calibration_images]]
    data = [normalize(batch.pixels) for batch in some.batches(128)]
    if min(knobs.wbits, knobs.abits) < 8:  # rounding is learned, from mirrored images too
        data += [x.flip(3) for x in data]
    qatkit.ptq.quantize(net, data, method=knobs.calibration, seed=knobs.seed)


@dataclass(frozen=True)
class Method:
    """How to train; which way is best depends on how far quantization has thrown the network.

    Attributes:
        lr: peak learning rate of the weights.
        range_lr: peak learning rate of the ranges.
        settled: near the float network: images and batch norms as in testing. Else the images are
            augmented and the batch norms use the statistics of the batch.
    """

    lr: float
    range_lr: float
    settled: bool


METHODS = {
    2: Method(0.05, 0.05, False),
    3: Method(0.003, 0.003, True),
    4: Method(0.0015, 0.0015, True),
}


def train_quantized(net: nn.Module, teacher: nn.Module, train: Images, knobs: Knobs) -> None:
    """Train the weights and the ranges to give the outputs of the float network.

    Those of an image and of its mirror image are averaged, which makes the better teacher.
    """
    method = METHODS[min(knobs.wbits, knobs.abits, max(METHODS))]
    lr, range_lr = knobs.lr or method.lr, knobs.range_lr or method.range_lr
    groups = qatkit.parameter_groups(net, lr=lr, weight_decay=1e-4, range_lr=range_lr)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    steps = knobs.epochs * (len(train) // knobs.batch_size)
    warm_up = min(20, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / warm_up) * (1 + math.cos(math.pi * step / steps)) / 2,
    )
    random = torch.Generator().manual_seed(knobs.seed)
    net.train()
    if method.settled:
        qatkit.freeze_batch_norm(net).apply()
    student: nn.Module = net
    if WORLD > 1:
        distributed.init_process_group("gloo")
        student = DistributedDataParallel(net)
    with tqdm(total=steps, desc="training", leave=False, disable=True if RANK else None) as bar:
        for _ in range(knobs.epochs):
            order = torch.randperm(len(train), generator=random)
            for batch in train[order].batches(knobs.batch_size):
                if len(batch) < knobs.batch_size:
                    continue
                pixels = batch.pixels if method.settled else augment(batch.pixels, random)
                x = normalize(pixels[RANK::WORLD])
                with torch.no_grad():
                    target = (teacher(x).softmax(1) + teacher(x.flip(3)).softmax(1)) / 2
                loss = F.cross_entropy(student(x), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    if WORLD > 1:
        distributed.destroy_process_group()


def predict(net: nn.Module, test: Images, name: str, *, exact: bool = False) -> Tensor:
    """Return the predicted class of every image, (N,).

    ``exact`` gives the classes of double precision. What a written file does otherwise is then the
    file's own rounding, not that of this process too. Double precision is slow, so only the images
    are computed again whose two best logits are so close that rounding could swap them.
    """
    net = copy.deepcopy(net).eval()
    best = _logits(net, test, f"testing {name}").topk(2)
    classes = best.indices[:, 0]
    close = (best.values[:, 0] - best.values[:, 1] < SWAPPED).nonzero()[:, 0]
    if exact and len(close):
        doubted = _logits(net.double(), test[close], f"testing {name} in double precision")
        classes[close] = doubted.argmax(1)
    return classes


def _logits(net: nn.Module, images: Images, text: str) -> Tensor:
    kind = next(net.parameters()).dtype
    bar = tqdm(images.batches(250), desc=text, leave=False, disable=None)
    with torch.inference_mode():
        return torch.cat([net(normalize(batch.pixels).to(kind)) for batch in bar])


def predict_onnx(path: str, test: Images) -> Tensor:
    """Return the same from ONNX Runtime, as the file says: without graph optimizations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    bar = tqdm(test.batches(250), desc="testing ONNX Runtime", leave=False, disable=None)
    batches = (normalize(batch.pixels).contiguous().numpy() for batch in bar)
    return torch.cat([torch.from_numpy(session.run(None, {name: x})[0]).argmax(1) for x in batches])


# ----------------------------------------------------------------------------------------- main


def fail(message: str) -> NoReturn:
    """End with one line and exit code 2."""
    print(f"cifar10.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse(argv: Sequence[str] | None) -> Knobs:
    """Return the knobs that the command line sets, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in dataclasses.fields(Knobs):
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=type(field.default),
            default=field.default,
            choices=field.metadata["choices"],
            metavar=None if field.metadata["choices"] else field.name.upper().rsplit("_", 1)[-1],
            help=f"{field.metadata['help']} (default: {field.default!r})",
        )
    knobs = Knobs(**vars(parser.parse_args(argv)))
    for name in ("wbits", "abits"):
        if not 2 <= getattr(knobs, name) <= 8:
            fail(f"--{name} {getattr(knobs, name)}: give 2 to 8")
    for name in ("images", "epochs", "calibration_images", "batch_size"):
        if getattr(knobs, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(knobs, name)}: give 1 or more")
    if WORLD > 1 and knobs.mode == "ptq":
        fail("--mode ptq: nothing to share among processes; call it with python, not torchrun")
    if knobs.batch_size % WORLD:
        fail(f"--batch-size {knobs.batch_size}: give a multiple of the {WORLD} processes")
    if knobs.images < knobs.batch_size:
        fail(f"--images {knobs.images}: give {knobs.batch_size} or more, one --batch-size")
    for name in ("onnx", "json"):
        path = getattr(knobs, name)
        if path and not Path(path).absolute().parent.is_dir():
            fail(f"--{name} {path}: its folder does not exist; make it, or give another path")
    return knobs


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe and return the numbers that go to --json."""
    knobs = parse(argv)
    started = time.perf_counter()
    torch.manual_seed(knobs.seed)

    # 1. Data and network. Which images are used does not depend on the seed.
    net = load_net(knobs)
    train, test = load_images(Path(knobs.data))
    if knobs.images > len(train):
        fail(f"--images {knobs.images}: the folder has {len(train)} for training; give fewer")
    train = train[
        torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: knobs.images]
    ]
    example = normalize(test[:1].pixels)
    teacher = copy.deepcopy(net)
    predictions = {"float": predict(net, test, "float")}

    # 2. Post-training quantization.
    qatkit.prepare(net, example, quantization(knobs))
    calibrate(net, train, knobs)
    predictions["ptq"] = predict(net, test, "PTQ", exact=knobs.mode == "ptq")

    # 3. Quantization-aware training.
    if knobs.mode == "qat":
        train_quantized(net, teacher, train, knobs)
        if RANK:
            return {}
        predictions["qat"] = predict(net, test, "QAT")

    # 4. Export; the file is linted and compared with the network on the way.
    report = qatkit.export_onnx(net, example, knobs.onnx, opset=knobs.opset)
    predictions["onnx"] = predict_onnx(knobs.onnx, test)

    # 5. The numbers.
    top1 = {
        name: round(100 * (classes == test.labels).double().mean().item(), 4)
        for name, classes in predictions.items()
    }
    numbers = {
        **{f"{name}_top1": top1.get(name) for name in ("float", "ptq", "qat", "onnx")},
        "flips": int((predictions[knobs.mode] != predictions["onnx"]).sum()),
        "seconds": round(time.perf_counter() - started, 1),
    }
    if knobs.json:
        Path(knobs.json).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    print(report)
    print(f"\n{knobs.net} W{knobs.wbits}A{knobs.abits}, {len(test)} test images")
    for name, value in numbers.items():
        print(f"{name:12} {'-' if value is None else value}")
    return numbers


if __name__ == "__main__":
    try:
        main()
    except qatkit.QatkitError as error:
        fail(str(error))
