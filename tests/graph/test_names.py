"""An operation has one name in a recorded run and in a traced graph: else no block would match."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from qatkit.graph.kinds import function_name

EXPRESSIONS = """
x + y; x - y; x * y; x / y; x // y; x % y; x ** 2; 2 ** x; x @ y; 1 - x; 1 / x; 2 * x; 1 + x; -x
abs(x); x > y; x == y; x < 1; ~b; b & b; b | b; x[0]; x[:, None]; x.T; x.mT; x.t(); x.float()
x.type_as(y); x.mean(1); x.sqrt(); torch.pow(x, 2); x.pow(2); torch.div(x, y); x.div(y)
x.true_divide(y); torch.sub(x, y); torch.rsub(x, 1); torch.multiply(x, y); torch.subtract(x, y)
torch.floor_divide(x, y); torch.where(b, x, y); x.masked_fill(b, 0.0); x.permute(1, 0)
torch.softmax(x, -1); nn.functional.softmax(x, -1); torch.stack([x, y]); x.add_(y); x.mul_(2)
"""


class _Names(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.found.append(function_name(func))
        return func(*args, **(kwargs or {}))


class _Block(nn.Module):
    def __init__(self, expression: str) -> None:
        super().__init__()
        self.code = compile(expression, "<expression>", "eval")

    def forward(self, x, y, b):
        return eval(self.code)


@pytest.mark.parametrize("expression", EXPRESSIONS.strip().replace("\n", "; ").split("; "))
def test_names_agree(expression):
    block = _Block(expression)
    x, y = torch.rand(4, 4) + 0.5, torch.rand(4, 4) + 0.5
    with _Names() as names:
        block(x, y, x > 1)
    graph = fx.Tracer().trace(block)
    nodes = [node for node in graph.nodes if node.op in ("call_function", "call_method")]
    traced = [
        str(node.args[1]) if node.target is getattr else function_name(node.target)
        for node in nodes
    ]
    assert names.found[1:] == traced  # the first is the comparison that makes b
