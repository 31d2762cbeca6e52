"""Adaptive pooling of any size, and sampling on a grid, reach the file at opset 13."""

from __future__ import annotations

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qatkit
from qatkit.export.plain_forms import PlainForms

SIZES = {
    1: [(4, 2), (5, 3), (1, 7), (3, 7), (6, 1), (4, None)],
    2: [((4, 6), (2, 3)), ((5, 6), 3), ((2, 2), 7), ((3, 9), (1, None)), ((7, 5), (None, 2))],
    3: [((2, 4, 4), 2), ((3, 4, 5), (2, 4, 7)), ((3, 4, 5), (None, 1, 1))],
}
CASES = [(n, given, wanted) for n, pairs in SIZES.items() for given, wanted in pairs]


@pytest.mark.parametrize(("dimensions", "given", "wanted"), CASES)
def test_pooling_equals_torch(dimensions, given, wanted):
    pool = getattr(F, f"adaptive_avg_pool{dimensions}d")
    lengths = given if isinstance(given, tuple) else (given,)
    if dimensions == 1 and wanted is None:
        wanted = given  # torch takes no None in one dimension
    x = torch.randn(2, 3, *lengths, dtype=torch.float64)
    expected = pool(x, wanted)
    with PlainForms(13):
        torch.testing.assert_close(pool(x, wanted), expected)
        torch.testing.assert_close(pool(x[0], output_size=wanted), expected[0])


def test_a_size_below_one_is_torchs_to_refuse():
    with PlainForms(13), pytest.raises(RuntimeError, match=r"non-negative|greater than"):
        F.adaptive_avg_pool2d(torch.zeros(1, 1, 4, 4), -1)


class Pyramid(nn.Module):
    """Pools to several sizes, as pyramid pooling and recognizers of text do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.pools = nn.ModuleList(nn.AdaptiveAvgPool2d(n) for n in (1, 2, 3, 6, 11))
        self.rows = nn.AdaptiveAvgPool2d((1, None))
        self.last = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv(x).relu()
        size = x.shape[-2:]
        x = x + sum(F.interpolate(self.last(pool(x)), size=size) for pool in self.pools)
        x = F.adaptive_avg_pool2d(x, (7, size[1]))
        return self.fc(self.rows(x).squeeze(2).transpose(1, 2))


@pytest.mark.parametrize("dynamic_batch", [True, False])
def test_a_model_with_such_pools_is_exported_and_verified(tmp_path, dynamic_batch):
    x = torch.randn(2, 3, 10, 10)
    model = qatkit.prepare(Pyramid().eval(), x)
    qatkit.calibrate(model, [x], progress=False)
    path = tmp_path / "a.onnx"
    report = qatkit.export_onnx(model, x, path, dynamic_batch=dynamic_batch)
    assert report.verify.ok, str(report)
    assert [one for one in report.findings if one.level == "ERROR"] == []
    if dynamic_batch:
        assert qatkit.verify_onnx(path, model, torch.randn(5, 3, 10, 10)).ok
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert {"AveragePool", "GlobalAveragePool"} & kinds


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
def test_sampling_equals_torch(mode, padding_mode, align_corners):
    x = torch.randn(3, 2, 5, 7, dtype=torch.float64)
    grid = 1.5 * torch.randn(3, 4, 6, 2, dtype=torch.float64)  # many points are outside
    grid[0, 0] = torch.tensor([[-1.0, -1], [1, 1], [0, 0], [1, -1], [1 / 7, 0], [-3, 3]])
    given = {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners}
    expected = F.grid_sample(x, grid, **given)
    with PlainForms(13):
        torch.testing.assert_close(F.grid_sample(x, grid, **given), expected)


class Warp(nn.Module):
    """A spatial transformer: the grid depends on the input."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3)
        self.flow = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x):
        x = self.conv(x).relu()
        grid = self.flow(x).tanh().permute(0, 2, 3, 1)
        return self.last(F.grid_sample(x, grid, align_corners=False))


@pytest.mark.parametrize(("opset", "native"), [(13, False), (16, True)])
def test_a_model_that_samples_is_exported_and_verified(tmp_path, opset, native):
    x = torch.randn(2, 3, 9, 8)
    model = qatkit.prepare(Warp().eval(), x)
    qatkit.calibrate(model, [x], progress=False)
    path = tmp_path / "a.onnx"
    report = qatkit.export_onnx(model, x, path, opset=opset)
    assert report.verify.ok, str(report)
    assert qatkit.verify_onnx(path, model, torch.randn(5, 3, 9, 8)).ok
    assert ("GridSample" in {node.op_type for node in onnx.load(path).graph.node}) == native


class Parts(nn.Module):
    """Takes the first token apart, as MViT does."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        first, rest = torch.tensor_split(self.one(x), (1,), dim=1)
        a, b, c = self.two(rest).tensor_split([1, 3], -1)
        return torch.cat((first, rest), 1), torch.cat((c, a, b), -1), *x.tensor_split(2, dim=1)


def test_tensor_split(tmp_path):
    x = torch.randn(2, 6, 4)
    model = qatkit.prepare(Parts().eval(), x)
    qatkit.calibrate(model, [x], progress=False)
    report = qatkit.export_onnx(model, x, tmp_path / "a.onnx")
    assert report.verify.ok
    assert report.verify.relative_difference < 1e-5
