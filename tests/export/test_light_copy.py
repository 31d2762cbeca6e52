"""The copy that is exported and verified shares the quantized weights, and changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qatkit
from qatkit.backend import get_backend
from qatkit.export.light_copy import light_copy
from qatkit.export.lowering import lower
from qatkit.export.marker import Marker


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.table = nn.Embedding(5, 4)
        self.free = nn.Parameter(torch.ones(4, 1, 1))
        self.head = nn.Linear(4, 2)
        self.tied = nn.Linear(4, 2)
        self.tied.weight = self.head.weight

    def forward(self, x):
        y = torch.relu(self.norm(self.conv(x))) * self.free
        y = y.mean((2, 3)) + self.table(torch.tensor([1, 2]))
        return self.head(y) + self.tied(y)


X = torch.randn(2, 3, 6, 6)


def prepared():
    model = qatkit.prepare(Net(), X)
    qatkit.calibrate(model, [X], progress=False)
    return model


def test_quantized_weights_are_shared_and_nothing_else():
    model = prepared()
    copy = light_copy(model)
    weights = {"conv.weight", "head.weight", "table.weight", "tied.weight"}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = copy.get_parameter(name)
        assert other is not parameter
        assert torch.equal(other, parameter)
        assert torch._C._is_cow_tensor(other) == (name in weights)
    for name, buffer in model.named_buffers():
        assert copy.get_buffer(name).data_ptr() != buffer.data_ptr() or not buffer.numel()
    assert copy.head.weight is copy.tied.weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_type_stays_with_the_model(dtype):
    model = prepared().to(dtype).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copy = light_copy(model)
    assert model.training
    assert not copy.training
    assert copy.conv.weight.dtype == torch.float32
    with torch.no_grad():
        copy.conv.weight.zero_()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


def test_a_lowered_model_holds_codes_of_one_byte():
    model = prepared().eval()
    lowered = lower(model, get_backend("tensorrt"))
    markers = [each for each in lowered.modules() if isinstance(each, Marker)]
    stored = [each for each in markers if each.stored is not None]
    assert len(stored) == 4
    assert {each.stored.dtype for each in stored} == {torch.int8}
    assert torch._C._is_cow_tensor(lowered.head.weight)
    difference = (lowered(X) - model(X)).abs().max()
    assert difference <= 1e-5


def test_a_forward_that_writes_to_its_weights_does_not_reach_the_model(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    model = qatkit.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), x)
    qatkit.calibrate(model, [x], progress=False)

    def clip(layer, _):
        layer.weight.data.clamp_(-0.1, 0.1)

    model[0].register_forward_pre_hook(clip)
    before = model[0].weight.detach().clone()
    qatkit.export_onnx(model, x, str(tmp_path / "a.onnx"), verify=False)
    assert torch.equal(model[0].weight, before)
