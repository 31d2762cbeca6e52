from __future__ import annotations

import pytest
import torch
from torch import nn

from qatkit.functional import fold_scale, folded_weight_and_bias


def batch_norm(kind, channels: int):
    norm = kind(channels).eval()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.copy_(torch.randn(channels))
        norm.running_var.uniform_(0.1, 2.0)
        norm.weight[0] = 0.0
    return norm


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("layer", "kind", "shape", "axis"),
    [
        (nn.Conv2d, nn.BatchNorm2d, (2, 3, 8, 8), 0),
        (nn.ConvTranspose2d, nn.BatchNorm2d, (2, 3, 8, 8), 1),
        (nn.Linear, nn.BatchNorm1d, (4, 3), 0),
    ],
)
def test_folded_layer_does_the_same(layer, kind, shape, axis, bias):
    size = {} if layer is nn.Linear else {"kernel_size": 3}
    one, norm = layer(3, 5, bias=bias, **size), batch_norm(kind, 5)
    x = torch.randn(shape)
    want = norm(one(x))
    weight, shift = folded_weight_and_bias(
        one.weight, one.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var,
        norm.eps, axis,
    )  # fmt: skip
    assert weight.dtype == shift.dtype == torch.float32
    assert not weight.requires_grad
    folded = layer(3, 5, **size)
    folded.load_state_dict({"weight": weight, "bias": shift})
    torch.testing.assert_close(folded(x), want, rtol=1e-5, atol=1e-5)
    assert not weight.select(axis, 0).any()


def test_without_affine():
    weight, shift = folded_weight_and_bias(
        torch.ones(2, 1), None, None, None, torch.ones(2), torch.tensor([4.0, 1.0]), 0.0
    )
    assert weight.flatten().tolist() == [0.5, 1.0]
    assert shift.tolist() == [-0.5, -1.0]
    assert fold_scale(None, torch.tensor([4.0]), 0.0).tolist() == [0.5]


def test_fold_scale_is_usable_everywhere():
    gamma = nn.Parameter(torch.tensor([2.0, -2.0, 0.0, 1.0, torch.nan, 1e-45, 1.0]))
    var = torch.tensor([4.0, 4.0, 4.0, 0.0, 1.0, 1.0, torch.inf])
    scale = fold_scale(gamma, var, 0.0)
    assert scale.tolist() == [1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert not scale.requires_grad
