"""Contract 4: prepare twice = once, no call changes a training flag, contexts restore."""

from __future__ import annotations

import copy

import pytest
import torch

import qatkit
from qatkit.modes import quantizers
from tests.contract.zoo import flags_of, is_quantizer, state_of


def switches(model):
    return [(path, q.quantize, q.observe) for path, q in quantizers(model)]


def mixed(model):
    """Put every third module in training mode and the others in eval."""
    for i, module in enumerate(model.modules()):
        module.training = i % 3 == 0
    return model


def test_prepare_twice_is_once(case):
    model = case.copy()
    modules = dict(model.named_modules(remove_duplicate=False))
    classes = {path: type(module) for path, module in modules.items()}
    plan = qatkit.plan(model, case.float.inputs)
    before = state_of(model)
    assert qatkit.prepare(model, case.float.inputs) is model
    assert qatkit.prepare(model, case.float.inputs, plan.config) is model
    assert qatkit.plan(model, case.float.inputs) is plan
    again = dict(model.named_modules(remove_duplicate=False))
    assert again.keys() == modules.keys()
    assert all(
        again[path] is module and type(module) is classes[path] for path, module in modules.items()
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_another_config_is_refused(case):
    with pytest.raises(qatkit.QatkitError, match="prepared with another config"):
        qatkit.prepare(case.model, case.float.inputs, "tensorrt-w4a4")


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_plan_and_prepare_keep_training_flags_and_everything_else(case, mode):
    model = copy.deepcopy(case.float.model)
    model.train(mode == "train")
    if mode == "mixed":
        mixed(model)
    flags, state = flags_of(model), state_of(model)
    numbers = torch.get_rng_state()
    hooks = {path: len(m._forward_hooks) for path, m in model.named_modules()}
    attributes = {path: set(vars(m)) for path, m in model.named_modules()}
    plan = qatkit.plan(model, case.float.inputs)
    assert flags_of(model) == flags
    assert {path: set(vars(m)) for path, m in model.named_modules()} == attributes
    assert [type(m) for m in model.modules()] == [type(m) for m in case.float.model.modules()]
    qatkit.prepare(model, case.float.inputs)
    hooks[""] += 2  # the ranges of the ranks meet at the end of the model's forward
    after = flags_of(model)
    assert {path: after[path] for path in flags} == flags
    assert {path: len(model.get_submodule(path)._forward_hooks) for path in hooks} == hooks
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert qatkit.plan(model, case.float.inputs) == plan
    for _, quantizer in quantizers(model):
        owner = model.get_submodule(quantizer.name.rpartition(".")[0])
        assert quantizer.training == owner.training, quantizer.name


def test_a_prepared_model_in_eval_mode_observes_nothing(case):
    model = qatkit.prepare(copy.deepcopy(case.float.model).eval(), case.float.inputs)
    assert [path for path, q in quantizers(model) if q.observing] == []


def test_calls_keep_flags_switches_and_the_rest(case):
    model = mixed(case.copy())
    flags, switched, state = flags_of(model), switches(model), state_of(model)
    ranges = {key for key in state if is_quantizer(key)}
    qatkit.calibrate(model, [case.float.inputs], progress=False)
    str(qatkit.summary(model))
    with qatkit.freeze_ranges(model), qatkit.freeze_batch_norm(model):
        pass
    assert flags_of(model) == flags
    assert switches(model) == switched
    after = model.state_dict()
    assert [
        key for key in state if key not in ranges and not torch.equal(after[key], state[key])
    ] == []


def test_contexts_restore_each_quantizer_also_after_an_exception(case):
    model = case.copy()
    first, *_, last = [path for path, _ in quantizers(model)]
    qatkit.disable_quantization(model, first).apply()
    model.get_submodule(last).observe = "never"
    before = switches(model)
    with (  # noqa: PT012
        pytest.raises(ZeroDivisionError),
        qatkit.enable_quantization(model),
        qatkit.freeze_ranges(model),
    ):
        assert all(quantize and observe == "never" for _, quantize, observe in switches(model))
        with qatkit.disable_quantization(model):
            assert not any(quantize for _, quantize, _ in switches(model))
            raise ZeroDivisionError
    assert switches(model) == before
