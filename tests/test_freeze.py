"""Frozen ranges and batch norms: nothing moves while they are, everything is back afterwards."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatkit.calibrate import calibrate
from qatkit.config import QuantConfig
from qatkit.errors import QatkitError, QatkitTypeError
from qatkit.freeze import freeze_batch_norm, freeze_known_ranges, freeze_ranges
from qatkit.modes import disable_quantization, quantizers
from qatkit.nn import QuantLinear
from qatkit.nn.batchnorm import statistics_are_frozen
from qatkit.prepare import prepare

X = torch.linspace(-2, 3, 4 * 3 * 6 * 6).reshape(4, 3, 6, 6)
PER_TENSOR = QuantConfig(weight=QuantConfig().weight.replace(axis=None))


def model(config: QuantConfig | None = None) -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([0.5, -2.0, 0.0, 3.0]))
        net[1].running_var.copy_(torch.tensor([0.3, 2.0, 1.0, 0.1]))
    prepare(net, X, config)
    return net.train()


def buffers(net: nn.Module, part: str = "") -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items() if part in name}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def observe(net: nn.Module) -> list[str]:
    return [quantizer.observe for _, quantizer in quantizers(net)]


def train(net: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.zero_grad()
    net(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("config", [None, PER_TENSOR], ids=["per channel", "per tensor"])
def test_frozen_ranges_do_not_move(config: QuantConfig | None) -> None:
    net = model(config)
    net(X)
    freeze_ranges(net).apply()
    before = buffers(net, "quantizer")
    train(net, 5 * X)
    net.eval()(7 * X)
    assert equal(buffers(net, "quantizer"), before)
    assert set(observe(net)) == {"never"}


@pytest.mark.parametrize("config", [None, PER_TENSOR], ids=["per channel", "per tensor"])
def test_freezing_changes_no_output(config: QuantConfig | None) -> None:
    net = model(config)
    calibrate(net, [X])
    net(X)
    train(net, X)  # the remembered range of the weight is now one step old
    net.eval()
    with torch.no_grad():
        expected = net(X)
        freeze_ranges(net).apply()
        assert torch.equal(net(X), expected)


def test_the_frozen_range_of_a_folded_weight() -> None:
    net = model(PER_TENSOR)
    net(X)
    norm = net[1]
    s = norm.weight / (norm.running_var + norm.eps).sqrt()
    s = torch.where(s == 0, 1.0, s)
    freeze_ranges(net).apply()
    folded = net[0].weight * s[:, None, None, None]
    torch.testing.assert_close(net[0].weight_quantizer.amax, folded.abs().max().detach())


def test_the_context_restores_flags_and_ranges() -> None:
    net = model()
    net(X)
    train(net, X)
    net[0].input_quantizer.observe = "never"
    before, flags = buffers(net, "quantizer"), observe(net)
    with freeze_ranges(net):
        train(net, 3 * X)
    assert observe(net) == flags
    assert equal(buffers(net, "quantizer"), before)
    net(9 * X)
    assert not equal(buffers(net, "quantizer"), before)


def test_nested_and_after_an_exception() -> None:
    net = model()
    net(X)
    before, flags = buffers(net, "quantizer"), observe(net)

    def fail() -> None:
        with freeze_ranges(net):
            with freeze_ranges(net):
                pass
            assert set(observe(net)) == {"never"}
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert observe(net) == flags
    assert equal(buffers(net, "quantizer"), before)


def test_freezing_again_keeps_the_frozen_range() -> None:
    net = model()
    net(X)
    freeze_ranges(net).apply()
    frozen = buffers(net, "quantizer")
    train(net, X)
    freeze_ranges(net).apply()
    assert equal(buffers(net, "quantizer"), frozen)


def test_weights_need_no_calibration_and_forget_again() -> None:
    net = model()
    for path, quantizer in quantizers(net):
        if path.endswith("input_quantizer"):
            quantizer.set_range(-1.0, 1.0)
    with freeze_ranges(net):
        assert all(quantizer.calibrated for _, quantizer in quantizers(net))
    assert not net[0].weight_quantizer.calibrated


def test_no_range_is_an_error_that_changes_nothing() -> None:
    net = model()
    net[3].input_quantizer.set_range(-1.0, 1.0)
    before, flags = buffers(net), observe(net)
    mode = freeze_ranges(net)
    with pytest.raises(QatkitError, match=r"'0\.input_quantizer' has no range; run qatkit.calib"):
        mode.apply()
    with pytest.raises(QatkitError, match="has no range"), mode:
        pass
    assert equal(buffers(net), before)
    assert observe(net) == flags
    disable_quantization(net, "0").apply()
    mode.apply()


def test_freeze_known_ranges_leaves_the_others(caplog: pytest.LogCaptureFixture) -> None:
    net = model()
    net[3].input_quantizer.set_range(-1.0, 1.0)
    freeze_known_ranges(net)
    assert net[0].input_quantizer.observe == "training"
    assert net[3].input_quantizer.observe == "never"
    assert "have seen no data: 0.input_quantizer;" in caplog.text


@pytest.mark.parametrize("verb", [freeze_ranges, freeze_batch_norm])
@pytest.mark.parametrize("wrong", [None, 3, nn.Linear])
def test_no_module(verb: Any, wrong: Any) -> None:
    with pytest.raises(QatkitTypeError, match=r"not a torch\.nn\.Module"):
        verb(wrong)


def test_no_quantizers() -> None:
    with pytest.raises(QatkitError, match=r"no quantizers, call qatkit\.prepare"):
        freeze_ranges(nn.Linear(2, 2))


# ------------------------------------------------------------------------------- batch norms

SHAPES = {
    nn.BatchNorm1d: (5, 3),
    nn.BatchNorm2d: (5, 3, 4, 4),
    nn.BatchNorm3d: (5, 3, 2, 4, 4),
    nn.SyncBatchNorm: (5, 3, 4, 4),
}


class ActivatedNorm(nn.BatchNorm2d):
    """A batch norm with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


SHAPES[ActivatedNorm] = (5, 3, 4, 4)


def trained(kind: type[nn.Module]) -> nn.Module:
    norm = kind(3)
    for buffer, value in (("running_mean", 0.5), ("running_var", 4.0)):
        getattr(norm, buffer).fill_(value)
    return norm.train()


@pytest.mark.parametrize("kind", SHAPES)
def test_a_frozen_batch_norm(kind: type[nn.Module]) -> None:
    norm, x = trained(kind), torch.randn(SHAPES[kind])
    expected = copy.deepcopy(norm).eval()(x)
    before, keys = buffers(norm), list(norm.state_dict())
    net = nn.Sequential(norm)
    freeze_batch_norm(net).apply()
    net.train()
    y = net(x)
    y.sum().backward()
    assert torch.equal(y, expected)
    assert equal(buffers(norm), before)
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    assert norm.training
    assert isinstance(norm, kind)
    assert list(norm.state_dict()) == keys
    assert "frozen" in repr(norm)


def test_thawed_after_the_context_nested_and_after_an_exception() -> None:
    net = nn.Sequential(trained(nn.BatchNorm1d), trained(nn.BatchNorm1d))
    freeze_batch_norm(net[1]).apply()

    def fail() -> None:
        with freeze_batch_norm(net):
            with freeze_batch_norm(net):
                pass
            assert all(statistics_are_frozen(norm) for norm in net)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert type(net[0]) is nn.BatchNorm1d
    assert statistics_are_frozen(net[1])
    net(torch.randn(5, 3))
    assert net[0].num_batches_tracked == 1
    assert net[1].num_batches_tracked == 0


def test_the_mode_chosen_within_the_context_stays() -> None:
    net = nn.Sequential(trained(nn.BatchNorm1d))
    with freeze_batch_norm(net):
        net.eval()
        assert not net[0].training
    assert not net[0].training


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm2d(3, track_running_stats=False), nn.InstanceNorm2d(3, affine=True)],
    ids=["no statistics", "instance norm"],
)
def test_what_cannot_be_frozen_stays(layer: nn.Module) -> None:
    kind = type(layer)
    freeze_batch_norm(nn.Sequential(layer)).apply()
    assert type(layer) is kind


def test_copies_stay_frozen() -> None:
    net = nn.Sequential(trained(nn.BatchNorm2d), trained(ActivatedNorm))
    freeze_batch_norm(net).apply()
    x = torch.randn(5, 3, 4, 4)
    expected = net(x)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    copies = (
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        torch.load(file, weights_only=False),
    )
    for twin in copies:
        twin.train()
        assert torch.equal(twin(x), expected)
        assert twin[0].num_batches_tracked == 0
        assert type(twin[0]) is type(net[0])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), trained(nn.BatchNorm2d))
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    x = torch.randn(5, 3, 4, 4)
    compiled(x)
    freeze_batch_norm(net).apply()
    before = buffers(net)
    compiled(x).sum().backward()
    assert torch.equal(compiled(x), net(x))
    assert equal(buffers(net), before)
    assert net[1].training
    assert net[1].weight.grad is not None


def test_a_frozen_float_model_can_be_prepared() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    freeze_batch_norm(net).apply()
    prepare(net, X)
    assert net[0].batch_norm is net[1]


def test_a_user_hook_still_runs() -> None:
    norm, seen = trained(nn.BatchNorm1d), []
    norm.register_forward_hook(lambda *_: seen.append(1))
    freeze_batch_norm(norm).apply()
    norm(torch.randn(5, 3))
    assert seen == [1]


def test_the_range_is_observed_by_the_quantizer_itself() -> None:
    layer = QuantLinear(2, 2).train()
    layer(torch.ones(1, 2))
    freeze_ranges(layer).apply()
    assert torch.equal(layer.weight_quantizer.amax, layer.weight.detach().abs().amax(1))
