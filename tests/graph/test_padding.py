"""A convolution behind a padding with zeros quantizes in front of it, and the file has no Pad."""

from __future__ import annotations

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qatkit
from tests.graph.blocks import prepared

X = torch.randn(2, 3, 11, 11)


class Same(nn.Conv2d):
    """Padded as TensorFlow does it."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, 2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 2, 1)))


class Shared(nn.Module):
    """What is padded has another reader."""

    def __init__(self) -> None:
        super().__init__()
        self.pad, self.conv, self.skip = nn.ZeroPad2d(1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.conv(self.pad(x)) + self.skip(x)


ABSORBED = {
    "function": Functional,
    "subclass": lambda: Same(8, 8, 3, 2),
    "module": lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 1, 0)), nn.Conv2d(8, 8, 3)),
    "shared": Shared,
}
KEPT = {
    "reflect": lambda: nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(8, 8, 3)),
    "ones": lambda: nn.Sequential(nn.ConstantPad2d(1, 1.0), nn.Conv2d(8, 8, 3)),
    "pool": lambda: nn.Sequential(nn.ZeroPad2d(1), nn.MaxPool2d(3), nn.Conv2d(8, 8, 1)),
}


@pytest.mark.parametrize("name", [*ABSORBED, *KEPT])
def test_padding(name, tmp_path):
    make = {**ABSORBED, **KEPT}[name]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), make(), nn.Conv2d(8, 4, 1))
    model = prepared(model, X).eval()
    qatkit.calibrate(model, [X], progress=False)
    report = qatkit.export_onnx(model, X, tmp_path / "a.onnx")
    assert report.verify.ok
    graph = onnx.load(tmp_path / "a.onnx").graph
    pads = [node for node in graph.node if node.op_type == "Pad"]
    made = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    assert len(pads) == (name in KEPT)
    assert all(set(n.input[:2]) <= made for n in graph.node if n.op_type == "Conv")
    assert not [f for f in report.findings if f.rule == "F18" and name in ABSORBED]
