"""Copies of models that hold computed tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qatkit.copying import deepcopy


class Keeper(nn.Module):
    """Keeps what it computes, in containers too, and one tensor under two names."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        self.last = self.layer(x)
        self.all = {"maps": [self.last, (self.last * 2,)]}
        return self.last


def test_computed_tensors_are_copied_without_their_history():
    model = Keeper()
    out = model(torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(model)
    twin = deepcopy(model)
    assert torch.equal(twin.last, out)
    assert twin.last.grad_fn is None
    assert twin.last is not model.last
    assert twin.all["maps"][0] is twin.last
    assert torch.equal(twin.all["maps"][1][0], 2 * out)
    assert model.last is out
    assert out.grad_fn is not None


def test_parameters_are_copied_as_ever():
    model = Keeper()
    twin = deepcopy(model)
    assert twin.layer.weight.requires_grad
    assert twin.layer.weight.data_ptr() != model.layer.weight.data_ptr()
    shared = deepcopy(model, {id(p): p for p in model.parameters()})
    assert shared.layer.weight is model.layer.weight


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_can_be_copied_after_a_step():
    model = torch.nn.utils.weight_norm(nn.Linear(2, 3))
    model(torch.ones(1, 2)).sum().backward()
    twin = deepcopy(model)
    assert torch.equal(twin(torch.ones(1, 2)), model(torch.ones(1, 2)))
