"""`reconstruct` and `quantize`: less error, never more, and integers that survive everything."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qatkit
from qatkit import QatkitError, QuantConfig, QuantSpec
from qatkit.config import WEIGHT
from qatkit.nn.weights import weights_of
from qatkit.ptq import quantize, reconstruct
from qatkit.ptq.learned_step import LearnedStep
from qatkit.ptq.rounding import SoftRounding, StraightRounding, codes_of, write_codes
from qatkit.ptq.runs import Runs
from qatkit.ptq.units import find_units
from qatkit.ptq.weight_ranges import pin_range

LOW = QuantConfig(
    weight=WEIGHT.replace(num_bits=3),
    activation=QuantSpec(num_bits=4, observer="minmax"),
    first_last_bits=8,
    unsigned_activations=True,
)
ALL = pytest.mark.parametrize("net", ["residual", "mobile", "transformer"], indirect=True)
ONE = pytest.mark.parametrize("net", ["residual"], indirect=True)


def prepared(net: nn.Module, images: list[Tensor], config: QuantConfig = LOW) -> nn.Module:
    qatkit.prepare(net, images[0], config)
    qatkit.calibrate(net, images, progress=False)
    return net.eval()


def all_codes(net: nn.Module) -> dict[str, Tensor]:
    return {weight.path: codes_of(weight) for weight in weights_of(net)}


def state(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


def logits_error(net: nn.Module, wanted: list[Tensor], images: list[Tensor]) -> float:
    with torch.no_grad():
        return sum(float((net(x) - y).square().sum()) for x, y in zip(images, wanted, strict=True))


@ALL
@pytest.mark.parametrize("rounding", ["adaround", "adaquant"])
def test_every_block_gets_better_or_stays(
    net: nn.Module, images: list[Tensor], rounding: str
) -> None:
    with torch.no_grad():
        wanted = [net(x) for x in images]
    prepared(net, images)
    before = logits_error(net, wanted, images)
    report = reconstruct(net, images, rounding=rounding, steps=60, progress=False)
    assert all(change.after <= change.before for change in report.changes)
    assert sum(change.after < change.before for change in report.changes) >= 2
    assert logits_error(net, wanted, images) < before
    assert len(str(report).splitlines()) == len(report.changes) + 3


@ONE
@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("narrow", [True, False])  # without it the codes see the batch norm
def test_codes_survive_export_checkpoint_and_training_mode(
    net: nn.Module, images: list[Tensor], tmp_path: Path, fold: bool, narrow: bool
) -> None:
    onnx = pytest.importorskip("onnx")
    fresh = copy.deepcopy(net)
    weight = WEIGHT.replace(num_bits=3, narrow_range=narrow)
    config = QuantConfig(weight=weight, activation=LOW.activation, fold_batch_norm=fold)
    prepared(net, images, config)
    nearest = all_codes(net)
    reconstruct(net, images, steps=40, rounding="adaquant", lr=0.05, progress=False)
    codes = all_codes(net)
    assert any(not torch.equal(codes[path], nearest[path]) for path in codes)
    report = qatkit.export_onnx(net, images[0], tmp_path / "net.onnx", weights="int8")
    assert report.verify is not None
    assert report.verify.ok
    stored = {
        tuple(sorted(onnx.numpy_helper.to_array(tensor).ravel().tolist()))
        for tensor in onnx.load(tmp_path / "net.onnx").graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    }
    for path, found in codes.items():  # a negative gamma would turn signs; here there is none
        assert tuple(sorted(found.int().ravel().tolist())) in stored, path
    qatkit.save(net, tmp_path / "net.safetensors")
    again = qatkit.load(fresh, tmp_path / "net.safetensors")
    assert all(torch.equal(all_codes(again)[path], codes[path]) for path in codes)
    qatkit.freeze_ranges(net).apply()
    net.train()
    net(images[0])
    net.eval()
    if narrow or not fold:  # else the batch statistics move the folded weight, as they should
        assert all(torch.equal(all_codes(net)[path], codes[path]) for path in codes)


@ONE
def test_a_block_that_cannot_get_better_is_left_alone(net: nn.Module, images: list[Tensor]) -> None:
    prepared(net, images)
    before = state(net)
    with torch.no_grad():
        wanted = net(images[0])
    report = reconstruct(net, images, steps=1, lr=1e3, progress=False, push=0.0, drop=0.0)
    kept = [change for change in report.changes if change.note.startswith("kept")]
    assert kept
    assert all(change.after == change.before for change in kept)
    if len(kept) == len(report.changes):
        assert torch.equal(net(images[0]), wanted)
        same = {k: v for k, v in state(net).items() if "weight_quantizer" not in k}
        assert all(torch.equal(before[key], value) for key, value in same.items())


@ONE
def test_same_seed_same_result_and_no_global_state(net: nn.Module, images: list[Tensor]) -> None:
    prepared(net, images)
    twin = copy.deepcopy(net).train()
    torch.manual_seed(5)
    random = torch.get_rng_state()
    reconstruct(net, images, steps=10, seed=3, progress=False)
    assert torch.equal(torch.get_rng_state(), random)
    reconstruct(twin, iter(images), steps=10, seed=3, progress=False)
    assert twin.training
    assert all(
        torch.equal(a, b) for a, b in zip(state(net).values(), state(twin).values(), strict=True)
    )
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


@ONE
def test_units(net: nn.Module, images: list[Tensor]) -> None:
    prepared(net, images)
    runs = Runs.read(net, images, None, "test")
    found = {each.path: each for each in find_units(runs, "auto")}
    assert list(found) == ["stem", "layers.0", "layers.1", "layers.2", "head"]
    assert [unit.follows for unit in found.values()] == [False, False, True, True, False]
    assert found["stem"].exit is net.bn
    assert [unit.path for unit in find_units(runs, ["layers"])] == ["stem", "layers", "head"]
    assert [unit.path for unit in find_units(runs, [""])] == [""]
    alone = [unit.path for unit in find_units(runs, "layers")]
    assert len(alone) == 8
    assert alone[:2] == ["stem", "layers.0.conv1"]


@pytest.mark.parametrize("net", ["transformer"], indirect=True)
def test_units_of_attention(net: nn.Module, images: list[Tensor]) -> None:
    prepared(net, images)
    runs = Runs.read(net, images, None, "test")
    assert [unit.path for unit in find_units(runs, "auto")] == [
        *("patches", "layers.0", "layers.1", "head"),
    ]
    assert "layers.0.attention" in [unit.path for unit in find_units(runs, "layers")]


@ONE
def test_the_whole_model_against_another_float_model(net: nn.Module, images: list[Tensor]) -> None:
    reference = copy.deepcopy(net)
    with torch.no_grad():
        wanted = [reference(x) for x in images]
    prepared(net, images)
    with torch.no_grad():  # what an earlier algorithm may have done
        net.head.bias.add_(0.5)
    before = logits_error(net, wanted, images)
    report = reconstruct(
        net, images, blocks=[""], reference=reference, rounding="adaquant", steps=40, progress=False
    )
    energy = sum(float(y.square().sum()) for y in wanted)
    assert report.changes[0].before == pytest.approx(before / energy, rel=1e-4)
    assert logits_error(net, wanted, images) == pytest.approx(
        report.changes[0].after * energy, rel=1e-3
    )
    assert report.changes[0].after < report.changes[0].before


@ONE
def test_a_float_reference_has_no_learned_ranges(net: nn.Module, images: list[Tensor]) -> None:
    reference = copy.deepcopy(net)
    prepared(net, images, QuantConfig(weight=WEIGHT.replace(observer="lsq", num_bits=3)))
    report = reconstruct(net, images, reference=reference, steps=2, progress=False)
    assert len(report.changes) == 5


class Shared(nn.Module):
    """One layer called twice, a block with keyword arguments, a tuple, time before samples."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.pair = Pair()

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.relu(self.twice(x)))
        a, b = self.pair(x.transpose(0, 1), scale=2.0)
        return a + b


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(6, 4)
        self.right = nn.Linear(6, 4)

    def forward(self, x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return self.left(x) * scale, self.right(x)


def test_blocks_of_any_form() -> None:
    data = [torch.randn(10, 7, 6), torch.randn(4, 7, 6)]
    net = qatkit.prepare(Shared(), data[0], LOW)
    qatkit.calibrate(net, data, progress=False)
    report = reconstruct(net, data, blocks=["pair"], steps=60, lr=0.05, progress=False)
    assert [change.path for change in report.changes] == ["twice", "pair"]
    assert all(change.after <= change.before for change in report.changes)
    assert report.changes[1].after < report.changes[1].before


@ONE
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": "block"}, "give 'auto', 'layers' or a list"),
        ({"blocks": ["layer.0"]}, "no module 'layer.0'"),
        ({"blocks": ["bn"]}, "no quantized weight"),
        ({"blocks": ["layers", "layers.0"]}, "'layers.0' is inside 'layers'"),
        ({"rounding": "adaruond"}, "did you mean 'adaround'"),
        ({"steps": 0}, "positive integer"),
        ({"batch_size": True}, "positive integer"),
        ({"drop": 1.5}, "a share from 0 to 1"),
        ({"lr": float("nan")}, "0 or more"),
        ({"batches": 0}, "positive integer, or None"),
        ({"reference": nn.Linear(2, 2)}, "has no 'stem'"),
        ({"reference": "float"}, "give a torch.nn.Module or None"),
    ],
    ids=str,
)
def test_illegal(
    net: nn.Module, images: list[Tensor], arguments: dict[str, object], message: str
) -> None:
    prepared(net, images)
    before = state(net)
    with pytest.raises(QatkitError, match=message) as caught:
        reconstruct(net, images, progress=False, **arguments)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[key], value) for key, value in state(net).items())


def test_illegal_data() -> None:
    net = qatkit.prepare(nn.Sequential(nn.Linear(4, 2)), torch.zeros(1, 4))
    with pytest.raises(QatkitError, match="no batches"):
        reconstruct(net, [])
    with pytest.raises(QatkitError, match="data is a Tensor"):
        reconstruct(net, torch.zeros(1, 4))
    with pytest.raises(QatkitError, match="does not run on batch 0"):
        reconstruct(net, [torch.zeros(1, 5)])
    with pytest.raises(QatkitError, match="has no quantizers"):
        reconstruct(nn.Linear(4, 2), [torch.zeros(1, 4)])


@ONE
@pytest.mark.parametrize("call", [0, 4, 12, 25, 30])
def test_an_error_at_any_moment_restores_everything(
    net: nn.Module, images: list[Tensor], call: int
) -> None:
    prepared(net, images)
    net.layers.train()
    before, kinds = state(net), [type(module) for module in net.modules()]
    flags = [(m.training, getattr(m, "observe", None)) for m in net.modules()]
    left = [call]

    def fail(*_: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    handle = net.layers[1].conv1.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        quantize(net, images, steps=20, progress=False)
    handle.remove()
    assert all(torch.equal(before[key], value) for key, value in state(net).items())
    assert kinds == [type(module) for module in net.modules()]
    assert flags == [(m.training, getattr(m, "observe", None)) for m in net.modules()]


@ALL
def test_quantize(net: nn.Module, images: list[Tensor], tmp_path: Path) -> None:
    with torch.no_grad():
        wanted = [net(x) for x in images]
    qatkit.prepare(net, images[0], LOW)
    qatkit.calibrate(net, images, method="mse", progress=False)
    before = logits_error(net, wanted, images)
    reports = quantize(net, images, steps=200, progress=False)
    assert [report.algorithm for report in reports] == ["fit_weight_ranges", "reconstruct"]
    assert logits_error(net, wanted, images) < 0.95 * before
    assert qatkit.export_onnx(net, images[0], tmp_path / "net.onnx").verify.ok


@ALL
def test_quantize_with_fine_activations_starts_from_gptq(
    net: nn.Module, images: list[Tensor]
) -> None:
    with torch.no_grad():
        wanted = [net(x) for x in images]
    qatkit.prepare(net, images[0], QuantConfig(weight=WEIGHT.replace(num_bits=3)))
    qatkit.calibrate(net, images, method="mse", progress=False)
    before = logits_error(net, wanted, images)
    reports = quantize(net, images, steps=20, progress=False)
    assert [each.algorithm for each in reports] == ["fit_weight_ranges", "gptq", "reconstruct"]
    # The blocks are compared with those of the float model, not with what gptq has made of them.
    assert all(change.before > 0 for change in reports[-1].changes)
    assert logits_error(net, wanted, images) < 0.7 * before


@ONE
def test_quantize_with_8_bits_only_calibrates(net: nn.Module, images: list[Tensor]) -> None:
    qatkit.prepare(net, images[0])
    weights = {key: value.clone() for key, value in net.named_parameters()}
    assert quantize(net, images, progress=False) == ()
    assert all(torch.equal(weights[key], value) for key, value in net.named_parameters())
    assert all(q.has_range for q in net.modules() if isinstance(q, qatkit.TensorQuantizer))
    with pytest.raises(QatkitError, match="steps=0"):
        quantize(net, images, steps=0)


@ONE
def test_quantize_by_any_calibrator(net: nn.Module, images: list[Tensor]) -> None:
    qatkit.prepare(net, images[0])
    ranges = []
    for method in ("max", "two-pointer"):
        assert quantize(net, images, method=method, progress=False) == ()
        found = {
            path: (float(quantizer.range[0].min()), float(quantizer.range[1].max()))
            for path, quantizer in qatkit.modes.quantizers(net)
        }
        report = qatkit.calibrate(net, images, method=method, progress=False)
        assert found == {path: (low, high) for path, low, high, _ in report.ranges}
        ranges.append(found["layers.1.conv1.input_quantizer"][1])
    assert ranges[0] > ranges[1]
    with pytest.raises(QatkitError, match=r"'entropi'\): unknown method, .*entropy"):
        quantize(net, images, method="entropi")


@pytest.mark.parametrize("symmetric", [True, False])
def test_soft_rounding_starts_at_the_weight_and_ends_on_the_grid(symmetric: bool) -> None:
    spec = QuantSpec(num_bits=3, axis=0, observer="minmax", symmetric=symmetric)
    layer = qatkit.nn.QuantLinear(20, 4, weight_spec=spec)
    (weight,) = weights_of(layer)
    pin_range(weight)
    soft, straight = SoftRounding(weight), StraightRounding(weight)
    codes = codes_of(weight)
    low, high = layer.weight_quantizer.range  # of the nudged grid
    inside = (layer.weight > low[:, None] * 0.8) & (layer.weight < high[:, None] * 0.8)
    torch.testing.assert_close(soft(layer.weight)[inside], layer.weight[inside], rtol=0, atol=2e-3)
    assert torch.equal(soft.codes(), codes)
    assert torch.equal(straight.codes(), codes)
    torch.testing.assert_close(straight(layer.weight), layer.weight_quantizer(layer.weight))
    wanted = torch.randint(spec.quant_min, spec.quant_max + 1, codes.shape).float()
    assert write_codes(weight, wanted) == int((wanted != codes).sum())
    assert torch.equal(codes_of(weight), wanted)
    assert torch.equal(layer.weight_quantizer(layer.weight), layer.weight)


def test_the_gradient_of_a_learned_step_is_that_of_autograd() -> None:
    quantizer = qatkit.TensorQuantizer(QuantSpec(num_bits=3, signed=False)).eval()
    quantizer.set_range(0.0, 2.1)
    learned = LearnedStep(quantizer, 0.0)
    x = torch.randn(50, requires_grad=True)
    grad = torch.randn(50)
    learned(x).backward(grad)
    found = x.grad.clone(), learned.growth.grad.clone()
    x.grad = None
    growth = torch.zeros((), requires_grad=True)
    step = quantizer.scale * growth.exp()
    steps = (x / step).clamp(0, 7)
    ((steps + (steps.round() - steps).detach()) * step).backward(grad)
    inside = (x > -0.5 * quantizer.scale) & (x < 7.5 * quantizer.scale)
    torch.testing.assert_close(found[1], growth.grad, rtol=0.2, atol=0.05)
    assert torch.equal(found[0], grad * inside)
    torch.testing.assert_close(learned(x), quantizer(x))
    assert [float(end) for end in learned.range()] == pytest.approx([0.0, 2.1])


@ONE
def test_adaquant_stays_beside_its_grid_points_and_can_go_on(
    net: nn.Module, images: list[Tensor]
) -> None:
    reference = copy.deepcopy(net)
    prepared(net, images)
    arguments = {"rounding": "adaquant", "steps": 40, "progress": False, "reference": reference}
    first = reconstruct(net, images, **arguments)
    free = 0
    for weight in weights_of(net):
        scale, codes = weight.quantizer.scale.reshape(-1, 1), codes_of(weight).flatten(1)
        away = (weight.seen.detach().flatten(1) / scale - codes).abs()
        inside = codes.abs() < weight.quantizer.spec.quant_max  # beyond, float weights are clipped
        assert (away[inside] < 0.5).all()
        free += int((away > 0.05).sum())
    assert free > 0
    last = first.changes[-1]
    again = reconstruct(net, images, **arguments).changes[-1]
    assert again.path == last.path
    assert again.after <= again.before
