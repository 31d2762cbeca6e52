"""The models of the contract tests, with batch norm statistics as if they had been trained."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from torchvision import models

CLASSIFIERS = (
    "resnet18",
    "mobilenet_v2",
    "densenet121",
    "googlenet",
    "efficientnet_b0",
    "shufflenet_v2_x0_5",
    "vit_b_16",
)
DETECTOR = "ssdlite320_mobilenet_v3_large"
LARGE = "vit_b_16"
MODELS = (*CLASSIFIERS, DETECTOR)


@dataclass(frozen=True)
class Float:
    """A float model, what it runs on, and what it is trained on."""

    name: str
    model: nn.Module
    inputs: Any
    targets: Any = None

    @property
    def args(self) -> tuple[Any, ...]:
        return self.inputs if isinstance(self.inputs, tuple) else (self.inputs,)

    @property
    def is_detector(self) -> bool:
        return self.name == DETECTOR

    def loss(self, model: nn.Module) -> Tensor:
        """Return a loss that every parameter has a part in; the model is in training mode."""
        if self.is_detector:
            return sum(model(*self.args, self.targets).values())
        return sum(out.float().pow(2).mean() for out in tensors_of(model(*self.args)))


def build(name: str) -> Float:
    torch.manual_seed(0)
    if name == DETECTOR:
        model = models.get_model(name, weights=None, weights_backbone=None)
        inputs: Any = ([torch.rand(3, 160, 200), torch.rand(3, 120, 160)],)
        boxes = torch.tensor([[10.0, 10.0, 80.0, 90.0]])
        targets = [{"boxes": boxes, "labels": torch.tensor([n])} for n in (1, 2)]
        settle(model.backbone, torch.rand(2, 3, 320, 320))
        return Float(name, model.eval(), inputs, targets)
    more = {"init_weights": False} if name == "googlenet" else {}
    model = models.get_model(name, weights=None, **more)
    x = torch.randn(1, 3, 224, 224) if name == LARGE else torch.randn(2, 3, 64, 64)
    settle(model, x)
    if name == LARGE:  # torchvision starts with zeros, and every output would be 0
        nn.init.normal_(model.heads.head.weight, std=0.05)
    return Float(name, model.eval(), x)


def settle(model: nn.Module, x: Tensor) -> None:
    """Give the batch norms the statistics of the data, and scales and shifts other than 1 and 0."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momentum = {norm: norm.momentum for norm in norms}
    for norm in norms:
        norm.momentum = 0.5
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.2, 0.2)
    model.train()
    with torch.no_grad():
        for _ in range(3 if norms else 0):
            model(torch.randn_like(x))
    for norm in norms:
        norm.momentum = momentum[norm]


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors of an output, also of a named tuple or a dict."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def run(case: Float, model: nn.Module) -> list[Tensor]:
    """Run in eval mode without gradients."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        out = tensors_of(model(*copy.deepcopy(case.args)))
    for module, flag in flags.items():
        module.training = flag
    return out


def train_step(case: Float, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and the gradients of one seeded training step."""
    model.train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    loss = case.loss(model)
    loss.backward()
    return loss.detach(), gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def flags_of(model: nn.Module) -> dict[str, bool]:
    return {path: module.training for path, module in model.named_modules()}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def is_quantizer(key: str) -> bool:
    """Tell whether a key or path belongs to a quantizer."""
    return re.search(r"quantizer(\.|$)", key) is not None
