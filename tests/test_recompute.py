"""Gradient checkpointing: a forward that runs twice gives what it gives when it runs once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import qatkit
from qatkit.modes import quantizers
from qatkit.recompute import FORWARDS, UsedRanges, is_recomputing, may_be_recomputed


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.b(torch.relu(self.a(x))))


class Net(nn.Module):
    """Its blocks are checkpointed: reentrant (True), not (False), or left alone (None)."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def build(reentrant: bool | None, **fields: Any) -> Net:
    torch.manual_seed(0)
    net = Net(reentrant)
    config = qatkit.QuantConfig(activation=qatkit.QuantSpec(**fields))
    for block in net.blocks:
        qatkit.prepare(block, torch.zeros(1, 4, 6, 6), config)
    return net.train()


def trained(net: Net, forwards: int) -> tuple[list[Tensor | None], list[Tensor]]:
    """Return the gradients of the second step, each of several forwards, and all buffers."""
    torch.manual_seed(1)
    for step in range(2):
        net.zero_grad()
        losses = []
        for number in range(forwards):
            x = torch.randn(2, 4, 6, 6) * (1 + 3 * step + number)
            losses.append(net(x.requires_grad_()).square().mean())
        torch.stack(losses).sum().backward()
    return [parameter.grad for parameter in net.parameters()], list(net.buffers())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("memory", ["running", "batch", "latest"])
@pytest.mark.parametrize("forwards", [1, 3])
def test_a_checkpointed_block_trains_as_any_other(
    reentrant: bool, memory: str, forwards: int
) -> None:
    plain, again = build(None, memory=memory), build(reentrant, memory=memory)
    wanted, found = trained(plain, forwards), trained(again, forwards)
    for one, other in zip((*wanted[0], *wanted[1]), (*found[0], *found[1]), strict=True):
        assert isinstance(one, Tensor)
        assert isinstance(other, Tensor)
        assert torch.equal(one, other)
    counts = [q.num_batches for path, q in quantizers(again) if path.endswith("input_quantizer")]
    assert [int(count) for count in counts] == [2 * forwards] * 4


def test_a_checkpointed_sequence_and_a_prepared_root() -> None:
    x = torch.randn(3, 4)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    qatkit.prepare(net, x)
    whole, parts = copy.deepcopy(net), copy.deepcopy(net)
    for run in (
        lambda: net(x),
        lambda: checkpoint(whole, x, use_reentrant=False),
        lambda: checkpoint_sequential(parts, 2, x, use_reentrant=False),
    ):
        for _ in range(2):
            run().square().sum().backward()
    for other in (whole, parts):
        for one, another in zip(net.parameters(), other.parameters(), strict=True):
            assert one.grad is not None
            assert torch.equal(one.grad, another.grad)
        for one, another in zip(net.buffers(), other.buffers(), strict=True):
            assert torch.equal(one, another)


def test_copies_go_on_where_ranges_are_remembered() -> None:
    net = build(False)
    trained(net, 1)
    twin = copy.deepcopy(net)
    for one, other in zip(trained(net, 1)[1], trained(twin, 1)[1], strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_a_compiled_checkpoint_with_frozen_ranges() -> None:
    # With moving ones PyTorch recomputes from the buffers as they are at the backward.
    net = build(False)
    with torch.no_grad():
        net(torch.randn(2, 4, 6, 6))  # ranges
    qatkit.freeze_ranges(net).apply()
    plain = copy.deepcopy(net)
    plain.reentrant = None
    compiled: Any = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 6, 6)
    for model in (compiled, plain):
        model(x).square().mean().backward()
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    for one, other in zip(net.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_where_a_forward_is() -> None:
    seen: list[tuple[bool, bool]] = []

    def note(x: Tensor) -> Tensor:
        seen.append((is_recomputing(), may_be_recomputed()))
        return x * x

    x = torch.ones(2, requires_grad=True)
    note(x)
    for reentrant in (True, False):
        checkpoint(note, x, use_reentrant=reentrant).sum().backward()
    again = [recomputing for recomputing, _ in seen]
    assert again == [False, False, True, False, True]
    assert [may for recomputing, may in seen if not recomputing] == [False, True, True]


def test_only_the_latest_ranges_are_kept() -> None:
    used, ends = UsedRanges(), [torch.tensor(float(n)) for n in range(FORWARDS + 2)]
    assert used.find((ends[0], ends[1])) is None
    for end in ends:
        used.add((-end, end), (-2 * end, 2 * end))
    assert used.find((-ends[3], ends[3])) == (-6, 6)
    newest = used.find((torch.tensor(-99.0), torch.tensor(99.0)))
    assert newest == (-2 * ends[-1], 2 * ends[-1])
    assert used.find((-ends[0], ends[0])) == newest
