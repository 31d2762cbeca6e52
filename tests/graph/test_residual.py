"""F6: one operand of a residual addition is quantized, chosen by what produced it."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn

import qatkit
from qatkit.modes import quantizers
from tests.graph.blocks import Body, X, conv, conv_bn, prepared, quantizer_paths, skipped


class Inplace(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = conv_bn()

    def forward(self, x):
        identity = x
        out = self.f(x)
        out += identity
        return out


class Right(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = conv_bn()

    def forward(self, x):
        return x + self.f(x)


class Left(Right):
    def forward(self, x):
        return self.f(x) + x


class Rebound(Right):
    def forward(self, x):
        x = x + self.f(x)
        return x  # noqa: RET504


class TorchAdd(Right):
    def forward(self, x):
        return torch.add(x, self.f(x))


class Method(Right):
    def forward(self, x):
        return self.f(x).add(x)


class InplaceMethod(Right):
    def forward(self, x):
        return self.f(x).add_(x)


class Operator(Right):
    def forward(self, x):
        return operator.add(x, self.f(x))


class WithDropout(Right):
    def forward(self, x):
        return x + nn.functional.dropout(self.f(x), 0.5, self.training)


PLAIN = [
    Inplace,
    Right,
    Left,
    Rebound,
    TorchAdd,
    Method,
    InplaceMethod,
    Operator,
    WithDropout,
]


@pytest.mark.parametrize("block", PLAIN)
def test_skip_shares_the_quantizer_of_the_block_input(block):
    model = prepared(Body(block()))
    expected = {"stem.0.input_quantizer", "head.1.input_quantizer", "block.f.0.input_quantizer"}
    assert quantizer_paths(model) == expected
    (plan,) = qatkit.plan(model, X).blocks
    assert plan.path == "block"
    (site,) = plan.sites
    assert len(site.uses) == 2
    assert model.block.f[0].input_is_quantized


class TwoBranches(nn.Module):
    def __init__(self, *, deep_first):
        super().__init__()
        self.deep = nn.Sequential(conv_bn(), nn.ReLU(), conv_bn())
        self.down = conv_bn(8, 8, 1)
        self.deep_first = deep_first

    def forward(self, x):
        if self.deep_first:
            return self.deep(x) + self.down(x)
        return self.down(x) + self.deep(x)


class DownInplace(TwoBranches):
    def forward(self, x):
        out = self.deep(x)
        out += self.down(x)
        return out


class DownBefore(TwoBranches):
    def forward(self, x):
        identity = self.down(x)
        out = self.deep(x)
        out += identity
        return out


@pytest.mark.parametrize("kind", [TwoBranches, DownInplace, DownBefore])
@pytest.mark.parametrize("deep_first", [True, False])
def test_of_two_convolution_branches_the_shallower_is_quantized(kind, deep_first):
    model = prepared(Body(kind(deep_first=deep_first)))
    (name,) = [path for path in quantizer_paths(model) if path.startswith("block.add")]
    ranges = dict(quantizers(model))
    seen = []
    ranges[name].register_forward_hook(lambda module, given, out: seen.append(given[0]))
    down = []
    model.block.down.register_forward_hook(lambda module, given, out: down.append(out))
    model(X)
    assert torch.equal(seen[0], down[0])
    assert model.block.deep[0][0].input_quantizer is model.block.down[0].input_quantizer


class EndsInActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(conv_bn(), nn.ReLU())

    def forward(self, x):
        return x + self.f(x)


def test_a_branch_that_ends_in_an_activation_cannot_fuse():
    model = prepared(Body(EndsInActivation()))
    assert not [path for path in quantizer_paths(model) if "add" in path]
    assert (
        "no operand comes straight from a quantized layer"
        in skipped(qatkit.plan(model, X))["block.add"]
    )


class InplaceOnQuantized(TwoBranches):
    """The quantized operand is the one that is written to."""

    def forward(self, x):
        identity = self.down(x)
        identity += self.deep(x)
        return identity


class InplaceAlias(nn.Module):
    """A second name sees what is written in place: the quantizer's copy would not."""

    def __init__(self):
        super().__init__()
        self.f = conv_bn()

    def forward(self, x):
        x = x * 2
        alias = x
        x += self.f(alias * 1)
        return x * alias


def test_writing_in_place_into_the_quantized_operand():
    model = prepared(Body(InplaceOnQuantized(deep_first=True)))
    model.train()(X).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_an_alias_of_what_is_written_in_place_keeps_seeing_it():
    """The second output is the first one's, with quantization too."""
    model = prepared(Body(InplaceAlias())).eval()
    seen = []
    model.head[0].register_forward_hook(lambda module, given, out: seen.append(given[0]))
    model(X)
    x = model.stem(X) * 2
    q = dict(quantizers(model)).get("block.add_quantizer", nn.Identity())
    expected = (q(x) + model.block.f(x)) ** 2
    torch.testing.assert_close(seen[0], expected)


class ThreeWay(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv_bn(), conv_bn(8, 8, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.a(x) + self.b(x) + self.norm(x)


def test_three_way_add_of_repvgg_has_one_quantized_operand_each():
    plan = qatkit.plan(Body(ThreeWay()), X)
    prepared(Body(ThreeWay()))
    adds = [entry for entry in plan.quantizers if entry.path.startswith("block.add")]
    assert len(adds) + sum(path.startswith("block.add") for path in skipped(plan)) == 2


class Constants(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = conv()
        self.shift = nn.Parameter(torch.randn(1, 8, 12, 12))
        self.register_buffer("table", torch.randn(2, 8, 12, 12))

    def forward(self, x):
        return self.f(x) + self.shift + 1.0 + self.table + torch.ones_like(self.table)


def test_adding_constants_is_no_join():
    model = prepared(Body(Constants()))
    assert not [path for path in quantizer_paths(model) if "add" in path]
    assert not [path for path in skipped(qatkit.plan(model, X)) if path == "block.add"]


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = conv()
        self.gamma = nn.Parameter(torch.full((8, 1, 1), 0.1))

    def forward(self, x):
        return x + self.gamma * self.f(x)


def test_layer_scale_fuses_with_the_convolution():
    model = prepared(Body(LayerScale()))
    (plan,) = qatkit.plan(model, X).blocks
    assert len(plan.sites[0].uses) == 2


class Twice(nn.Module):
    """x + x: both operands are one tensor, no join."""

    def __init__(self):
        super().__init__()
        self.f = conv()

    def forward(self, x):
        x = self.f(x)
        return x + x


def test_adding_a_tensor_to_itself():
    prepared(Body(Twice()))


class Broadcast(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = conv()
        self.gate = conv(8, 8, 1)

    def forward(self, x):
        return self.f(x) + self.gate(x.mean((2, 3), keepdim=True))


def test_broadcast_add_is_no_join():
    model = prepared(Body(Broadcast()))
    assert not [path for path in quantizer_paths(model) if "add_quantizer" in path]


class Alpha(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = conv()

    def forward(self, x):
        return torch.add(x, self.f(x), alpha=2)


def test_add_with_alpha_still_computes_the_same():
    prepared(Body(Alpha()))


class ManyUses(nn.Module):
    """The skip is also read by a function that must stay float."""

    def __init__(self):
        super().__init__()
        self.f = conv_bn()

    def forward(self, x):
        return (x + self.f(x)) * torch.sigmoid(x)


def test_other_readers_of_the_skip_stay_float():
    model = prepared(Body(ManyUses()))
    (plan,) = qatkit.plan(model, X).blocks
    assert len(plan.sites[0].uses) == 2


class PreActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.f = conv()

    def forward(self, x):
        return x + self.f(self.relu(self.bn(x)))


def test_pre_activation_block_quantizes_the_skip_by_itself():
    model = prepared(Body(PreActivation()))
    assert "block.add_quantizer" in quantizer_paths(model)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Right()
        self.outer = conv_bn()

    def forward(self, x):
        return x + self.outer(self.inner(x))


def test_nested_residuals_share_one_quantizer():
    model = prepared(Body(Nested()))
    (plan,) = qatkit.plan(model, X).blocks
    assert [site.quantizer for site in plan.sites] == ["inner.f.0.input_quantizer"]
    assert len(plan.sites[0].uses) == 2
    assert model.block.inner.f[0].input_is_quantized


def test_mlp_residual_is_a_transformer_join():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(16)
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x):
            return x + self.down(torch.relu(self.up(self.norm(x))))

    model = nn.Sequential(nn.Linear(16, 16), Mlp(), Mlp())
    x = torch.randn(2, 5, 16)
    plan = qatkit.plan(model, x)
    prepared(model, x)
    reasons = [entry.reason for entry in plan.quantizers if entry.path.endswith("add_quantizer")]
    assert reasons == ["F6c: skip of a transformer residual"] * 2


class InplaceAliasIntoModule(InplaceAlias):
    def forward(self, x):
        x = x * 2
        alias = x
        x += self.f(alias * 1)
        return self.f[1](alias)


def test_an_alias_that_a_module_reads():
    model = prepared(Body(InplaceAliasIntoModule()))
    assert qatkit.plan(model, X).blocks == ()


class Flow(nn.Module):
    """Adds what a convolution says to pixel coordinates, as optical flow does."""

    def __init__(self, near):
        super().__init__()
        self.f, self.g, self.near = conv(), conv(), near
        self.register_buffer("grid", torch.arange(12.0).expand(12, 12))

    def forward(self, x):
        coordinates = (x.mean(1, keepdim=True) + self.grid).expand(-1, 8, -1, -1).sin().floor()
        moved = coordinates + self.f(x)
        return self.g(moved.relu() / 12.0) if self.near else moved - self.grid


@pytest.mark.parametrize("near", [True, False])
def test_a_sum_far_from_int8_stays_float(near):
    plan = qatkit.plan(Flow(near), torch.randn(1, 8, 12, 12))
    added = "add_1_quantizer" in {entry.path for entry in plan.quantizers}
    assert added == near
    if not near:
        assert "get to an INT8 operator" in skipped(plan)["add_1"]
