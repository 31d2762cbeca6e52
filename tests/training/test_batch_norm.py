"""New statistics against those of all elements, in a model that is otherwise as before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qatkit
from qatkit.errors import QatkitError, QatkitTypeError
from qatkit.freeze import freeze_batch_norm, freeze_ranges
from qatkit.modes import quantizers
from qatkit.nn.batchnorm import batch_norms, statistics_are_frozen
from qatkit.nn.weights import weights_of
from qatkit.training.batch_norm import reestimate_batch_norm
from tests.training.nets import PER_TENSOR, W4A4, batch, net, same, sgd, state, step

DATA = [batch(index)[0] for index in range(20, 23)]


def trained(config: Any = W4A4) -> Any:
    model = net(config)
    optimizer = sgd(model)
    for index in range(4):
        step(model, optimizer, index)
    return model


def only(tensors: dict[str, Tensor], *endings: str) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if name.endswith(endings)}


def flags(model: nn.Module) -> list[Any]:
    return [
        (
            module.training,
            getattr(module, "observe", None),
            getattr(module, "momentum", None),
            len(module._forward_pre_hooks),
            statistics_are_frozen(module),
        )
        for module in model.modules()
    ]


def oracle(model: nn.Module, data: list[Tensor]) -> dict[str, Tensor]:
    """Return mean and variance of all that reaches each batch norm, in float64 over one tensor.

    The model runs in eval but for the batch norms, which normalize with each batch.
    """
    twin = copy.deepcopy(model).eval()
    seen: dict[str, list[Tensor]] = {}
    for path, norm in batch_norms(twin):
        qatkit.nn.batchnorm.thaw_statistics(norm)
        norm.training = True

        def look(_: nn.Module, args: Any, path: str = path) -> None:
            seen.setdefault(path, []).append(args[0].detach())

        norm.register_forward_pre_hook(look)
    before = state(twin)
    with torch.no_grad():
        for x in data:
            twin(x)
            twin.load_state_dict(before)
    found = {}
    for path, parts in seen.items():
        whole = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], 1).double()
        found[f"{path}.running_mean"] = whole.mean(1)
        found[f"{path}.running_var"] = whole.var(1)
    return found


@pytest.mark.parametrize("frozen", [False, True], ids=["thawed", "frozen"])
@pytest.mark.parametrize("config", [W4A4, PER_TENSOR], ids=["per channel", "per tensor"])
def test_statistics_are_those_of_all_elements(frozen: bool, config: Any) -> None:
    model = trained(config)
    if frozen:
        freeze_batch_norm(model).apply()
    data = [*DATA, batch(23)[0][:3]]  # the last batch is smaller
    wanted = oracle(model, data)
    before, flags_before = state(model), flags(model)
    paths = reestimate_batch_norm(model, data, progress=False)
    assert paths == tuple(path for path, _ in batch_norms(model))
    after = state(model)
    for name, value in wanted.items():
        assert torch.allclose(after[name].double(), value, rtol=1e-4, atol=1e-5), name
        assert not torch.equal(after[name], before[name])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(wanted)
    assert flags(model) == flags_before


def test_equal_batches_give_the_mean_of_torch() -> None:
    model = trained()
    twin = copy.deepcopy(model)
    reestimate_batch_norm(model, DATA)
    for quantizer in (each for _, each in quantizers(twin)):
        quantizer.observe = "never" if quantizer.spec.memory != "latest" else "training"
    torch.optim.swa_utils.update_bn(DATA, twin)
    ours, theirs = (only(state(each), "running_mean") for each in (model, twin))
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], atol=1e-5), name


def test_the_frozen_range_of_a_folded_weight_follows() -> None:
    model = trained(PER_TENSOR)
    freeze_batch_norm(model).apply()
    freeze_ranges(model).apply()
    before = state(model)
    reestimate_batch_norm(model, DATA)
    for weight in weights_of(model):
        if weight.layer is not None and weight.layer.batch_norm is not None:
            assert torch.equal(weight.quantizer.amax, weight.seen.detach().abs().max())
            assert not torch.equal(weight.quantizer.max_val, before[f"{weight.path}.max_val"])
            assert weight.quantizer.observe == "never"
    for name, value in only(
        state(model), *(f"input_quantizer.{m}_val" for m in ("min", "max"))
    ).items():
        assert torch.equal(value, before[name])


def test_it_brings_back_statistics_that_are_off() -> None:
    model = trained()
    reestimate_batch_norm(model, DATA)
    good = state(model)
    for _, norm in batch_norms(model):
        norm.running_mean.add_(3.0)
        norm.running_var.mul_(10.0)
    reestimate_batch_norm(model, DATA)
    for name, value in state(model).items():
        assert torch.allclose(value, good[name], rtol=1e-4, atol=1e-5), name


def test_observing_always_is_no_exception() -> None:
    model = trained()
    for _, quantizer in quantizers(model):
        quantizer.observe = "always"
    before = only(state(model), "_val", "num_batches")
    reestimate_batch_norm(model, DATA)
    assert same(only(state(model), "_val", "num_batches"), before)
    assert {quantizer.observe for _, quantizer in quantizers(model)} == {"always"}


def test_batches_forms_and_float_models() -> None:
    float_net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, momentum=None)).train()
    x = torch.randn(6, 2)
    results = []
    for data in ([x, x + 1], [(x, 0), (x + 1, 0), (x, 0)], [{"input": x}, {"input": x + 1}]):
        twin = copy.deepcopy(float_net)
        reestimate_batch_norm(twin, data, batches=2)
        results.append(state(twin))
    assert all(same(results[0], each) for each in results)
    wanted = torch.cat([x, x + 1])
    assert torch.allclose(results[0]["0.running_mean"], wanted.mean(0), atol=1e-6)
    assert torch.allclose(results[0]["0.running_var"], wanted.var(0), atol=1e-6)


def test_no_batch_norms_and_unreached_ones(caplog: pytest.LogCaptureFixture) -> None:
    assert reestimate_batch_norm(nn.Linear(3, 3), [torch.ones(2, 3)]) == ()

    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.aside = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.aside(self.used(x)) if self.training else self.used(x)

    model = Aside().train()
    assert reestimate_batch_norm(model, [torch.randn(4, 3)]) == ("used",)
    assert "aside" in caplog.text
    assert torch.equal(model.aside.running_mean, torch.zeros(3))


def broken(kind: str) -> list[Any]:
    return {
        "empty": [],
        "nan": [DATA[0], torch.full_like(DATA[0], float("nan"))],
        "shape": [DATA[0], torch.zeros(2, 5, 8, 8)],
        "one value": [DATA[0], DATA[1][:1, :, :1, :1]],
        "no input": [DATA[0], {"y": DATA[0]}],
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "has no batches"),
        ("nan", r"NaN or Inf in the input of 'bn' in batch 1"),
        ("shape", "does not run on batch 1"),
        ("one value", "does not run on batch 1"),
        ("no input", "batch 1 is a dict"),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_an_error_leaves_the_model_as_it_was(kind: str, message: str, frozen: bool) -> None:
    model = trained()
    if frozen:
        freeze_batch_norm(model).apply()
    before, flags_before = state(model), flags(model)
    with pytest.raises(QatkitError, match=message):
        reestimate_batch_norm(model, broken(kind))
    assert same(state(model), before)
    assert flags(model) == flags_before


def test_illegal_input() -> None:
    with pytest.raises(QatkitTypeError, match=r"not a torch\.nn\.Module"):
        reestimate_batch_norm(3, DATA)  # type: ignore[arg-type]
    with pytest.raises(QatkitTypeError, match="iterable of batches"):
        reestimate_batch_norm(nn.BatchNorm1d(2), torch.ones(2, 2))
    with pytest.raises(QatkitError, match="positive integer"):
        reestimate_batch_norm(nn.BatchNorm1d(2), [torch.ones(2, 2)], batches=0)
