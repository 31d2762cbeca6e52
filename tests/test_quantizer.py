"""The quantizer: its grid, when its range moves and when not, and what a bad tensor does to it."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qatkit.errors import QatkitError
from qatkit.functional import fake_quantize
from qatkit.quantizer import TensorQuantizer, share_range
from qatkit.spec import OBSERVER_NAMES, WATCHING, QuantSpec

NAN, INF = float("nan"), float("inf")
RUNNING = [name for name in WATCHING if name != "fixed"]


def spec(name: str, **fields: Any) -> QuantSpec:
    fixed = {"fixed_range": (-1.0, 1.0)} if name == "fixed" else {}
    return QuantSpec(observer=name, **fixed, **fields)


def buffers(quantizer: TensorQuantizer) -> list[Tensor]:
    return [value.clone() for value in quantizer.state_dict().values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def finite(quantizer: TensorQuantizer) -> bool:
    low, high = quantizer.range
    return bool(torch.isfinite(low).all() and torch.isfinite(high).all() and (low <= high).all())


def test_equals_fake_quantize_with_its_range() -> None:
    quantizer, x = TensorQuantizer(QuantSpec(observer="minmax", num_bits=4)), torch.randn(50)
    y = quantizer(x)
    scale = x.abs().max() / 7
    assert torch.equal(y, fake_quantize(x, scale, 0, -8, 7))
    assert torch.equal(quantizer.scale, scale)
    assert quantizer.zero_point == 0
    assert torch.equal(quantizer.amax, x.abs().max())


@pytest.mark.parametrize("name", OBSERVER_NAMES)
@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dtype_shape_and_layout_are_kept(name: str, axis: int | None, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 4, 5).to(dtype).to(memory_format=torch.channels_last)
    quantizer = TensorQuantizer(spec(name, axis=axis), None if axis is None else 3)
    y = quantizer(x)
    assert (y.dtype, y.shape, y.stride()) == (x.dtype, x.shape, x.stride())
    assert quantizer.range[0].dtype == quantizer.scale.dtype == torch.float32
    assert finite(quantizer)


@pytest.mark.parametrize("name", RUNNING)
@pytest.mark.parametrize("memory", ["running", "batch", "latest"])
@pytest.mark.parametrize("frozen", [False, True])
def test_eval_and_frozen_never_change_a_buffer(name: str, memory: str, frozen: bool) -> None:
    quantizer = TensorQuantizer(spec(name, memory=memory))
    quantizer(torch.randn(8))
    before = buffers(quantizer)
    if frozen:
        quantizer.observe = "never"
    else:
        quantizer.eval()
    first = quantizer(torch.linspace(-50, 50, 8))
    assert same(buffers(quantizer), before)
    assert torch.equal(quantizer(torch.linspace(-50, 50, 8)), first)


def test_memories() -> None:
    small, large = torch.tensor([-1.0, 1.0]), torch.tensor([-4.0, 4.0])
    y = {}
    for memory in ("running", "batch", "latest"):
        quantizer = TensorQuantizer(QuantSpec(observer="average", memory=memory))
        quantizer(small)
        y[memory, "train"] = quantizer(large)[1].item()
        y[memory, "eval"] = quantizer.eval()(large)[1].item()
    assert y["running", "train"] == y["running", "eval"] == pytest.approx(2.5)
    assert y["batch", "train"] == 4
    assert y["batch", "eval"] == pytest.approx(2.5)
    assert y["latest", "train"] == y["latest", "eval"] == 4


def test_observe_always_and_switched_off() -> None:
    quantizer = TensorQuantizer(QuantSpec(observer="minmax")).eval()
    quantizer.observe, quantizer.quantize = "always", False
    x = torch.randn(9)
    assert quantizer(x) is x
    assert quantizer.num_batches == 1
    assert torch.equal(quantizer.max_val, x.max().clamp(min=x.max()))


def test_without_a_range_it_warns_and_passes_through() -> None:
    quantizer, x = TensorQuantizer(QuantSpec()).eval(), torch.randn(3)
    with pytest.warns(UserWarning, match=r"run qatkit\.calibrate"):
        assert quantizer(x) is x
    assert not quantizer.calibrated


BAD = {
    "nan": torch.tensor([NAN, 1.0, -2.0]),
    "inf": torch.tensor([INF, -INF, 1.0]),
    "all nan": torch.full((3,), NAN),
    "zero": torch.zeros(3),
    "constant": torch.full((3,), 0.7),
    "single": torch.tensor([-3.0]),
    "empty": torch.zeros(0),
    "tiny": torch.full((3,), 1e-40),
    "huge": torch.full((3,), 3e38),
}


@pytest.mark.parametrize("name", OBSERVER_NAMES)
@pytest.mark.parametrize("case", BAD)
def test_a_bad_tensor_never_poisons_the_range(name: str, case: str) -> None:
    x, good = BAD[case], torch.linspace(-1, 1, 64)
    for order in ((x, good), (good, x), (x,)):
        quantizer = TensorQuantizer(spec(name))
        for tensor in order:
            y = quantizer(tensor)
            assert y.shape == tensor.shape
            assert torch.equal(torch.isnan(y), torch.isnan(tensor))
        assert finite(quantizer)
        assert torch.isfinite(quantizer.scale)
        assert quantizer.scale > 0


@pytest.mark.parametrize("case", ["nan", "all nan", "empty", "zero"])
def test_what_cannot_be_seen_leaves_the_old_range(case: str) -> None:
    quantizer, good = TensorQuantizer(QuantSpec(observer="average")), torch.linspace(-1, 1, 64)
    quantizer(good)
    quantizer(BAD[case])
    if case != "nan":
        assert quantizer.amax == 1


def test_gradient() -> None:
    quantizer = TensorQuantizer(QuantSpec(num_bits=4))
    quantizer.set_range(-1.0, 1.0)
    quantizer.eval()
    x = torch.tensor([-3.0, -0.5, 0.2, 0.99, 3.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_state_is_complete_before_calibration() -> None:
    first, second = (TensorQuantizer(QuantSpec(axis=0), 3) for _ in range(2))
    assert list(first.state_dict()) == ["min_val", "max_val", "num_batches"]
    first(torch.randn(3, 4))
    second.load_state_dict(first.state_dict())
    assert second.calibrated
    assert torch.equal(second.scale, first.scale)
    second.load_state_dict({})
    assert second.calibrated


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "save", "weights_only"])
def test_copies(through: str, tmp_path: Path) -> None:
    quantizer = TensorQuantizer(QuantSpec(axis=0), 3)
    quantizer(torch.randn(3, 4))
    quantizer.observe = "never"
    if through == "deepcopy":
        twin = copy.deepcopy(quantizer)
    elif through == "pickle":
        twin = pickle.loads(pickle.dumps(quantizer))
    else:
        file = io.BytesIO()
        whole = through == "save"
        torch.save(quantizer if whole else quantizer.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=not whole)
        twin = loaded if whole else TensorQuantizer(quantizer.spec, 3)
        if not whole:
            twin.load_state_dict(loaded)
    x = torch.randn(3, 4)
    assert torch.equal(twin.eval()(x), quantizer.eval()(x))


def test_set_and_reset() -> None:
    quantizer = TensorQuantizer(QuantSpec(axis=0), 2)
    quantizer.set_range(-1.0, torch.tensor([1.0, 2.0]))
    assert quantizer.calibrated
    assert quantizer.max_val.tolist() == [1, 2]
    quantizer.reset_range()
    assert not quantizer.calibrated
    fixed = TensorQuantizer(QuantSpec(observer="fixed", fixed_range=(-2.0, 3.0)))
    assert fixed.calibrated
    fixed.reset_range()
    assert fixed.calibrated
    assert fixed.amax == 3


@pytest.mark.parametrize("ends", [(1.0, -1.0), (NAN, 1.0), (-INF, 1.0), (0.0, INF)])
def test_an_illegal_range(ends: tuple[float, float]) -> None:
    quantizer = TensorQuantizer(QuantSpec())
    quantizer.name = "layer1.input_quantizer"
    with pytest.raises(QatkitError, match=r"layer1\.input_quantizer: range .* low <= high"):
        quantizer.set_range(*ends)
    assert not quantizer.calibrated


@pytest.mark.parametrize(("axis", "channels"), [(0, None), (None, 3)])
def test_channels_belong_to_an_axis(axis: int | None, channels: int | None) -> None:
    with pytest.raises(QatkitError, match="exactly when the spec has an axis"):
        TensorQuantizer(QuantSpec(axis=axis), channels)


def test_shared_range() -> None:
    first, second = (TensorQuantizer(QuantSpec(observer="minmax")) for _ in range(2))
    share_range([first, second])
    first(torch.tensor([-1.0, 0.5]))
    assert second.eval()(torch.tensor([5.0]))[0] <= 1
    second.train()(torch.tensor([0.0, 4.0]))
    assert first.scale == second.scale
    assert first.range[0] == -1
    assert first.max_val == 0.5
    assert first.peers == (second,)
    twins = copy.deepcopy(torch.nn.ModuleList([first, second]))
    assert twins[0].peers == (twins[1],)


@pytest.mark.parametrize("change", [{"num_bits": 4}, {"power_of_two": True}, {"signed": False}])
def test_different_grids_cannot_share(change: dict[str, Any]) -> None:
    quantizers = [TensorQuantizer(QuantSpec()), TensorQuantizer(QuantSpec().replace(**change))]
    with pytest.raises(QatkitError, match="one scale for different grids"):
        share_range(quantizers)


def test_device_and_repr() -> None:
    quantizer = TensorQuantizer(QuantSpec(axis=0), 3, device=torch.device("meta"))
    assert {b.device.type for b in quantizer.buffers()} == {"meta"}
    quantizer.quantize, quantizer.observe = False, "never"
    assert repr(quantizer) == "TensorQuantizer(8 bit, shrink, axis=0, off, frozen)"


def test_float32_inside_autocast() -> None:
    quantizer, x = TensorQuantizer(QuantSpec()), torch.randn(100)
    with torch.autocast("cpu", torch.bfloat16):
        y = quantizer(x)
    again = copy.deepcopy(quantizer).eval()
    assert y.dtype == torch.float32
    assert torch.equal(again(x), y)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("training", [True, False])
def test_compiled(backend: str, training: bool) -> None:
    eager, x = TensorQuantizer(QuantSpec(observer="average")), torch.randn(30)
    eager(x)
    eager.train(training)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend=backend)
    for scale in (1, 2):
        torch.testing.assert_close(compiled(scale * x), eager(scale * x), rtol=1e-6, atol=0)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[f"_orig_mod.{name}"], value)
