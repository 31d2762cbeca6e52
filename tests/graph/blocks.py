"""Small blocks, and what every prepared one must still do."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import qatkit
from qatkit.graph.capture import split_inputs
from qatkit.modes import quantizers


def conv(inputs: int = 8, outputs: int = 8, size: int = 3, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **more)


def conv_bn(inputs: int = 8, outputs: int = 8, size: int = 3, **more: Any) -> nn.Sequential:
    return nn.Sequential(conv(inputs, outputs, size, bias=False, **more), nn.BatchNorm2d(outputs))


class Body(nn.Module):
    """A stem, the block, a head: the block stands where blocks stand."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8), nn.ReLU())
        self.block = block
        self.head = nn.Sequential(nn.ReLU(), conv(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)))


X = torch.randn(2, 3, 12, 12)


def leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def call(model: nn.Module, inputs: Any) -> list[Tensor]:
    args, kwargs = split_inputs(copy.deepcopy(inputs))
    torch.manual_seed(3)
    return leaves(model(*args, **kwargs))


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) > 0 and all(map(torch.equal, left, right))


def close(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(left, right, strict=True)
    )


def prepared(
    model: nn.Module,
    inputs: Any = X,
    config: Any = None,
    *,
    pickles: bool = True,
    exact: bool = True,
) -> nn.Module:
    """Prepare a copy and check the promises that hold for every model.

    Attention as one function is not ``exact``: its products are computed one by one.
    """
    equal = same if exact else close
    reference = copy.deepcopy(model)
    twin = qatkit.prepare(copy.deepcopy(model), inputs, config)
    for training in (False, True):
        reference.train(training)
        twin.train(training)
        with qatkit.disable_quantization(twin):
            expected, found = call(reference, inputs), call(twin, inputs)
        assert equal(found, expected), f"training={training}"
        if training and exact:
            _check_gradients(reference, twin, expected, found)
    twin.zero_grad()
    reference.eval()
    twin.eval()
    missing = twin.load_state_dict(reference.state_dict(), strict=True)
    assert not missing.missing_keys
    call(twin.train(), inputs)
    twin.eval()
    assert same(call(copy.deepcopy(twin), inputs), call(twin, inputs))
    if pickles and not any("<locals>" in type(m).__qualname__ for m in model.modules()):
        assert same(call(pickle.loads(pickle.dumps(twin)), inputs), call(twin, inputs))
    never = [path for path, q in quantizers(twin) if not q.calibrated]
    assert never == []
    return twin


def _check_gradients(
    reference: nn.Module, twin: nn.Module, expected: list[Tensor], found: list[Tensor]
) -> None:
    for outputs in (expected, found):
        total = sum(out.pow(2).sum() for out in outputs if out.requires_grad)
        if isinstance(total, Tensor):
            total.backward()
    wanted = {name: p.grad for name, p in reference.named_parameters()}
    for name, parameter in twin.named_parameters():
        if wanted[name] is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, wanted[name], msg=name)


def quantizer_paths(model: nn.Module) -> set[str]:
    """Return the paths of the activation quantizers, each under its first name."""
    return {path for path, _ in quantizers(model) if not path.endswith("weight_quantizer")}


def skipped(plan: qatkit.Plan) -> dict[str, str]:
    return {skip.path: skip.reason for skip in plan.skipped}
