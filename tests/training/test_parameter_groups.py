"""The parameters of a model in groups: each once, and no decay of ranges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import qatkit
from qatkit import QuantConfig, QuantSpec
from qatkit.config import WEIGHT
from qatkit.errors import QatkitError


def network(observer: str) -> nn.Module:
    conv, tied = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)
    net = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.extend([tied, nn.Linear(4, 4)])
    net[6].weight = tied.weight
    config = QuantConfig(WEIGHT.replace(observer=observer), QuantSpec(observer=observer))
    return qatkit.prepare(net, torch.zeros(2, 3, 8, 8), config)


@pytest.mark.parametrize("observer", ["lsq", "lsq+", "pact", "tqt", "minmax"])
def test_every_parameter_once(observer: str) -> None:
    net = network(observer)
    groups = qatkit.parameter_groups(net, lr=0.1, weight_decay=1e-3, range_lr=0.01)
    found = [id(each) for group in groups for each in group["params"]]
    assert sorted(found) == sorted({id(each) for each in net.parameters()})
    by_name = {group["name"]: group for group in groups}
    assert list(by_name) == ["weights", "vectors", "ranges"][: 2 if observer == "minmax" else 3]
    assert [group["weight_decay"] for group in groups] == [1e-3, 0.0, 0.0][: len(groups)]
    assert [group["lr"] for group in groups] == [0.1, 0.1, 0.01][: len(groups)]
    assert len(by_name["weights"]["params"]) == 2
    assert len(by_name["vectors"]["params"]) == 5
    torch.optim.SGD(groups, momentum=0.9)
    assert all(isinstance(each, nn.Parameter) for group in groups for each in group["params"])


def test_decay_does_not_touch_a_range() -> None:
    net = network("tqt")
    qatkit.calibrate(net, [torch.randn(2, 3, 8, 8)], progress=False)
    groups = qatkit.parameter_groups(net, lr=0.1, weight_decay=0.5, decay_vectors=True)
    before = {name: each.clone() for name, each in net.named_parameters()}
    for each in net.parameters():
        each.grad = torch.zeros_like(each)
    torch.optim.SGD(groups).step()
    for name, each in net.named_parameters():
        assert torch.equal(each, before[name]) == ("quantizer" in name or not before[name].any())


ILLEGAL: list[dict[str, Any]] = [
    {"lr": -1.0},
    {"lr": float("nan")},
    {"lr": "0.1"},
    {"lr": 0.1, "weight_decay": -1e-4},
    {"lr": 0.1, "range_lr": float("inf")},
    {"lr": True},
]


@pytest.mark.parametrize("options", ILLEGAL)
def test_illegal(options: dict[str, Any]) -> None:
    with pytest.raises(QatkitError, match=r"^parameter_groups\(.*give a number, 0 or more$"):
        qatkit.parameter_groups(nn.Linear(2, 2), **options)


def test_no_module() -> None:
    with pytest.raises(QatkitError, match=r"not a torch\.nn\.Module"):
        qatkit.parameter_groups([nn.Linear(2, 2)], lr=0.1)  # type: ignore[arg-type]
