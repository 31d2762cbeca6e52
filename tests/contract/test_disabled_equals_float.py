"""Contract 2: with all quantizers off, the prepared model is the float model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import qatkit
from qatkit import QuantConfig
from qatkit.config import WEIGHT
from tests.contract.zoo import build, equal, run, train_step


def test_eval_is_exact(case):
    with qatkit.disable_quantization(case.model):
        assert equal(run(case.float, case.model), case.expected)


def test_enabled_is_something_else(case):
    assert not equal(case.outputs, case.expected)


def test_training_is_exact_with_gradients_and_batch_statistics(case):
    expected = copy.deepcopy(case.float.model)
    loss, gradients = train_step(case.float, expected)
    model = case.copy()
    with qatkit.disable_quantization(model):
        found, others = train_step(case.float, model)
    assert gradients.keys() == others.keys()
    if any(isinstance(module, nn.MultiheadAttention) for module in expected.modules()):
        torch.testing.assert_close(found, loss)  # its products are computed one by one
        torch.testing.assert_close(others, gradients, rtol=1e-3, atol=1e-6)
        return
    assert torch.equal(loss, found)
    assert [key for key in gradients if not torch.equal(gradients[key], others[key])] == []
    after = model.state_dict()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(after[key], tensor), key


def test_eval_changes_no_buffer(case):
    model = case.copy()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    run(case.float, model)
    assert [
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    ] == []


def test_training_estimates_every_reached_range_anew(light):
    before, (_, _, after) = light.model.state_dict(), light.trained
    counts = [key for key in before if key.endswith("quantizer.num_batches")]
    assert counts
    assert [key for key in counts if after[key] <= before[key]] == []


PER_TENSOR = WEIGHT.replace(axis=None)


@pytest.mark.parametrize(
    ("config", "exact"),
    [
        (QuantConfig(fold_batch_norm=False), True),
        (QuantConfig(weight=PER_TENSOR, fold_batch_norm=False), True),
        (QuantConfig(weight=PER_TENSOR), False),
        (QuantConfig(weight=WEIGHT.replace(power_of_two=True)), False),
        ("tensorrt-w4a4", True),
    ],
)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_other_configs(name, config, exact):
    float_case = build(name)
    model = qatkit.prepare(copy.deepcopy(float_case.model), float_case.inputs, config)
    qatkit.calibrate(model, [float_case.inputs], progress=False)
    with qatkit.disable_quantization(model):
        (found,) = run(float_case, model)
    (expected,) = run(float_case, float_case.model)
    if exact:
        assert torch.equal(found, expected)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
