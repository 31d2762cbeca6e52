"""The float models of torchvision as the sweep wants them: small inputs, plausible statistics."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from torchvision import models

BATCH = 2
FRAMES = 16
SIDES = (64, 96, 128, 192, 224, 256, 320)
"""The smallest of these that the model accepts in both modes is its resolution."""

SIDES_OF = {"mvit_*": (224,), "s3d": (224,), "vit_h_14": (56,)}
"""Name pattern -> the sides to try, where finding out that a smaller one fails takes long."""

KINDS = {
    "detection": "detection",
    "segmentation": "segmentation",
    "video": "video",
    "optical_flow": "optical flow",
}
"""Sub-package of torchvision.models -> kind; the models outside of these classify."""

SETTINGS: dict[str, dict[str, Any]] = {
    # what fixes the resolution when the model is built
    "vit_h_14": {"image_size": 56},
    "vit_*": {"image_size": 64},
    # a second, slow initialisation
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    # with random weights no score is high: let some boxes through, and not thousands
    "*rcnn*": {
        "rpn_post_nms_top_n_train": 32,
        "rpn_post_nms_top_n_test": 32,
        "box_score_thresh": 0.0,
        "box_detections_per_img": 8,
    },
}
"""Arguments of the builders; the first pattern that a name matches counts."""


@dataclass(frozen=True)
class Case:
    """A float model in eval mode with what it runs and trains on.

    Attributes:
        name: name in torchvision.
        kind: classification, segmentation, detection, video or optical flow.
        model: the model.
        args: its arguments.
        targets: what it takes besides in training, ``None`` for nothing.
    """

    name: str
    kind: str
    model: nn.Module
    args: tuple[Any, ...]
    targets: list[dict[str, Tensor]] | None = None

    @property
    def shapes(self) -> str:
        """The shapes of the arguments, for people."""
        sizes = ["x".join(map(str, x.shape)) for x in tree_leaves(self.args)]
        return " ".join(dict.fromkeys(sizes))


def list_models(*patterns: str) -> list[str]:
    """Return the float models of torchvision that match one of the globs, the largest last."""
    names = [name for name in models.list_models() if not name.startswith("quantized_")]
    chosen = [name for name in names if any(fnmatchcase(name, one) for one in patterns)]
    return sorted(chosen, key=_parameters)


def build(name: str, seed: int) -> Case:
    """Build a model with random weights and with the statistics of its inputs."""
    torch.manual_seed(seed)
    builder = models.get_model_builder(name)
    folder = builder.__module__.removeprefix("torchvision.models.").split(".")[0]
    kind = KINDS.get(folder, "classification")
    settings = next(iter(_matching(SETTINGS, name)), {})
    if "weights_backbone" in inspect.signature(builder).parameters:
        settings = settings | {"weights_backbone": None}
    model = builder(weights=None, **settings)
    for parameter in model.parameters():  # torchvision zeroes some heads: all outputs would be 0
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    if kind == "detection":
        model.transform.min_size, model.transform.max_size = (128,), 160
        images = [torch.rand(3, 128, 128), torch.rand(3, 112, 144)]
        case = Case(name, kind, model, (images,), [_target(image) for image in images])
    else:
        sides = next(iter(_matching(SIDES_OF, name)), SIDES)
        case = Case(name, kind, model, _smallest(model, kind, sides))
    settle(case)
    return case


def loss_of(case: Case, model: nn.Module) -> Tensor:
    """Return a loss that everything which the model returns in training has a part in."""
    if case.targets is not None:
        return sum(model(*case.args, case.targets).values())
    outputs = [leaf for leaf in tree_leaves(model(*case.args)) if isinstance(leaf, Tensor)]
    return sum((out - torch.randn_like(out)).square().mean() for out in outputs)


@torch.no_grad()
def settle(case: Case) -> None:
    """Give the batch norms the statistics of the inputs, and scales and shifts of their own."""
    norms = [module for module in case.model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average of all batches
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.2, 0.2)
    case.model.train()
    for _ in range(2 if norms else 0):
        loss_of(case, case.model)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    case.model.eval()


def _parameters(name: str) -> int:
    return min(weights.meta["num_params"] for weights in models.get_model_weights(name))


def _matching(table: dict[str, Any], name: str) -> list[Any]:
    return [value for pattern, value in table.items() if fnmatchcase(name, pattern)]


@torch.no_grad()
def _smallest(model: nn.Module, kind: str, sides: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Return inputs of the smallest resolution that the model accepts in both modes."""
    size = (1, 3, FRAMES) if kind == "video" else (BATCH, 3)
    for side in sides:
        count = 2 if kind == "optical flow" else 1
        args = tuple(torch.randn(*size, side, side) for _ in range(count))
        try:
            for mode in (False, True):
                model.train(mode)(*args)
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = error
        else:
            return args
    raise reason


def _target(image: Tensor) -> dict[str, Tensor]:
    """Return two made-up objects with boxes, labels, masks and key points."""
    boxes = torch.tensor([[8.0, 8.0, 72.0, 80.0], [40.0, 24.0, 104.0, 96.0]])
    masks = torch.zeros(len(boxes), *image.shape[1:], dtype=torch.uint8)
    points = torch.ones(len(boxes), 17, 3)
    for mask, point, (left, top, right, bottom) in zip(masks, points, boxes.int(), strict=True):
        mask[top:bottom, left:right] = 1
        point[:, 0] = torch.linspace(float(left), float(right) - 1, 17)
        point[:, 1] = torch.linspace(float(top), float(bottom) - 1, 17)
    return {"boxes": boxes, "labels": torch.ones(2).long(), "masks": masks, "keypoints": points}
