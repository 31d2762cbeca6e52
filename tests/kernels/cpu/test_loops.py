"""The compiled loops give what the portable kernels give, bit by bit, on any layout and data."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from qatkit import QuantSpec
from qatkit.functional import shrink_range
from qatkit.kernels import cpu, portable
from qatkit.quantizer import TensorQuantizer

LARGE = (5, 64, 33, 57)
"""More elements than go without a backward pass in Python, and no whole number of blocks."""
GRIDS = [(0.02, -128, 127), (0.7, -128, 127), (0.013, 0, 255), (1e-30, -8, 7), (3e37, -127, 127)]


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def layouts(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Return random tensors, dense or not, in several orders of memory."""
    x = torch.randn(shape)
    return {
        "contiguous": x,
        "channels last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 2),
        "every second": torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2],
        "expanded": x[:1].expand(shape),
    }


def both(function, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the result and the gradient of ``x``."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    view = leaf if leaf.stride() == x.stride() else leaf.as_strided(leaf.shape, leaf.stride())
    y = function(view)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    return y.detach(), leaf.grad


def on_grid(kernels, grid: tuple, x: Tensor) -> Tensor:
    return kernels.fake_quantize(x, *grid)


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), LARGE])
@pytest.mark.parametrize("grid", GRIDS)
def test_one_scale(shape, grid, threads):
    scale, low, high = grid
    torch.manual_seed(0)
    for name, x in layouts(shape).items():
        x = x * scale * 100
        grid = (scale, 0, low, high, None)
        slow = both(partial(on_grid, portable, grid), x)
        assert same(both(partial(on_grid, cpu, grid), x), slow), name
        with torch.no_grad():
            assert same((on_grid(cpu, grid, x),), slow[:1]), name


@pytest.mark.parametrize("outside", [0.0, 1e-5, 0.3])
def test_however_many_elements_are_outside(outside, threads):
    torch.manual_seed(0)
    x = torch.rand(LARGE) - 0.5
    x[torch.rand(LARGE) < outside] = 3.0
    x.view(-1)[[0, 7, 4095, 4096, -1]] = torch.tensor([math.inf, -math.inf, 1.0, math.nan, -1.0])
    grid = (0.005, 3, -128, 127, None)
    assert same(both(partial(on_grid, cpu, grid), x), both(partial(on_grid, portable, grid), x))


@pytest.mark.parametrize(
    "shape", [(6, 3, 3, 3), (70, 5, 8, 9), (300, 1000, 1, 1), (33, 129, 10, 9)]
)
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("factor", [0.5, 0.999, 1.5])
def test_a_scale_for_each_row(shape, axis, factor, threads):
    torch.manual_seed(0)
    for name, x in layouts(shape).items():
        others = [d for d in range(4) if d != axis % 4]
        scale = x.abs().amax(others).clamp(min=1e-3) * factor / 127
        grid = (scale, 0, -127, 127, axis)
        fast = both(partial(on_grid, cpu, grid), x)
        slow = both(partial(on_grid, portable, grid), x)
        assert same(fast, slow), name


@pytest.mark.parametrize("count", [1, 63, 4096, 5000, 70_001, 1_200_011])
@pytest.mark.parametrize("percentile", [0.0, 0.01, 0.1, 1.0, 30.0, 49.99])
def test_range(count, percentile, threads):
    torch.manual_seed(0)
    x = torch.randn(count)
    data = {
        "gaussian": x,
        "relu": x.relu(),
        "minus relu": x.relu().neg(),
        "rising": x.sort().values,
        "falling": x.sort(descending=True).values,
        "integers": torch.randint(0, 4, (count,)) - 1.0,
        "heavy tails": x.pow(5),
        "shifted": x * 1e-5 + 3,
        "tiny": x * 1e-32,
        "huge": x * 1e38,
        "constant": torch.full((count,), 3.0),
        "two values": torch.where(torch.arange(count) % 17 == 0, 9.0, -1.0),
        "a view with gaps": torch.randn(2 * count)[::2],
    }
    for odd in (math.nan, math.inf, -math.inf):
        data[str(odd)] = torch.where(torch.arange(count) == count // 2, odd, x)
    for name, row in data.items():
        for end, expected in zip(
            cpu.shrink(row[None], percentile), portable.shrink(row[None], percentile), strict=True
        ):
            assert torch.equal(end, expected), name


@pytest.mark.parametrize(
    "spec",
    [QuantSpec(), QuantSpec(observer="minmax"), QuantSpec(observer="ema", signed=False)],
    ids=str,
)
def test_a_quantizer_with_threads(spec, threads):
    torch.manual_seed(0)
    fast, slow = TensorQuantizer(spec), TensorQuantizer(spec)
    slow._is_plain = lambda x: False  # type: ignore[method-assign]
    for _ in range(3):
        x = torch.randn(20, 64, 32, 31)
        assert same(both(fast, x), both(slow, x))
        assert same((fast.min_val, fast.max_val), (slow.min_val, slow.max_val))


def test_a_gradient_that_is_saved_at_once():
    spec = QuantSpec(axis=0, observer="minmax", narrow_range=True, memory="latest")
    quantizer = TensorQuantizer(spec, 8)
    w = torch.randn(8, 6, 3, 3)
    quantizer(w * 0.7)
    quantizer.observe = "never"
    plain = both(quantizer, w)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        assert same(both(quantizer, w), plain)
    assert int((plain[1] == 0).sum()) > 0


def test_buffers_of_another_kind_are_never_written_to_by_address():
    spec = QuantSpec(axis=0, observer="minmax", narrow_range=True, memory="latest")
    pruned = TensorQuantizer(spec, 8)
    with pytest.raises(RuntimeError, match="must match"):
        pruned(torch.randn(9, 4))
    halved = TensorQuantizer(spec, 8)
    for name in ("min_val", "max_val"):
        setattr(halved, name, getattr(halved, name).to(torch.float16))
    w = torch.randn(8, 4)
    assert torch.equal(halved(w), TensorQuantizer(spec, 8)(w))
    one = TensorQuantizer(QuantSpec())
    one.min_val, one.max_val = (torch.zeros((), dtype=torch.float64) for _ in range(2))
    assert torch.equal(one(w), TensorQuantizer(QuantSpec())(w))


WITHOUT = """
import sys
sys.modules["numba"] = None
import torch, qatkit
from torch import nn
from qatkit.kernels.cpu.compiled import compiled_loops
assert compiled_loops() is None
"""
TRAIN = """
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
x = torch.randn(4, 3, 12, 12)
model = qatkit.prepare(net, x)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(4):
    if step == 2:
        qatkit.freeze_ranges(model).apply()
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
state = model.state_dict()
"""


def test_without_numba(tmp_path):
    code = f"{WITHOUT}{TRAIN}\ntorch.save(state, sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "state.pt")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    here: dict = {}
    exec("import torch, qatkit\nfrom torch import nn\n" + TRAIN, here)
    state = torch.load(tmp_path / "state.pt")
    assert state.keys() == here["state"].keys()
    assert all(torch.equal(value, here["state"][name]) for name, value in state.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_is_not_ours(dtype, threads):
    x = torch.randn(1_200_000)
    expected = [*cpu.shrink(x[None], 0.01), TensorQuantizer(QuantSpec())(x)]
    torch.set_default_dtype(dtype)
    try:
        found = [*cpu.shrink(x[None], 0.01), TensorQuantizer(QuantSpec())(x)]
        assert {each.dtype for each in shrink_range(x, 0.01)} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(tuple(found), tuple(expected))


def test_tensors_without_memory_of_their_own():
    quantizer = TensorQuantizer(QuantSpec())
    quantizer(torch.randn(4, 5))
    zero = torch._efficientzerotensor((4, 5))
    negative = torch._neg_view(torch.rand(4, 5))
    with pytest.raises(RuntimeError, match="ZeroTensors are immutable"):
        quantizer(zero)
    other = TensorQuantizer(QuantSpec())
    assert torch.equal(other(negative), TensorQuantizer(QuantSpec())(negative.clone()))
    assert other.max_val < 0
    freed = torch.randn(4, 5)
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        quantizer(freed)


def test_infinite_gradients_of_clipped_weights_are_zero():
    spec = QuantSpec(axis=0, observer="minmax", narrow_range=True, memory="latest")
    quantizer = TensorQuantizer(spec, 4)
    w = torch.randn(4, 9)
    quantizer(w * 0.5)
    quantizer.observe = "never"
    leaf = w.clone().requires_grad_()
    quantizer(leaf).backward(torch.full_like(w, math.inf))
    assert set(leaf.grad.view(-1).tolist()) == {0.0, math.inf}


@pytest.mark.parametrize("change", ["NUMBA_DISABLE_JIT=1", "a library that does not load"])
def test_numba_that_does_not_work(change, tmp_path):
    code = "import torch, qatkit; print(qatkit.TensorQuantizer(qatkit.QuantSpec())(torch.ones(2)))"
    variables = dict(os.environ)
    if "=" in change:
        variables |= {"NUMBA_DISABLE_JIT": "1"}
    else:
        (tmp_path / "numba.py").write_text("raise OSError('libllvm.so: not found')")
        variables["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True
    )
    assert "tensor([1." in done.stdout, done.stderr
    assert ("libllvm" in done.stderr) == ("=" not in change)
