"""Contract 1 and 3: the float model's keys and tensors, and what can be saved and loaded."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import qatkit
from tests.contract.zoo import equal, flags_of, is_quantizer, run, state_of, train_step


def test_float_keys_are_kept_with_the_same_tensors(case):
    after = case.model.state_dict(keep_vars=True)
    assert case.before.keys() <= after.keys()
    changed = [key for key, tensor in case.before.items() if after[key] is not tensor]
    assert changed == []
    assert [key for key in after.keys() - case.before.keys() if "quantizer." not in key] == []


def test_parameters_and_their_order_are_the_float_models(case):
    named = [name for name, _ in case.model.named_parameters()]
    assert named == [name for name, _ in case.float.model.named_parameters()]


def test_modules_are_instances_of_their_float_classes(case):
    modules = dict(case.model.named_modules())
    for path, module in case.float.model.named_modules():
        assert isinstance(modules[path], type(module)), path
        assert str(type(modules[path]).__name__).removeprefix("Quant") == type(module).__name__


def test_a_float_checkpoint_loads_strictly_and_keeps_the_ranges(case):
    model = case.copy()
    checkpoint = {
        key: tensor + 1 if tensor.is_floating_point() else tensor
        for key, tensor in case.float.model.state_dict().items()
    }
    ranges = {key: value for key, value in state_of(model).items() if is_quantizer(key)}
    model.load_state_dict(checkpoint, strict=True)
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in checkpoint.items())
    assert all(torch.equal(after[key], tensor) for key, tensor in ranges.items())


@pytest.mark.parametrize("trip", ["deepcopy", "pickle", "torch.save"])
def test_round_trip_gives_equal_outputs(light, trip):
    case = light
    if trip == "deepcopy":
        model = copy.deepcopy(case.model)
    elif trip == "pickle":
        model = pickle.loads(pickle.dumps(case.model))
    else:
        buffer = io.BytesIO()
        torch.save(case.model, buffer)
        buffer.seek(0)
        model = torch.load(buffer, weights_only=False)
    assert equal(run(case.float, model), case.outputs)
    assert flags_of(model) == flags_of(case.model)
    assert qatkit.plan(model, case.float.inputs) == qatkit.plan(case.model, case.float.inputs)
    shared = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    assert not shared & {id(tensor) for tensor in case.model.state_dict(keep_vars=True).values()}


def test_a_pickled_copy_trains_like_a_deep_copy(light):
    loss, gradients, state = light.trained
    model = pickle.loads(pickle.dumps(light.model))
    again, others = train_step(light.float, model)
    assert torch.equal(loss, again)
    assert gradients.keys() == others.keys()
    assert all(torch.equal(gradients[key], others[key]) for key in gradients)
    assert [
        key for key, value in model.state_dict().items() if not torch.equal(value, state[key])
    ] == []


def test_state_dict_loads_with_weights_only_into_a_freshly_prepared_model(case):
    buffer = io.BytesIO()
    torch.save(case.model.state_dict(), buffer)
    buffer.seek(0)
    fresh = qatkit.prepare(copy.deepcopy(case.float.model), case.float.inputs)
    fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert equal(run(case.float, fresh), case.outputs)
