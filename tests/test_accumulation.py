"""Within `quantize_weights_once` a weight is quantized again only when it has changed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import qatkit
from qatkit.kernels.cpu import rows

X = torch.randn(4, 128, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one for each pass over a weight."""
    passes: list[int] = []
    loops = rows.compiled_loops()
    if loops is None:
        pytest.skip("Numba is not installed")
    for name in ("round_rows", "round_clamp_rows"):
        loop = getattr(loops, name)
        monkeypatch.setattr(loops, name, lambda *a, loop=loop: (passes.append(1), loop(*a))[1])
    return passes


def prepared(frozen: bool = False) -> nn.Module:
    """Return a model with one large and one small weight."""
    torch.manual_seed(0)
    model = qatkit.prepare(
        nn.Sequential(nn.Conv2d(128, 300, 3), nn.ReLU(), nn.Conv2d(300, 8, 1)), X
    )
    qatkit.calibrate(model, [X], progress=False)
    if frozen:
        qatkit.freeze_ranges(model).apply()
        with torch.no_grad():
            for layer in (model[0], model[2]):
                layer.weight[0, 0].mul_(1.5)
    return model.train()


def train(model: nn.Module, once: bool, steps: int = 2, parts: int = 4) -> list[Tensor]:
    """Return all parameters and buffers after some steps of several forwards each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        with qatkit.quantize_weights_once(model) if once else qatkit.enable_quantization(model):
            for part in X.split(len(X) // parts):
                (model(part).square().mean() / parts).backward()
        optimizer.step()
    return [each.detach().clone() for each in model.state_dict().values()]


@pytest.mark.parametrize("frozen", [False, True])
def test_training_is_the_same(frozen: bool, quantized: list[int]) -> None:
    plain = train(prepared(frozen), once=False)
    each_time = len(quantized)
    quantized.clear()
    kept = train(prepared(frozen), once=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))
    assert each_time - len(quantized) == 2 * 3  # of four forwards, the large weight skips three


def test_a_change_is_noticed(quantized: list[int]) -> None:
    model = prepared()
    changes = [
        lambda: model[0].weight.detach().mul_(2),
        lambda: setattr(model[0].weight, "data", model[0].weight.data * 3),
        lambda: setattr(model[0], "weight", nn.Parameter(model[0].weight.detach() * 0.5)),
        lambda: qatkit.freeze_ranges(model[0]).apply(),
    ]
    with qatkit.quantize_weights_once(model):
        for change in changes:
            model(X)
            change()
            expected = copy.deepcopy(model)[0].quantized_weight()
            assert torch.equal(model[0].quantized_weight(), expected)


def test_a_hook_that_changes_the_weight_is_noticed() -> None:
    def halve(layer: nn.Module, _: object) -> None:
        with torch.no_grad():
            layer.weight.mul_(0.5)

    results = []
    for once in (False, True):
        model = prepared()
        model[0].register_forward_pre_hook(halve)
        results.append(train(model, once))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nothing_is_kept_outside_or_copied() -> None:
    model = prepared()
    with qatkit.quantize_weights_once(model):
        model(X).sum().backward()
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(q.once._kept is None for q in twin.modules() if hasattr(q, "once"))
            assert torch.equal(twin[0].quantized_weight(), model[0].quantized_weight())
    assert all(q.once is None for q in model.modules() if isinstance(q, qatkit.TensorQuantizer))
    with qatkit.quantize_weights_once(model), torch.no_grad():
        expected = model(X)
        model[0].weight.data.mul_(2)
        assert not torch.equal(model(X), expected)


def test_a_model_without_quantizers() -> None:
    with pytest.raises(qatkit.QatkitError, match="has no quantizers"):
        qatkit.quantize_weights_once(nn.Linear(2, 2))


def test_a_range_that_is_set_or_forgotten_in_between() -> None:
    model = prepared(frozen=True)
    quantizer = model[0].weight_quantizer
    with qatkit.quantize_weights_once(model):
        model(X)
        quantizer.set_range(-torch.ones(300), torch.ones(300))
        assert torch.equal(model[0].quantized_weight(), copy.deepcopy(model)[0].quantized_weight())
    model = prepared()
    quantizer = model[0].weight_quantizer
    with qatkit.quantize_weights_once(model):
        model(X)
        quantizer.reset_range()
        model(X)
    assert quantizer.num_batches == 1
    assert torch.equal(quantizer.max_val, model[0].weight.detach().amax((1, 2, 3)))


def test_a_result_that_was_written_to_is_not_used_again() -> None:
    model = prepared()
    with qatkit.quantize_weights_once(model):
        expected = model[0].quantized_weight().detach().clone()
        model[0].quantized_weight().mul_(2)
        assert torch.equal(model[0].quantized_weight(), expected)
