"""The operators of compiled graphs: the same results as eager, few nodes, one graph."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import qatkit
from qatkit.functional import fake_quantize, fake_quantize_unclipped, qparams, shrink_range
from qatkit.observers import OBSERVERS, observe
from qatkit.spec import QuantSpec
from tests.contract.test_compile_autocast_ddp import Small

POINTS = torch.tensor([3, -4, 0], dtype=torch.int32)
SCALES = torch.tensor([0.02, 0.3, 0.01])
GRIDS = {
    "symmetric": (torch.tensor(0.02), 0, -128, 127, None),
    "a number": (0.02, 0, -128, 127, None),
    "unsigned": (torch.tensor(0.02), 0, 0, 255, None),
    "affine": (torch.tensor(0.02), POINTS[0], -128, 127, None),
    "without zero": (torch.tensor(0.02), 0, 3, 120, None),
    "per channel": (SCALES, 0, -8, 7, 1),
    "per channel, affine": (SCALES, POINTS, -128, 127, -3),
    "one channel": (SCALES[1:2], 0, -8, 7, 0),
}


class Recorded:
    """A backend that keeps the nodes of its graphs and runs them by another backend."""

    def __init__(self, backend):
        self.backend, self.names = backend, []

    def __call__(self, graph, inputs):
        self.names += [str(n.target) for n in graph.graph.nodes if n.op.startswith("call")]
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", GRIDS)
def test_fake_quantize_is_one_node_and_equals_eager(name, dtype, backend):
    grid = GRIDS[name]
    x = (torch.randn(2, 3, 4, 5) * 3).to(dtype)
    x = x[:, :1].transpose(0, 1) if name == "one channel" else x
    one, other = (x.detach().clone().requires_grad_() for _ in range(2))
    recorded = Recorded(backend)
    found = torch.compile(lambda v: fake_quantize(v, *grid), fullgraph=True, backend=recorded)(one)
    wanted = fake_quantize(other, *grid)
    assert recorded.names.count("qatkit.round_to_grid") == 1
    assert len(recorded.names) <= 2
    assert torch.equal(found, wanted)
    grad = torch.randn(x.shape).to(dtype).contiguous(memory_format=torch.channels_last)
    passed = torch.autograd.grad(found, one, grad)[0], torch.autograd.grad(wanted, other, grad)[0]
    assert torch.equal(*passed)
    assert 0 < passed[0].count_nonzero() < x.numel()


@pytest.mark.parametrize("axis", [None, 1])
def test_unclipped_equals_eager(axis):
    scale = torch.tensor(0.02) if axis is None else SCALES
    one, other = (torch.ones(2, 3, 4).mul_(0.37).requires_grad_() for _ in range(2))
    run = torch.compile(fake_quantize_unclipped, fullgraph=True, backend="aot_eager")
    found, wanted = run(one, scale, axis), fake_quantize_unclipped(other, scale, axis)
    assert torch.equal(found, wanted)
    found.sum().backward()
    assert torch.equal(one.grad, torch.ones_like(one))


@pytest.mark.parametrize("percentile", [0.0, 0.5, 20.0])
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_shrink_is_one_node_and_equals_eager(axis, percentile):
    x = torch.randn(3, 40, 30)
    recorded = Recorded("aot_eager")
    run = torch.compile(shrink_range, fullgraph=True, backend=recorded)
    for found, wanted in zip(
        run(x, percentile, axis=axis), shrink_range(x, percentile, axis=axis), strict=True
    ):
        assert torch.equal(found, wanted)
    assert recorded.names.count("qatkit.shrink") == 1


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(),
        QuantSpec(symmetric=False, signed=False),
        QuantSpec(power_of_two=True),
        QuantSpec(num_bits=4, narrow_range=True),
    ],
)
def test_qparams_is_one_node_and_equals_eager(spec):
    low, high = torch.tensor([-1.0, 0.0, 0.2, 1e-45]), torch.tensor([2.0, 0.0, 0.7, 1e-45])
    recorded = Recorded("aot_eager")
    run = torch.compile(lambda a, b: qparams(a, b, spec), fullgraph=True, backend=recorded)
    for found, wanted in zip(run(low, high), qparams(low, high, spec), strict=True):
        assert torch.equal(found, wanted)
        assert found.dtype == wanted.dtype
    assert recorded.names.count("qatkit.qparams") == 1


OTHERS = {"momentum": 0.3, "fixed_range": None, "memory": "running", "percentile": 1.0}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("name", ["shrink", "minmax", "ema", "sigma", "channel-mean", "fixed"])
def test_observe_is_one_node_and_changes_the_buffers_as_eager(name, axis, backend):
    assert name in OBSERVERS
    bounds = (-1.0, 2.0) if name == "fixed" else None
    spec = QuantSpec(observer=name, axis=axis, **OTHERS | {"fixed_range": bounds})
    shape = () if axis is None else (3,)
    states = [
        (torch.zeros(shape), torch.zeros(shape), torch.zeros((), dtype=torch.int64))
        for _ in range(2)
    ]
    recorded = Recorded(backend)
    run = torch.compile(lambda x, *s: observe(x, s, spec), fullgraph=True, backend=recorded)
    batches = [torch.randn(2, 3, 40) * scale for scale in (1.0, 3.0, 0.0, 2.0)]
    batches.append(torch.full((2, 3, 40), torch.nan))
    for x in batches:
        found, wanted = run(x, *states[0]), observe(x, states[1], spec)
        for one, other in zip((*found, *states[0]), (*wanted, *states[1]), strict=True):
            assert torch.equal(one, other)
    assert recorded.names.count("qatkit.observe") == 1


def test_a_training_step_is_one_small_graph_that_stays():
    x = torch.randn(2, 3, 16, 16)
    model = qatkit.prepare(Small(), x)
    qatkit.calibrate(model, [x], progress=False)
    eager = copy.deepcopy(model.train())
    counters.clear()
    recorded = Recorded("aot_eager")
    run = torch.compile(model, fullgraph=True, backend=recorded)
    for scale in (1.0, 2.0, 0.5):
        for each in (run, eager):
            each(x * scale).square().mean().backward()
    assert counters["stats"]["unique_graphs"] == 1
    quantizers = [m for m in model.modules() if isinstance(m, qatkit.quantizer.TensorQuantizer)]
    assert recorded.names.count("qatkit.observe") == len(quantizers)
    ours = [name for name in recorded.names if name.startswith("qatkit.")]
    assert len(ours) == 3 * len(quantizers)
    for one, other in zip(model.buffers(), eager.buffers(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(model.parameters(), eager.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.slow
def test_inductor_computes_what_eager_does():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x):
            return self.head(torch.relu(self.stem(x)))

    x = torch.randn(32, 6)
    model = qatkit.prepare(Net(), x)
    qatkit.calibrate(model, [x], progress=False)
    eager = copy.deepcopy(model.train())
    run = torch.compile(model, fullgraph=True)
    for _ in range(2):
        for each in (run, eager):
            each(x).square().mean().backward()
    for one, other in zip(model.buffers(), eager.buffers(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_nothing_is_registered_before_something_is_compiled():
    code = (
        "import torch, qatkit\n"
        "qatkit.fake_quantize(torch.ones(3), 0.1, 0, -128, 127)\n"
        "assert not hasattr(torch.ops.qatkit, 'shrink')\n"
        "assert not hasattr(torch.ops.qatkit, 'observe')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
