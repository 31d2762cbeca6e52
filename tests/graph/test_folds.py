"""F5: which batch norm is folded into which layer."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import qatkit
from tests.graph.blocks import X, conv, prepared


def folds(model, inputs=X):
    plan = qatkit.plan(model, inputs)
    return {layer.path: layer.batch_norm for layer in plan.layers}


def test_conv_and_batch_norm():
    model = nn.Sequential(
        conv(3), nn.BatchNorm2d(8), nn.ReLU(), conv(), nn.ReLU(), nn.BatchNorm2d(8)
    )
    assert folds(model) == {"0": "1", "3": None}


def test_transposed_convolution():
    model = nn.Sequential(nn.ConvTranspose2d(3, 8, 2), nn.BatchNorm2d(8))
    assert folds(model) == {"0": "1"}
    prepared(model)


def test_frozen_batch_norm():
    model = nn.Sequential(conv(3), FrozenBatchNorm2d(8), nn.ReLU(), conv())
    model[1].running_var.uniform_(0.5, 2)
    assert folds(model) == {"0": "1", "3": None}
    prepared(model)


@pytest.mark.parametrize("shape", [(4, 8), (4, 5, 8)])
def test_linear_only_with_two_dimensions(shape):
    features = 6 if len(shape) == 2 else shape[1]
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(features))
    expected = "1" if len(shape) == 2 else None
    assert folds(model, torch.randn(shape)) == {"0": expected}
    prepared(model, torch.randn(shape))


def test_linear_in_three_dimensions_whose_sizes_agree_is_not_folded():
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6))
    assert folds(model, torch.randn(4, 6, 8)) == {"0": None}


def test_without_statistics_or_affine():
    model = nn.Sequential(
        conv(3),
        nn.BatchNorm2d(8, track_running_stats=False),
        conv(),
        nn.BatchNorm2d(8, affine=False),
    )
    assert folds(model) == {"0": None, "2": "3"}
    prepared(model)


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(3), nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y.mean()


class Returned(TwoReaders):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y), y


class ReturnedInDict(TwoReaders):
    def forward(self, x):
        y = self.conv(x)
        return {"out": self.norm(y), "features": [y]}


class CalledTwice(TwoReaders):
    def forward(self, x):
        return self.norm(self.conv(x)) + self.norm(self.conv(x * 2))


class NormTwice(TwoReaders):
    def forward(self, x):
        y = self.norm(self.conv(x))
        return self.norm(y)


class Hidden(TwoReaders):
    """The second reader is a view."""

    def forward(self, x):
        y = self.conv(x)
        rows = y.flatten(2)
        return self.norm(y).sum() + rows.sum()


class Inplace(TwoReaders):
    """An operator stands between the two, in place."""

    def forward(self, x):
        y = self.conv(x)
        y.add_(1.0)
        return self.norm(y)


class InTraining(TwoReaders):
    """The output has a second reader only in training."""

    def forward(self, x):
        y = self.conv(x)
        out = self.norm(y)
        return out + 0 * y if self.training else out


@pytest.mark.parametrize(
    "kind", [TwoReaders, Returned, ReturnedInDict, CalledTwice, NormTwice, Hidden, Inplace]
)
def test_no_fold(kind):
    assert folds(kind()) == {"conv": None}
    prepared(kind())


def test_named_tuple_output_counts_as_a_reader():
    assert folds(ReturnedInTuple()) == {"conv": None}
    prepared(ReturnedInTuple())


Out = collections.namedtuple("Out", "out features")


class ReturnedInTuple(TwoReaders):
    def forward(self, x):
        y = self.conv(x)
        return Out(self.norm(y), y)


class Functional(TwoReaders):
    """Dropout that does nothing in eval may stand between in the model, not in the fold."""

    def forward(self, x):
        return self.norm(nn.functional.dropout(self.conv(x), 0.5, self.training))


def test_something_between_them():
    assert folds(Functional()) == {"conv": None}
    prepared(Functional())


def test_functional_batch_norm_has_no_module():
    class Net(TwoReaders):
        def forward(self, x):
            n = self.norm
            return nn.functional.batch_norm(self.conv(x), n.running_mean, n.running_var)

    assert folds(Net()) == {"conv": None}
