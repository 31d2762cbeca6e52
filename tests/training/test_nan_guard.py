"""A batch with NaN changes nothing, and the warning names where it began."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qatkit
from qatkit.errors import QatkitError, QatkitTypeError
from qatkit.modes import quantizers
from qatkit.training.nan_guard import NanGuard
from tests.training.nets import PER_TENSOR, X, batch, net, same, sgd, state

NAN = torch.full_like(X, math.nan)


def train(
    model: nn.Module,
    guard: NanGuard,
    inputs: list[Tensor],
    optimizer: torch.optim.Optimizer,
) -> list[bool]:
    skipped = []
    for x in inputs:
        loss = model(x).square().mean()
        skipped.append(guard.skip(loss))
        if skipped[-1]:
            continue
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return skipped


@pytest.mark.parametrize("config", ["tensorrt-int8", PER_TENSOR], ids=["per channel", "per tensor"])
def test_a_run_with_bad_batches_is_the_run_without_them(config: Any) -> None:
    good = [batch(index)[0] for index in range(4)]
    one = good[2].clone()
    one[0, 1, 2, 3] = math.nan
    runs = []
    for inputs in (good, [good[0], NAN, good[1], one, good[2], good[3], NAN]):
        model = net(config)
        optimizer = sgd(model)
        with NanGuard(model) as guard, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            skipped = train(model, guard, inputs, optimizer)
        runs.append(state(model))
    assert skipped == [False, True, False, True, False, False, True]
    assert (guard.batches, guard.skipped) == (7, 3)
    assert [str(each.message).split(":")[0] for each in caught] == [
        "batch 1 skipped, the loss is nan",
        "batch 3 skipped, the loss is nan",
        "batch 6 skipped, the loss is nan",
    ]
    assert all("the input of the model is not finite" in str(each.message) for each in caught)
    assert same(runs[0], runs[1])


def test_without_a_guard_the_ranges_are_not_poisoned() -> None:
    model = net()
    model(X)
    model(NAN)
    for path, quantizer in quantizers(model):
        assert bool(torch.isfinite(quantizer.amax).all()), path


def test_a_bad_first_batch_leaves_no_range() -> None:
    model = net()
    guard = NanGuard(model)
    with pytest.warns(UserWarning, match="batch 0 skipped"):
        assert guard.skip(model(NAN).sum())
    assert not any(each.calibrated for _, each in quantizers(model) if each.spec.memory != "latest")
    assert not guard.skip(model(X).square().mean())


class Root(nn.Module):
    """Has a square root that a module computes, and one that the block around it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.after = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.after(self.block(x).clamp(min=-1.0))


def at(path: str) -> Callable[[nn.Module], None]:
    """Return what lets a module give NaN."""

    def change(model: nn.Module) -> None:
        model.get_submodule(path).register_forward_hook(lambda _, __, output: output * math.nan)

    return change


def weight_of(path: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model.get_parameter(path).data[0] = math.nan

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at("before"), r"is that of 'before' \(Linear\)$"),
        (at("block.0"), r"is that of 'block\.0' \(Linear\)$"),
        (at("block"), r"is that of 'block' \(Sequential\)$"),
        (at("after"), r"is that of 'after' \(Linear\)$"),
        (at(""), r"is that of the model itself \(Root\)$"),
        (
            weight_of("block.1.weight"),
            r"is that of 'block\.1' \(BatchNorm1d\), whose weight is not$",
        ),
    ],
)
def test_the_first_module_is_named(change: Callable[[nn.Module], None], message: str) -> None:
    model = Root().train()
    change(model)
    before = state(model)
    guard = NanGuard(model)
    loss = model(torch.randn(3, 4)).sum()
    random = torch.get_rng_state()
    with pytest.warns(UserWarning, match=message):
        assert guard.skip(loss)
    assert torch.equal(torch.get_rng_state(), random)
    now = state(model)
    assert all(torch.equal(now[name], value) for name, value in before.items() if "running" in name)


def test_it_is_named_in_a_compiled_model_too() -> None:
    inner = Root().train()
    at("block.0")(inner)
    model: Any = torch.compile(inner, backend="eager")
    before = state(inner)
    guard = NanGuard(model)
    loss = model(torch.randn(3, 4)).sum()
    with pytest.warns(UserWarning, match=r"is that of 'block\.0' \(Linear\)$"):
        assert guard.skip(loss)
    now = state(inner)
    assert all(torch.equal(now[name], value) for name, value in before.items() if "running" in name)


def test_a_quantized_layer_is_named() -> None:
    model = net()
    with torch.no_grad():
        model.layer1.conv2.weight[0] = math.inf
    guard = NanGuard(model)
    with pytest.warns(UserWarning, match=r"that of 'layer1\.conv2(\.weight_quantizer)?' "):
        assert guard.skip(model(X).sum())


def test_a_loss_that_is_nan_by_itself() -> None:
    model = net()
    guard = NanGuard(model)
    loss = model(X).sum() * math.nan
    with pytest.warns(UserWarning, match="every output is finite, it begins in the loss"):
        assert guard.skip(loss)


def test_gradients_can_be_judged_too() -> None:
    model, twin = net(), net()
    optimizer = sgd(model)
    guard = NanGuard(model)
    loss = (model(X) * 0.0).abs().sqrt().sum()  # 0, with an infinite slope
    assert not guard.skip(loss)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.warns(UserWarning, match="batch 0 skipped.* the loss or a gradient"):
        assert guard.skip(norm)
    optimizer.zero_grad()
    assert same(state(model), state(twin))


def test_several_forwards_of_one_loss() -> None:
    model = net()
    guard = NanGuard(model)
    model(X)
    guard.skip(0.0)
    before = state(model)
    loss = model(X).sum() + model(NAN).sum() + model(X + 1).sum()
    with pytest.warns(UserWarning, match="input of the model"):
        assert guard.skip(loss)
    assert same(state(model), before)


def test_gradient_accumulation_keeps_the_good_part() -> None:
    model, twin = net(), net()
    guard = NanGuard(model)
    for x in (X, NAN, X + 1):
        loss = model(x).square().mean()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if guard.skip(loss):
                continue
        loss.backward()
    for x in (X, X + 1):
        twin(x).square().mean().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_overflowing_gradients_are_the_business_of_the_scaler() -> None:
    model = net()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    guard = NanGuard(model)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(X).float().square().sum() * 1e3
    assert not guard.skip(loss)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    assert guard.skipped == 0
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_the_search_runs_under_the_same_autocast() -> None:
    class Overflows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    model = Overflows().train()
    nn.init.constant_(model.fc.weight, 300.0)
    guard = NanGuard(model)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(torch.full((1, 2), 300.0)).sum()
    assert loss.isinf()
    with pytest.warns(UserWarning, match=r"the loss is inf: .* 'fc' \(Linear\)"):
        assert guard.skip(loss)


def test_eval_is_not_watched() -> None:
    model = net()
    model(X)
    guard = NanGuard(model)
    train(model, guard, [X], sgd(model))
    model.eval()(NAN)
    model.train()
    before = state(model)
    assert not guard.skip(model(X).sum())
    assert guard.batches == 2
    assert not same(state(model), before)


def test_copies_have_no_guard_and_close_removes_it() -> None:
    model = net()
    hooks = list(model._forward_pre_hooks)
    guard = NanGuard(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(X)
    with pytest.warns(UserWarning, match="no forward in training was seen"):
        assert guard.skip(math.nan)
    guard.close()
    assert list(model._forward_pre_hooks) == hooks


def test_after_a_move_of_the_model() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2)).train()
    guard = NanGuard(model)
    guard.skip(model(torch.randn(4, 2)).sum())
    model.double()
    x = torch.randn(4, 2, dtype=torch.float64)
    guard.skip(model(x).sum())
    before = state(model)
    with pytest.warns(UserWarning, match="batch 2"):
        guard.skip(model(x * math.nan).sum())
    assert same(state(model), before)


@pytest.mark.parametrize("value", ["1", None, [1.0]])
def test_illegal_values(value: Any) -> None:
    with pytest.raises(QatkitTypeError, match=r"NanGuard\.skip: got a"):
        NanGuard(net()).skip(value)


def test_illegal_model() -> None:
    with pytest.raises(QatkitError, match=r"not a torch\.nn\.Module"):
        NanGuard(3)  # type: ignore[arg-type]


def test_it_works_with_a_schedule_and_a_distiller() -> None:
    model = net()
    teacher = copy.deepcopy(model)
    qatkit.disable_quantization(teacher).apply()
    schedule = qatkit.QATSchedule(model, 2, damping=0.1, bits={0: 8, 1: 4})
    optimizer = sgd(model)
    with qatkit.NanGuard(model) as guard, qatkit.Distiller(model, teacher) as distill:
        for index in range(2):
            for x in (batch(index)[0], NAN):
                output = model(x)
                loss = F.mse_loss(output, torch.zeros_like(output)) + distill(x, output)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    if guard.skip(loss):
                        continue
                loss = loss + schedule.damping_loss()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
    assert guard.skipped == 2
    assert all(bool(torch.isfinite(value).all()) for value in state(model).values())
