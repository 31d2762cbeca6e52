"""Learned ranges: their start, their training, and that all else works as with observed ones."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qatkit
from qatkit import QuantConfig, QuantSpec, TensorQuantizer
from qatkit.config import WEIGHT
from qatkit.errors import QatkitError
from qatkit.functional import fake_quantize
from qatkit.modes import quantizers
from qatkit.nn.weights import weights_of
from qatkit.quantizer import share_range
from qatkit.spec import LEARNED
from qatkit.tables import calibration_table, import_ranges

NAN, INF = float("nan"), float("inf")
# name: the fields of a spec
KINDS: dict[str, dict[str, Any]] = {
    **{name: {"observer": name} for name in LEARNED},
    **{f"{name} unsigned": {"observer": name, "signed": False} for name in LEARNED},
    "lsq+ offset": {"observer": "lsq+", "symmetric": False},
    "lsq+ offset unsigned": {"observer": "lsq+", "symmetric": False, "signed": False},
    "tqt power of two": {"observer": "tqt", "power_of_two": True},
    "lsq power of two": {"observer": "lsq", "power_of_two": True},
}


def spec(kind: str, **fields: Any) -> QuantSpec:
    return QuantSpec(**{"num_bits": 4, **KINDS[kind], **fields})


def made(kind: str, channels: int | None = None, **fields: Any) -> TensorQuantizer:
    return TensorQuantizer(spec(kind, axis=None if channels is None else 0, **fields), channels)


def values(quantizer: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def data(shape: tuple[int, ...] = (3, 40), seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Parameters


def test_parameters_have_their_final_shape() -> None:
    names = {"lsq": ["step"], "lsq+ offset": ["step", "offset"], "pact": ["threshold"]}
    for kind, wanted in {**names, "tqt": ["log2_threshold"], "lsq+": ["step"]}.items():
        for channels, shape in ((None, ()), (3, (3,))):
            quantizer = made(kind, channels)
            assert [name for name, _ in quantizer.named_parameters()] == wanted
            assert all(each.shape == shape for each in quantizer.parameters())
            assert not quantizer.calibrated
            assert list(quantizer.state_dict()) == [*wanted, "num_batches"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [None, 3])
def test_a_calibrated_range_is_the_start(kind: str, channels: int | None) -> None:
    learned = made(kind, channels)
    fixed = TensorQuantizer(learned.spec.replace(observer="minmax"), channels)
    low = -1.3 if learned.spec.signed or not learned.spec.symmetric else 0.0
    high = torch.tensor(2.7) if channels is None else torch.tensor([0.7, 2.7, 31.0])
    for each in (learned, fixed):
        each.set_range(low, high)
    assert learned.calibrated
    torch.testing.assert_close(learned.scale, fixed.scale, rtol=1e-6, atol=0)
    assert torch.equal(learned.zero_point, fixed.zero_point)
    torch.testing.assert_close(learned.amax, fixed.amax, rtol=0.08, atol=0)  # a whole zero point
    x = data() * 2
    exact = KINDS[kind]["observer"] != "tqt"  # which keeps a logarithm
    if exact:
        assert torch.equal(learned.eval()(x), fixed.eval()(x))
    grid = learned.grid_for(x)
    assert grid is not None
    assert torch.equal(grid[0], learned.scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [None, 3])
def test_the_forward_is_fake_quantize_bit_for_bit(kind: str, channels: int | None) -> None:
    quantizer, x = made(kind, channels), data()
    y = quantizer(x)
    quantizer.eval()
    assert torch.equal(y, quantizer(x))
    with torch.no_grad():
        assert torch.equal(y, quantizer(x))
    grid = quantizer.spec.quant_min, quantizer.spec.quant_max
    center: Any = 0 if quantizer.spec.symmetric else quantizer.zero_point
    assert torch.equal(y, fake_quantize(x, quantizer.scale, center, *grid, quantizer.spec.axis))
    assert (y == 0).any()  # zero is a code


@pytest.mark.parametrize("kind", KINDS)
def test_power_of_two(kind: str) -> None:
    quantizer = made(kind)
    quantizer.set_range(-1.0, 1.0)
    if quantizer.spec.power_of_two:
        assert quantizer.scale == 0.125  # 1 is a power of two already, and no rounding says else


# Starts


def test_starts_of_activations() -> None:
    x = data((400,)) + 0.5
    q = {kind: made(kind) for kind in ("lsq", "pact", "tqt", "lsq+ offset")}
    for quantizer in q.values():
        quantizer(x)
    mean = 2 * x.abs().mean() / 7**0.5
    torch.testing.assert_close(q["lsq"].scale, mean.clamp(max=x.abs().max() / 7))
    torch.testing.assert_close(q["pact"].amax, x.abs().max())
    three_sigma = (x.mean() + 3 * x.std()).clamp(max=x.max())
    torch.testing.assert_close(q["tqt"].amax, three_sigma)
    torch.testing.assert_close(q["lsq+ offset"].scale, (x.max() - x.min()) / 15)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [None, 0])
def test_a_weight_starts_at_about_the_least_squared_error(
    name: str, bits: int, axis: int | None
) -> None:
    weight = data((4, 300)) * torch.tensor([[1.0], [0.1], [3.0], [1e-3]])
    if axis is None:
        weight = weight[:1]
    chosen = WEIGHT.replace(observer=name, num_bits=bits, axis=axis)
    quantizer = TensorQuantizer(chosen, None if axis is None else 4)
    error = (quantizer(weight) - weight).square().sum(1)
    best = torch.full_like(error, INF)
    for share in torch.linspace(0.02, 1.0, 400):
        scale = weight.abs().amax(1) * share / chosen.quant_max
        y = fake_quantize(weight, scale, 0, chosen.quant_min, chosen.quant_max, 0)
        best = torch.minimum(best, (y - weight).square().sum(1))
    assert (error <= (1.1 if bits == 8 else 1.02) * best).all()


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_averages_the_batches_and_training_does_not_move_it(kind: str) -> None:
    net = nn.Sequential(qatkit.nn.QuantLinear(40, 2, input_spec=spec(kind)))
    first, second = data(), 3 * data(seed=1)
    qatkit.calibrate(net, [first, second], method="average", progress=False)
    quantizer = net[0].input_quantizer
    wanted = TensorQuantizer(quantizer.spec.replace(observer="average"))
    wanted(first), wanted(second)
    torch.testing.assert_close(quantizer.scale, wanted.scale, rtol=1e-6, atol=0)
    assert quantizer.num_batches == 2
    before = values(quantizer)
    net.train()(100 * data())
    net.eval()(100 * data())
    assert same(before, values(quantizer))


@pytest.mark.parametrize("method", ["mse", "entropy", "percentile", "max"])
def test_calibrators_give_the_start(method: str) -> None:
    scales = []
    for name in ("lsq", "pact", "minmax"):
        layer = qatkit.nn.QuantLinear(40, 2, input_spec=QuantSpec(num_bits=4, observer=name))
        qatkit.calibrate(layer, [data((50, 40))], method=method, progress=False)
        scales.append(layer.input_quantizer.scale)
    assert torch.equal(scales[0], scales[2])
    assert torch.equal(scales[1], scales[2])


def test_learned_observers_are_no_calibration_methods() -> None:
    with pytest.raises(QatkitError, match="unknown method"):
        qatkit.calibrate(qatkit.nn.QuantLinear(2, 2), [torch.ones(1, 2)], method="lsq")


# Training


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [None, 3])
def test_training_finds_a_better_range(kind: str, channels: int | None) -> None:
    """From a range four times too wide, gradient descent lowers the error of quantization."""
    quantizer, x = made(kind, channels), data((3, 500)).abs()
    quantizer.set_range(0.0 if not quantizer.spec.signed else -12.0, 12.0)

    def error() -> Tensor:
        return (quantizer(x) - x).square().sum()

    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    start = error().item()
    for _ in range(150):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    if KINDS[kind]["observer"] == "pact":  # nothing is clipped, so that nothing pulls
        assert error().item() == start
    else:
        assert error().item() < 0.6 * start


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["frozen", "off", "eval without gradients"])
def test_without_a_gradient(kind: str, how: str) -> None:
    quantizer, x = made(kind), data()
    quantizer(x)
    before = values(quantizer)
    if how == "frozen":
        quantizer.observe = "never"
    quantizer.quantize = how != "off"
    x.requires_grad_()
    with torch.set_grad_enabled(how[:4] != "eval"):
        y = quantizer(x).sum()
    if y.requires_grad:
        y.backward()
    assert all(each.grad is None for each in quantizer.parameters())
    assert same(before, values(quantizer))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [0.0, -0.3, -1e30, 1e30, 1e-40, -INF, INF, NAN])
def test_a_bad_step_of_an_optimizer(kind: str, bad: float) -> None:
    quantizer, x = made(kind), data().requires_grad_()
    quantizer(x)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.fill_(bad)
    y = quantizer(x)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(quantizer.scale).all()
    assert (quantizer.scale > 0).all()
    assert (y * x >= 0).all() or not quantizer.spec.symmetric
    low, high = quantizer.range
    assert low <= 0 <= high
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_a_negative_step_learns_its_way_back() -> None:
    quantizer, x = made("lsq"), data((500,))
    quantizer.set_range(-1.0, 1.0)
    with torch.no_grad():
        quantizer.step.fill_(-0.01)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        (quantizer(x) - x).square().sum().backward()
        optimizer.step()
    assert quantizer.amax > 1


BAD = {
    "nan": torch.full((3, 4), NAN),
    "zeros": torch.zeros(3, 4),
    "empty": torch.zeros(3, 0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("channels", [None, 3])
def test_a_first_batch_without_a_number_waits(kind: str, case: str, channels: int | None) -> None:
    quantizer, x = made(kind, channels), BAD[case]
    assert torch.equal(quantizer(x).isnan(), x.isnan())
    assert quantizer.observing
    quantizer(data())
    assert quantizer.calibrated
    want = values(quantizer)
    quantizer(x)
    assert same(values(quantizer), want)


@pytest.mark.parametrize("name", LEARNED)
def test_a_dead_channel(name: str) -> None:
    weight = data()
    weight[1] = 0
    quantizer = TensorQuantizer(WEIGHT.replace(observer=name, num_bits=3), 3)
    x = weight.clone().requires_grad_()
    y = quantizer(x)
    y.square().sum().backward()
    assert (y[1] == 0).all()
    # Ready for the weights that training may put there.
    assert quantizer.scale[0].min() / 2 < quantizer.scale[1] < 2 * quantizer.scale.max()
    assert all(torch.isfinite(each.grad).all() for each in (x, *quantizer.parameters()))


@pytest.mark.parametrize("name", LEARNED)
def test_constant_batch(name: str) -> None:
    quantizer = made(name)
    x = torch.full((5,), 0.7, requires_grad=True)
    y = quantizer(x)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(each.grad).all() for each in (x, *quantizer.parameters()))


# Weights


class Net(nn.Module):
    """Convolutions with batch norms, a residual addition, and a negative and a zero gamma."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv3, self.norm3 = nn.Conv2d(16, 16, 3, padding=1, groups=2), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)
        with torch.no_grad():
            self.norm2.weight[::2] *= -1
            self.norm2.weight[3] = 0
            self.conv2.weight[5] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        y = torch.relu(self.norm2(self.conv2(x)))
        y = self.norm3(self.conv3(y))
        y += x
        return self.fc(torch.relu(y).mean((2, 3)))


IMAGE = (4, 3, 8, 8)


def config(name: str, gradient: str = "ste", **fields: Any) -> QuantConfig:
    common: dict[str, Any] = {"observer": name, "num_bits": 4, "gradient": gradient}
    weight = WEIGHT.replace(**common, **fields.pop("weight", {}))
    activation = QuantSpec(**common, **fields.pop("activation", {}))
    return QuantConfig(weight, activation, unsigned_activations=True, first_last_bits=8, **fields)


def prepared(chosen: QuantConfig) -> Net:
    return qatkit.prepare(Net(), torch.zeros(IMAGE), chosen)  # type: ignore[return-value]


def train(net: nn.Module, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(qatkit.parameter_groups(net, lr=0.02, range_lr=1e-4), momentum=0.9)
    net.train()
    for step in range(steps):
        optimizer.zero_grad()
        net(data(IMAGE, step)).square().mean().backward()
        optimizer.step()


CASES = {
    **{name: config(name) for name in LEARNED},
    "ewgs": config("lsq", "ewgs"),
    "dsq, fixed": config("minmax", "dsq"),
    "per tensor": config("lsq", weight={"axis": None}),
    "wide grid": config("pact", weight={"narrow_range": False}),
    "power of two": config("tqt", weight={"power_of_two": True}, activation={"power_of_two": True}),
    "offset": config("lsq+", activation={"symmetric": False}, backend="onnxruntime"),
    "openvino": config("lsq+", activation={"symmetric": False}, backend="openvino"),
    "no fold": config("lsq", fold_batch_norm=False),
}


@pytest.mark.parametrize(
    ("case", "calibrated"), [*((case, True) for case in CASES), ("lsq", False), ("offset", False)]
)
def test_from_prepare_to_a_verified_file(case: str, calibrated: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    net = prepared(CASES[case])
    if calibrated:
        qatkit.calibrate(net, [data(IMAGE)], progress=False)
    train(net, 1)
    start = values(net)
    train(net)
    moved = [key for key in start if not torch.equal(start[key], net.state_dict()[key])]
    learned = [f"{path}.{name}" for path, q in quantizers(net) for name, _ in q.named_parameters()]
    assert case == "dsq, fixed" or len(set(learned) & set(moved)) >= len(learned) / 3 > 0
    qatkit.freeze_batch_norm(net).apply()
    x = data(IMAGE, 9)
    want = net.eval()(x)
    qatkit.freeze_ranges(net).apply()
    assert torch.equal(net(x), want)
    before = values(net)
    train(net, 1)
    assert all(torch.equal(before[name], net.state_dict()[name]) for name in learned)
    report = qatkit.export_onnx(net.eval(), x, tmp_path / "net.onnx")
    assert report.verify is not None
    assert report.verify.ok
    assert report.verify.differing == 0
    assert "lsq" in str(qatkit.summary(net)) or "lsq" not in case


def test_a_fold_that_cancels_does_not_change_the_codes() -> None:
    """Codes of Q(w * s) with a range times |s| are those of Q(w); gradients pass the fold."""
    net = prepared(config("lsq", weight={"axis": None}))
    qatkit.calibrate(net, [data(IMAGE)], progress=False)
    net.train()(data(IMAGE)).sum().backward()
    for weight in weights_of(net):
        step = weight.quantizer.step
        seen = weight.seen.detach()
        assert step.grad is not None
        assert torch.isfinite(step.grad)
        assert seen.abs().max() / 8 < weight.quantizer.amax < 1.01 * seen.abs().max()
    assert net.norm2.weight.grad is not None


def test_gradient_of_every_observer(tmp_path: Path) -> None:
    x = data((200,))
    results = {}
    for name in ("minmax", "shrink", "average", "lsq"):
        for gradient in ("ste", "ewgs", "dsq"):
            quantizer = TensorQuantizer(QuantSpec(num_bits=3, observer=name, gradient=gradient))  # type: ignore[arg-type]
            leaf = x.clone().requires_grad_()
            y = quantizer(leaf)
            y.backward(x.sign() * 0.7)
            results[name, gradient] = y.detach(), leaf.grad
    for (name, gradient), (y, grad) in results.items():
        plain_y, plain_grad = results[name, "ste"]
        assert torch.equal(y, plain_y)
        assert torch.equal(grad == 0, plain_grad == 0)
        assert torch.equal(grad, plain_grad) == (gradient == "ste")


# Shared ranges


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_range_is_the_union(kind: str) -> None:
    small, large = made(kind), made(kind)
    share_range([small, large])
    small.set_range(-0.5, 1.0)
    large.set_range(-2.0, 6.0)
    assert torch.equal(small.scale, large.scale)
    assert torch.equal(small.zero_point, large.zero_point)
    assert small.own_range[1] < small.range[1] == large.own_range[1]
    x = data()
    assert torch.equal(small(x), large(x))
    for each in (small, large):
        (each(8 * x) * x).sum().backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in small.parameters())
    assert any((p.grad != 0).any() for p in large.parameters())
    watching = TensorQuantizer(small.spec.replace(observer="minmax"))
    watching(20 * x.abs())
    share_range([large, watching])
    torch.testing.assert_close(large.amax, watching.amax)
    torch.testing.assert_close(large(x), watching.eval()(x))
    twins = copy.deepcopy(nn.ModuleList([small, large]))
    assert torch.equal(twins[0](x), small(x))


def test_a_shared_range_before_its_own() -> None:
    first, second = made("lsq"), made("lsq")
    share_range([first, second])
    first(data())
    assert not second.calibrated
    assert second.has_range
    torch.testing.assert_close(second.eval()(data()), first(data()))


# State


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("through", ["deepcopy", "pickle", "weights_only", "half"])
def test_copies(kind: str, through: str) -> None:
    quantizer, x = made(kind, 3), data()
    quantizer(x)
    want = quantizer.eval()(x)
    if through == "deepcopy":
        twin = copy.deepcopy(quantizer)
    elif through == "pickle":
        twin = pickle.loads(pickle.dumps(quantizer))
    elif through == "half":
        twin = copy.deepcopy(quantizer).half().float()
        assert all(each.dtype == torch.float32 for each in quantizer.half().parameters())
    else:
        file = io.BytesIO()
        torch.save(quantizer.state_dict(), file)
        file.seek(0)
        twin = made(kind, 3).eval()
        twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(twin(x), want)
    assert twin.calibrated


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", ["minmax", "lsq", "tqt"])
def test_checkpoints_of_other_observers(kind: str, other: str) -> None:
    """A range goes over from any observer to any other, also where none is known yet."""
    chosen = spec(kind, axis=0)
    if not chosen.symmetric and other != "minmax":
        other = "lsq+"
    source = TensorQuantizer(chosen.replace(observer=other), 3)
    target = TensorQuantizer(chosen, 3)
    target.load_state_dict(source.state_dict())
    assert not target.calibrated
    source(data())
    for one, two in ((source, target), (target, TensorQuantizer(source.spec, 3))):
        two.load_state_dict(one.state_dict())
        assert two.calibrated
        torch.testing.assert_close(two.scale, one.scale, rtol=1e-5, atol=0)
        assert torch.equal(two.zero_point, one.zero_point)
    with pytest.raises(RuntimeError, match="Missing key"):
        target.load_state_dict({"num_batches": torch.tensor(1)})


def test_model_checkpoints(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    net = prepared(config("lsq"))
    net.load_state_dict(Net().state_dict())  # of the float model, strictly
    observed = prepared(config("minmax"))
    qatkit.calibrate(observed, [data(IMAGE)], progress=False)
    net.load_state_dict(observed.state_dict())
    x = data(IMAGE, 5)
    qatkit.freeze_ranges(observed).apply()
    torch.testing.assert_close(net.eval()(x), observed.eval()(x), rtol=1e-3, atol=1e-3)
    train(net)
    qatkit.save(net, tmp_path / "net.safetensors")
    again = qatkit.load(Net(), tmp_path / "net.safetensors")
    assert torch.equal(again.eval()(x), net.eval()(x))
    assert same(values(again), values(net))


def test_reset_and_tables() -> None:
    net = prepared(config("lsq"))
    qatkit.calibrate(net, [data(IMAGE)], progress=False)
    table = calibration_table(net)
    quantizer = net.conv1.input_quantizer
    scale = quantizer.scale
    quantizer.reset_range()
    assert not quantizer.calibrated
    assert torch.equal(torch.stack(quantizer.range), torch.zeros(2))
    import_ranges(net, table)
    torch.testing.assert_close(quantizer.scale, scale, rtol=1e-6, atol=0)
    with pytest.raises(QatkitError, match="low <= high"):
        quantizer.set_range(1.0, -1.0)
    assert "lsq" in repr(quantizer)


def test_a_failed_calibration_restores_the_parameters() -> None:
    net = prepared(config("lsq+"))
    train(net)
    before = values(net)
    with pytest.raises(QatkitError):
        qatkit.calibrate(net, [data(IMAGE), torch.zeros(1, 7)], progress=False)
    assert same(before, values(net))


def test_a_zero_point_needs_a_backend_that_has_them() -> None:
    with pytest.raises(QatkitError, match="tensorrt has none") as caught:
        config("lsq+", activation={"symmetric": False})
    assert "\n" not in str(caught.value)


# Compiled, distributed


@pytest.mark.parametrize(("name", "calibrated"), [*((n, True) for n in LEARNED), ("lsq", False)])
def test_a_compiled_training_step(name: str, calibrated: bool) -> None:
    torch._dynamo.reset()
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
    torch.manual_seed(0)
    chosen = QuantConfig(WEIGHT.replace(observer=name), QuantSpec(observer=name))
    net = qatkit.prepare(nn.Sequential(*layers), torch.zeros(IMAGE), chosen)
    if calibrated:
        qatkit.calibrate(net, [data(IMAGE)], progress=False)
    twin = copy.deepcopy(net)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for model, step in ((net, compiled), (twin, loss)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for seed in range(2):
            optimizer.zero_grad()
            step(model, data(IMAGE, seed)).backward()
            optimizer.step()
    for one, other in zip(values(net).values(), values(twin).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    try:
        net = prepared(config("lsq"))
        model = nn.parallel.DistributedDataParallel(net)
        optimizer = torch.optim.SGD(qatkit.parameter_groups(net, lr=0.02, range_lr=1e-4))
        for step in range(2):
            optimizer.zero_grad()
            x = (1 + 3 * rank) * data(IMAGE, 10 * rank + step)
            model(x).square().mean().backward()
            optimizer.step()
            torch.save(net.state_dict(), Path(folder) / f"{rank}-{step}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_train_the_same_ranges(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    for step in range(2):
        first, second = (
            torch.load(tmp_path / f"{rank}-{step}.pt", weights_only=True) for rank in (0, 1)
        )
        ranges = [name for name in first if "quantizer" in name]
        assert len(ranges) == 18
        assert all(torch.equal(first[name], second[name]) for name in ranges)


@pytest.mark.parametrize("name", LEARNED)
def test_a_layer_called_twice_whose_first_input_is_zero(name: str) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            state = torch.zeros(len(x), 4)
            for t in range(3):
                state = torch.tanh(self.first(x[:, t]) + self.again(state))
            return state

    learned = QuantSpec(observer=name, num_bits=4)
    model = qatkit.prepare(
        Recurrent(), torch.randn(2, 3, 4), QuantConfig(activation=learned, first_last_bits=8)
    )
    for _ in range(2):
        model.train()(torch.randn(2, 3, 4)).square().sum().backward()
    quantizers = [m for m in model.modules() if isinstance(m, TensorQuantizer) and m.spec.learned]
    assert quantizers
    assert all(q.calibrated and not q.observing for q in quantizers)
