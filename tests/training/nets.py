"""A small network with residual joins, and a training loop for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatkit.config import ACTIVATION, WEIGHT, QuantConfig, Rule
from qatkit.prepare import prepare


class Block(nn.Module):
    """A basic block of He et al. 2016."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(y)))


class Net(nn.Module):
    """Stem, two blocks, head: 10 classes out of 3x8x8."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.layer1 = Block(width)
        self.layer2 = Block(width)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn(self.conv(x)))))
        return self.fc(x.mean((2, 3)))


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))

W4A4 = QuantConfig(
    weight=WEIGHT.replace(num_bits=4), activation=ACTIVATION.replace(num_bits=4), first_last_bits=8
)
PER_TENSOR = QuantConfig(
    weight=WEIGHT.replace(axis=None, num_bits=4), rules=(Rule("fc", num_bits=8),)
)


def net(config: QuantConfig | str | None = W4A4, seed: int = 0) -> Any:
    """Return the network, prepared and in training mode."""
    torch.manual_seed(seed)
    return prepare(Net(), X, config).train()


def batch(index: int) -> tuple[Tensor, Tensor]:
    """Return input and classes."""
    generator = torch.Generator().manual_seed(100 + index)
    return (
        torch.randn(8, 3, 8, 8, generator=generator),
        torch.randint(10, (8,), generator=generator),
    )


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, index: int, more: Any = None) -> None:
    """Take one training step; ``more`` returns what is added to the loss."""
    x, classes = batch(index)
    loss = F.cross_entropy(model(x), classes)
    if more is not None:
        loss = loss + more()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of all tensors."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Tell whether two states are equal bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
