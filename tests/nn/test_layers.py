"""Every layer is a drop-in: same arguments, keys and, without quantizing, the very same numbers."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

import qatkit.nn as qnn
from qatkit.config import ACTIVATION, WEIGHT
from qatkit.errors import QatkitTypeError
from qatkit.functional import fake_quantize
from qatkit.modes import disable_quantization
from qatkit.nn.registry import QUANTIZED, swap, swappable
from qatkit.quantizer import TensorQuantizer
from qatkit.spec import QuantSpec

SIZES = {1: (9,), 2: (9, 8), 3: (5, 6, 7)}


def images(dimensions: int, channels: int = 4) -> Tensor:
    return torch.randn(2, channels, *SIZES[dimensions])


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Return a float layer and the quantized one with the same weights."""
    plain = getattr(nn, name)(*args, **kwargs)
    quantized = getattr(qnn, f"Quant{name}")(*args, **kwargs)
    quantized.load_state_dict(plain.state_dict())
    return plain, quantized


def swapped(plain: nn.Module) -> nn.Module:
    """Return a copy of a float layer, swapped in place."""
    layer = copy.deepcopy(plain)
    swap(layer)
    layer.attach_input(TensorQuantizer(ACTIVATION))
    if hasattr(layer, "attach_weight"):
        layer.attach_weight(WEIGHT.replace(axis=layer.default_axis))
    return layer


CONVOLUTIONS = [
    *(
        (f"Conv{n}d", n, {"padding": padding, "padding_mode": mode})
        for n in (1, 2, 3)
        for mode in ("zeros", "reflect", "replicate", "circular")
        for padding in (1, "same")
    ),
    *((f"Conv{n}d", n, {"padding": "valid", "groups": 2, "bias": False}) for n in (1, 2, 3)),
    *((f"Conv{n}d", n, {"stride": 2, "dilation": 2}) for n in (1, 2)),
    *(
        (f"ConvTranspose{n}d", n, {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2})
        for n in (1, 2, 3)
    ),
    *((f"ConvTranspose{n}d", n, {"dilation": 2, "bias": False}) for n in (1, 2, 3)),
]


@pytest.mark.parametrize(("name", "dimensions", "options"), CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_convolutions(
    name: str, dimensions: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    plain, quantized = pair(name, 4, 6, 3, dtype=dtype, **options)
    x = images(dimensions).to(dtype)
    for layer in (quantized, swapped(plain)):
        with disable_quantization(layer):
            assert torch.equal(layer(x), plain(x))
            assert torch.equal(layer(x[0]), plain(x[0]))
        y = layer.train()(x)
        assert y.dtype == dtype
        error = (y - plain(x)).abs().max()
        assert 0 < error < 0.3


def test_output_size_of_transposed() -> None:
    plain, quantized = pair("ConvTranspose2d", 4, 6, 3, stride=2)
    x = images(2)
    with disable_quantization(quantized):
        for size in ([19, 17], [20, 18]):
            assert torch.equal(quantized(x, size), plain(x, size))
            assert torch.equal(quantized(x, output_size=size), plain(x, output_size=size))


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5), (0, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape: tuple[int, ...], bias: bool) -> None:
    plain, quantized = pair("Linear", 5, 3, bias=bias)
    x = torch.randn(shape)
    with disable_quantization(quantized):
        assert torch.equal(quantized(x), plain(x))
    assert quantized(x).shape == (*shape[:-1], 3)


POOLS = [
    *((f"{kind}Pool{n}d", n, (2,)) for n in (1, 2, 3) for kind in ("Max", "Avg")),
    *((f"AdaptiveAvgPool{n}d", n, (2,)) for n in (1, 2, 3)),
]


@pytest.mark.parametrize(("name", "dimensions", "arguments"), POOLS)
def test_pools(name: str, dimensions: int, arguments: tuple[Any, ...]) -> None:
    plain, quantized = pair(name, *arguments)
    x = images(dimensions)
    for layer in (quantized, swapped(plain)):
        with disable_quantization(layer):
            assert torch.equal(layer(x), plain(x))
        spec = layer.input_quantizer.spec
        layer(x)
        scale = layer.input_quantizer.scale
        on_grid = fake_quantize(x, scale, 0, spec.quant_min, spec.quant_max)
        assert torch.equal(layer.eval()(x), plain(on_grid))


def test_max_pool_with_indices() -> None:
    plain, quantized = pair("MaxPool2d", 2, return_indices=True)
    x = images(2)
    with disable_quantization(quantized):
        for ours, theirs in zip(quantized(x), plain(x), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("float_class", QUANTIZED)
def test_registry(float_class: type[nn.Module]) -> None:
    quantized = QUANTIZED[float_class]
    assert issubclass(quantized, float_class)
    assert quantized.__name__ == f"Quant{float_class.__name__}"
    assert getattr(qnn, quantized.__name__) is quantized


class Inherits(nn.Conv2d):
    label = "stem"

    def stride_of(self) -> int:
        return self.stride[0]


class Computes(nn.Conv2d):
    def _conv_forward(self, *args: Any) -> Tensor:
        return 2 * super()._conv_forward(*args)


class Constrains(nn.Linear):
    weight = property(lambda self: self._parameters["weight"].clamp(-1, 1))


def test_a_subclass_is_swappable_if_it_computes_nothing_else() -> None:
    assert swappable(nn.Conv2d(1, 1, 1))
    assert swappable(Inherits(1, 1, 1))
    assert swappable(NonDynamicallyQuantizableLinear(1, 1))
    assert not swappable(Computes(1, 1, 1))
    assert not swappable(Constrains.__new__(Constrains))
    assert not swappable(qnn.QuantConv2d(1, 1, 1))


def test_a_swapped_subclass_keeps_its_methods_and_pickles() -> None:
    layer = Inherits(3, 4, 3, stride=2)
    swap(layer)
    layer.attach_weight(WEIGHT)
    layer.attach_input(TensorQuantizer(QuantSpec(observer="minmax")))
    assert isinstance(layer, Inherits)
    assert isinstance(layer, qnn.QuantConv2d)
    assert (layer.label, layer.stride_of()) == ("stem", 2)
    x = torch.randn(1, 3, 8, 8)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert torch.equal(twin.eval()(x), expected)


def test_swap_keeps_the_object() -> None:
    layer = nn.Conv2d(3, 4, 3)
    seen: list[int] = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    weight, keys = layer.weight, list(layer.state_dict())
    same = layer
    swap(layer)
    layer.attach_input(TensorQuantizer(ACTIVATION))
    layer.attach_weight(WEIGHT)
    assert same is layer
    assert layer.weight is weight
    assert list(layer.state_dict())[: len(keys)] == keys
    layer(images(2, 3))
    assert seen == [1]


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d", "Linear"])
def test_device_dtype_and_keys(name: str) -> None:
    arguments = (4, 6) if name == "Linear" else (4, 6, 3)
    layer = getattr(qnn, f"Quant{name}")(*arguments, device="meta", dtype=torch.bfloat16)
    assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"meta"}
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    extra = set(layer.state_dict()) - set(getattr(nn, name)(*arguments).state_dict())
    assert all("_quantizer." in key for key in extra)
    assert len(extra) == 6


def test_axes_by_default() -> None:
    assert qnn.QuantConv2d(4, 6, 3).weight_quantizer.min_val.shape == (6,)
    assert qnn.QuantLinear(4, 6).weight_quantizer.min_val.shape == (6,)
    assert qnn.QuantConvTranspose2d(4, 6, 3).weight_quantizer.min_val.shape == ()


def test_specs_of_a_direct_construction() -> None:
    layer = qnn.QuantConv2d(
        4, 6, 3, weight_spec=QuantSpec(num_bits=3, axis=1), input_spec=QuantSpec(num_bits=5)
    )
    assert layer.weight_quantizer.min_val.shape == (4,)
    layer.train()(images(2))
    codes = layer.weight_quantizer(layer.weight) / layer.weight_quantizer.scale[:, None, None]
    assert codes.round().unique().numel() <= 8
    for wrong in (8, "int8", WEIGHT.to_dict()):
        with pytest.raises(QatkitTypeError, match=r"weight_spec=.*give a qatkit\.QuantSpec"):
            qnn.QuantLinear(2, 2, weight_spec=wrong)  # type: ignore[arg-type]


def test_strict_load_of_a_float_checkpoint() -> None:
    model = nn.Sequential(qnn.QuantConv2d(4, 6, 3), nn.ReLU(), qnn.QuantAvgPool2d(2))
    plain = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.AvgPool2d(2))
    model.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(model[0].weight, plain[0].weight)
    state = plain.state_dict() | {"0.weight_quantizer.min_val": torch.zeros(6)}
    with pytest.raises(RuntimeError, match=r"weight_quantizer\.max_val"):
        model.load_state_dict(state, strict=True)


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d", "Linear"])
def test_gradients(name: str) -> None:
    plain, layer = pair(name, 4, 6, *(() if name == "Linear" else (3,)))
    x = (torch.randn(2, 4) if name == "Linear" else images(2)).requires_grad_()
    layer(x).square().sum().backward()
    quantities = [(x.grad, "input"), *((p.grad, n) for n, p in layer.named_parameters())]
    x.grad = None
    plain(x).square().sum().backward()
    wanted = [x.grad, *(p.grad for p in plain.parameters())]
    for (ours, where), theirs in zip(quantities, wanted, strict=True):
        assert ours is not None, where
        assert theirs is not None
        similarity = nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), 0)
        assert similarity > 0.99, where


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "save"])
def test_copies(through: str) -> None:
    model = nn.Sequential(qnn.QuantConv2d(4, 6, 3), nn.BatchNorm2d(6), qnn.QuantMaxPool2d(2))
    model[0].attach_weight(WEIGHT.replace(axis=None))
    model[0].fold(model[1])
    x = images(2)
    model(x)
    if through == "deepcopy":
        twin = copy.deepcopy(model)
    elif through == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert twin[0].batch_norm is twin[1]
    assert torch.equal(twin.eval()(x), model.eval()(x))
    twin[1].running_var.mul_(4.0)
    assert not torch.equal(twin(x), model(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_spoils_no_range(value: float) -> None:
    layer, x = qnn.QuantConv2d(4, 6, 3), images(2)
    layer(x)
    bad = x.clone()
    bad[0, 0, 0, 0] = value
    layer(bad)
    for quantizer in (layer.input_quantizer, layer.weight_quantizer):
        assert torch.isfinite(quantizer.scale).all()
    assert torch.isfinite(layer.eval()(x)).all()


@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_autocast(training: bool) -> None:
    layer, x = qnn.QuantConv2d(4, 6, 3), images(2)
    layer(x)
    layer.train(training)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.weight_quantizer.min_val.dtype == torch.float32
    assert layer.weight.grad is not None
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models(dtype: torch.dtype) -> None:
    layer = qnn.QuantConv2d(4, 6, 3)
    layer(images(2))
    ranges = [b.clone() for b in layer.buffers()]
    layer.to(dtype)
    assert all(torch.equal(a, b) for a, b in zip(ranges, layer.buffers(), strict=True))
    assert {b.dtype for b in layer.buffers()} == {torch.float32, torch.int64}
    y = layer(images(2).to(dtype))
    assert y.dtype == dtype
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("axis", [0, None], ids=["per channel", "per tensor"])
def test_compiled_in_train_and_eval(backend: str, axis: int | None) -> None:
    model = nn.Sequential(qnn.QuantConv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    model[0].attach_weight(WEIGHT.replace(axis=axis))
    model[0].fold(model[1])
    x = images(2)
    model(x)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for training in (True, False):
        for net in (eager, compiled):
            net.train(training)
            net.zero_grad()
        ours, theirs = compiled(x), eager(x)
        torch.testing.assert_close(ours, theirs)
        ours.sum().backward()
        theirs.sum().backward()
        torch.testing.assert_close(model[0].weight.grad, eager[0].weight.grad)
    for (name, ours), theirs in zip(
        model.state_dict().items(), eager.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, msg=name)
