"""`equalize`, `absorb_high_bias`, `migrate_scales`: same float function, more even ranges."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qatkit
from qatkit import QatkitError, QuantConfig, QuantSpec
from qatkit.functional import fold_scale
from qatkit.ptq import absorb_high_bias, equalize, migrate_scales
from qatkit.ptq.neighbours import find_pairs
from qatkit.ptq.runs import Runs

PER_TENSOR = QuantConfig(weight=QuantSpec(observer="minmax"))


def float_output(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), qatkit.disable_quantization(net):
        return net.eval()(x)


def error(net: nn.Module, wanted: Tensor, x: Tensor) -> float:
    with torch.no_grad():
        return float((net.eval()(x) - wanted).square().sum() / wanted.square().sum())


def uneven(layer: nn.Module, axis: int = 0) -> None:
    """Give the channels of a layer ranges over three orders of magnitude."""
    with torch.no_grad():
        size = layer.weight.shape[axis]
        factor = torch.logspace(-1.5, 1.5, size)[torch.randperm(size)]
        shape = [-1 if d == axis else 1 for d in range(layer.weight.dim())]
        layer.weight.mul_(factor.reshape(shape))


@pytest.mark.parametrize("net", ["residual", "mobile"], indirect=True)
@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("config", [PER_TENSOR, QuantConfig()], ids=["tensor", "channel"])
def test_the_float_function_stays(
    net: nn.Module, images: list[Tensor], fold: bool, config: QuantConfig
) -> None:
    wanted = net(images[0]).detach()
    qatkit.prepare(net, images[0], QuantConfig(weight=config.weight, fold_batch_norm=fold))
    keys = set(net.state_dict())
    report = equalize(net, images)
    assert len(report.changes) >= 3
    torch.testing.assert_close(float_output(net, images[0]), wanted, rtol=1e-4, atol=1e-4)
    assert set(net.state_dict()) == keys
    qatkit.calibrate(net, images, progress=False)
    assert error(net, wanted, images[0]) < 0.5


def chain(second: nn.Module, activation: nn.Module) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), activation, second),
        *(nn.MaxPool2d(2), nn.PReLU(), nn.Conv2d(8, 4, 1)),
    )


SECONDS = {
    "dense": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "grouped": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 3, padding=1),
    "transposed, grouped": lambda: nn.ConvTranspose2d(8, 8, 3, padding=1, groups=4),
}


@pytest.mark.parametrize("second", SECONDS)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Identity])
def test_any_second_layer(second: str, activation: type[nn.Module]) -> None:
    x = torch.randn(8, 3, 8, 8)
    net = chain(SECONDS[second](), activation()).eval()
    nn.init.uniform_(net[1].weight, 0.01, 3.0)
    nn.init.normal_(net[1].bias)
    wanted = net(x).detach()
    qatkit.prepare(net, x, PER_TENSOR)
    gamma = net[1].weight.detach().clone()
    report = equalize(net, [x])
    assert [change.path for change in report.changes] == ["0 -> 3", "3 -> 6"]
    assert not torch.equal(gamma, net[1].weight)
    torch.testing.assert_close(float_output(net, x), wanted, rtol=1e-4, atol=1e-4)


def test_ranges_are_equal_and_quantization_better() -> None:
    x = torch.randn(32, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3))
    uneven(net[0])
    uneven(net[3], axis=1)
    net.eval()
    wanted = net(x).detach()
    plain = qatkit.prepare(copy.deepcopy(net), x, PER_TENSOR)
    qatkit.prepare(net, x, PER_TENSOR)
    report = equalize(net, [x])
    norm = net[1]
    folded = net[0].weight * fold_scale(norm.weight, norm.running_var, norm.eps).reshape(
        -1, 1, 1, 1
    )
    made = folded.abs().flatten(1).amax(1)
    read = net[3].weight.abs().amax((0, 2, 3))
    torch.testing.assert_close(made, read, rtol=1e-2, atol=0)  # the condition of the optimum
    for each in (plain, net):
        qatkit.calibrate(each, [x], progress=False)
    assert error(net, wanted, x) < 0.3 * error(plain, wanted, x)
    assert report.changes[0].path == "0 -> 3"


def test_relu6_is_respected() -> None:
    x = torch.randn(64, 3, 6, 6)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        net[0].weight.mul_(torch.tensor([0.01, 30, 0.1, 50, 1, 1, 2, 40]).reshape(-1, 1, 1, 1))
    wanted = net(x).detach()
    peak = net[0](x).amax((0, 2, 3))
    assert (peak > 6).any()
    assert (peak < 6).any()
    weight = net[0].weight.detach().clone()
    qatkit.prepare(net, x, PER_TENSOR)
    equalize(net, [x])
    torch.testing.assert_close(float_output(net, x), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(net[0].weight[peak >= 6], weight[peak >= 6])
    assert not torch.equal(net[0].weight[peak < 5], weight[peak < 5])


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
        self.gelu, self.d, self.e = nn.GELU(), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        y = self.c(self.b(F.relu(y)) + y)  # a has two readers, b goes into an addition
        z = self.d(self.gelu(y))  # GELU is not homogeneous
        return self.e(self.e(z)), z  # z is returned, e runs twice


def test_what_is_no_pair() -> None:
    x = torch.randn(4, 6)
    net = qatkit.prepare(Branches(), x)
    assert find_pairs(Runs.read(net, [x], None, "test")) == []
    assert equalize(net, [x]).changes == ()


def test_dead_channels_and_stale_ranges() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    with torch.no_grad():
        net[0].weight[1] = 0
        net[2].weight[:, 2] = 0
    wanted = net(x).detach()
    qatkit.prepare(net, x, PER_TENSOR)
    qatkit.calibrate(net, [x], progress=False)
    equalize(net, [x])
    assert torch.isfinite(net[0].weight).all()
    torch.testing.assert_close(float_output(net, x), wanted)
    assert not net[2].input_quantizer.calibrated
    assert net[0].input_quantizer.calibrated


def test_absorbing_keeps_the_function_where_it_may() -> None:
    x = torch.randn(256, 3, 5, 5)
    norm = nn.BatchNorm2d(8)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), norm, nn.ReLU(), nn.Conv2d(8, 4, 3)),
        *(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False), nn.BatchNorm2d(2)),
        *(nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1)),
    )
    net[:2](x)  # running statistics
    net[1].momentum = None
    net[1].reset_running_stats()
    net[:2](x)
    nn.init.constant_(norm.weight, 0.5)
    nn.init.constant_(net[4].weight, 0.1)
    nn.init.constant_(net[4].bias, 5.0)
    nn.init.constant_(net[7].bias, 5.0)
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([6.0, 0.0, 1.0, 5.0, -3.0, 4.0, 8.0, 2.0]))
    net.eval()
    wanted = net(x).detach()
    before = net[:3](x).amax()
    qatkit.prepare(net, x)
    report = absorb_high_bias(net, [x], sigmas=5.0)
    assert [(c.path, c.note) for c in report.changes] == [
        ("0 -> 3", "4 channels"),
        ("3 -> 6", "4 channels"),
        ("6 -> 9", "left: the second layer pads"),
    ]
    torch.testing.assert_close(float_output(net, x), wanted, rtol=1e-4, atol=1e-3)
    with qatkit.disable_quantization(net):
        assert net[:3](x).amax() < 0.7 * before


@pytest.mark.parametrize("net", ["transformer"], indirect=True)
def test_migration_keeps_the_function_and_evens_out(net: nn.Module, images: list[Tensor]) -> None:
    wanted = net(images[0]).detach()
    qatkit.prepare(net, images[0], QuantConfig(activation=QuantSpec(observer="minmax")))
    keys = set(net.state_dict())
    report = migrate_scales(net, images)
    norms = [f"layers.{i}.ln_{j}" for i in (0, 1) for j in (1, 2)]
    assert [change.path for change in report.changes] == norms  # the last norm is averaged
    assert report.changes[0].note == "layers.0.attention.in_proj_weight"
    assert all(change.after < change.before for change in report.changes)
    assert set(net.state_dict()) == keys
    torch.testing.assert_close(float_output(net, images[0]), wanted, rtol=1e-4, atol=1e-4)


def test_migration_helps_with_outliers_and_is_the_equation() -> None:
    x = torch.randn(256, 16)
    net = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8)).eval()
    with torch.no_grad():
        net[0].weight[3] = 100.0
        net[1].weight[:, 3] *= 0.01
    wanted = net(x).detach()
    norm, weight = net[0](x).abs().amax(0), net[1].weight.detach().abs().amax(0)
    gamma = net[0].weight.detach().clone()
    plain = qatkit.prepare(copy.deepcopy(net), x)
    qatkit.prepare(net, x)
    migrate_scales(net, [x[:128], x[128:]], strength=0.6)
    torch.testing.assert_close(gamma / net[0].weight, norm**0.6 / weight**0.4)
    for each in (plain, net):
        qatkit.calibrate(each, [x], method="max", progress=False)
    assert error(net, wanted, x) < 0.1 * error(plain, wanted, x)


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.linear(x)  # the addition reads the norm too


def test_a_norm_with_another_reader_stays() -> None:
    x = torch.randn(4, 6)
    assert migrate_scales(qatkit.prepare(PostNorm(), x), [x]).changes == ()


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (equalize, {"iterations": 0}, "iterations=0"),
        (absorb_high_bias, {"sigmas": -1.0}, "sigmas=-1.0"),
        (migrate_scales, {"strength": 1.5}, "strength=1.5"),
        (migrate_scales, {"strength": True}, "strength=True"),
        (equalize, {"batches": -1}, "batches=-1"),
    ],
)
def test_illegal(function: object, arguments: dict[str, object], message: str) -> None:
    x = torch.randn(4, 6)
    net = qatkit.prepare(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), x)
    with pytest.raises(QatkitError, match=message):
        function(net, [x], **arguments)
    with pytest.raises(QatkitError, match="no batches"):
        function(net, [])


@pytest.mark.parametrize("function", [equalize, migrate_scales])
def test_frozen_ranges_are_refused_and_nothing_changes(function: object) -> None:
    x = torch.randn(4, 6)
    layers = (nn.LayerNorm(6), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    net = qatkit.prepare(nn.Sequential(*layers), x).train()
    qatkit.calibrate(net, [x], progress=False)
    qatkit.freeze_ranges(net).apply()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(QatkitError, match=r"the range of .*weight_quantizer is frozen"):
        function(net, [x])
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert net.training
