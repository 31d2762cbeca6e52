"""Odd models: each is quantized as far as it can be, the rest stays float with a reason."""

from __future__ import annotations

import collections
import json
import types

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import qatkit
from qatkit import Plan, QatkitError, QuantConfig, Rule
from tests.graph.blocks import (
    Body,
    X,
    call,
    conv,
    conv_bn,
    leaves,
    prepared,
    quantizer_paths,
    same,
    skipped,
)


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x * 2)


class OwnLinear(nn.Linear):
    pass


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight, padding=1)


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return weight * 2


def parametrized():
    layer = conv()
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


QUANTIZED = {
    "subclass": lambda: OwnConv(8, 8, 3, padding=1),
    "parametrized": parametrized,
    "weight_norm": lambda: parametrizations.weight_norm(conv()),
    "subclass_of_linear": lambda: nn.Sequential(
        nn.Flatten(2), OwnLinear(144, 144), nn.Unflatten(2, (12, 12))
    ),
    "functional": Functional,
    "attention": lambda: nn.Sequential(nn.Flatten(2), Attention()),
}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(144, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0].unflatten(2, (12, 12))


@pytest.mark.parametrize("name", QUANTIZED)
def test_weights_outside_of_plain_layers_are_quantized(name, tmp_path):
    model = Body(QUANTIZED[name]())
    plan = qatkit.plan(model, X)
    assert not plan.skipped
    if "parametrized" not in name and name != "weight_norm":
        prepared(model, exact=name != "attention")
    twin = qatkit.prepare(model, X)
    qatkit.calibrate(twin, [X], progress=False)
    call(twin.train(), X)[0].sum().backward()
    report = qatkit.export_onnx(twin, X, tmp_path / "a.onnx")
    assert report.verify.ok
    graph = onnx.load(tmp_path / "a.onnx").graph
    made = {
        name for node in graph.node for name in node.output if node.op_type == "DequantizeLinear"
    }
    products = [n for n in graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    assert len(products) >= 3
    assert all(set(node.input[:2]) <= made for node in products)


def old_weight_norm():
    layer = conv()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer)
    return layer


def test_deprecated_weight_norm_keeps_a_computed_weight_and_is_copied_all_the_same():
    model = qatkit.prepare(Body(old_weight_norm()), X)
    assert not qatkit.plan(model, X).skipped
    call(model.train(), X)[0].sum().backward()


def test_deprecated_weight_norm_still_follows_its_parameters():
    model = Body(old_weight_norm()).eval()
    with torch.no_grad():
        model(X)
    qatkit.prepare(model, X)
    with qatkit.disable_quantization(model):
        (before,) = call(model, X)
        with torch.no_grad():
            model.block.weight_g.mul_(2)
        (after,) = call(model, X)
    assert not torch.equal(before, after)
    call(model.train(), X)[0].sum().backward()
    assert model.block.weight_g.grad is not None


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = conv_bn()

    def forward(self, x):
        return self.f(self.f(x) * 3)


def test_a_layer_called_twice_has_one_quantizer_and_no_fold():
    model = prepared(Body(CalledTwice()))
    plan = qatkit.plan(model, X)
    assert {layer.path: layer.batch_norm for layer in plan.layers}["block.f.0"] is None


class TwiceResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = conv_bn()

    def forward(self, x):
        return x + self.f(x)


class BlockTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.b = TwiceResidual()

    def forward(self, x):
        return self.b(self.b(x))


def test_a_block_called_twice_has_one_range_for_both_calls():
    model = prepared(Body(BlockTwice()))
    plan = qatkit.plan(model, X)
    assert [block.path for block in plan.blocks] == ["block.b"]
    calls = []
    model.block.b.f[0].input_quantizer.register_forward_hook(lambda *_: calls.append(1))
    call(model, X)
    assert len(calls) == 2


def test_a_block_registered_twice():
    block = TwiceResidual()
    prepared(nn.Sequential(conv(3), block, nn.ReLU(), block))


def test_one_layer_under_two_names():
    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = conv()
            self.g = self.f

        def forward(self, x):
            return self.g(self.f(x))

    prepared(Body(Alias()))


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    twin = prepared(model, torch.randn(4, 8))
    assert twin[2].weight is twin[0].weight
    qatkit.prepare(model, torch.randn(4, 8))
    assert model[2].weight is model[0].weight


@pytest.mark.parametrize("x", [torch.randn(4, 8), torch.randn(4, 5, 8), torch.randn(8)])
def test_a_single_linear_layer(x):
    model = nn.Sequential(nn.Linear(8, 4))
    assert quantizer_paths(prepared(model, x)) == {"0.input_quantizer"}


def test_the_model_itself_is_a_layer():
    layer = nn.Linear(8, 4)
    twin = qatkit.prepare(layer, torch.randn(2, 8))
    assert twin is layer
    assert quantizer_paths(twin) == {"input_quantizer"}
    call(twin.train(), torch.randn(2, 8))


class Kwargs(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = conv_bn()

    def forward(self, x, *, scale=1.0, mask=None, flags=()):
        y = x + self.f(x) * scale
        return y if mask is None else y * mask


class UsesKwargs(nn.Module):
    def __init__(self):
        super().__init__()
        self.b = Kwargs()

    def forward(self, x):
        return self.b(x=x, mask=x > 0, scale=0.5, flags=("a", 1))


def test_keyword_arguments():
    model = prepared(Body(UsesKwargs()))
    (plan,) = qatkit.plan(model, X).blocks
    assert plan.path == "block.b"


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = conv_bn()

    def forward(self, inputs):
        x = inputs["x"]
        return [x + self.f(x), {"skip": inputs["list"][0]}]


class UsesLists(nn.Module):
    def __init__(self):
        super().__init__()
        self.b = Lists()

    def forward(self, x):
        y, rest = self.b({"x": x, "list": [x * 2, None]})
        return y + rest["skip"]


def test_list_and_dict_arguments_and_results():
    model = prepared(Body(UsesLists()))
    assert "block.b" in {block.path for block in qatkit.plan(model, X).blocks}


class Output(collections.OrderedDict):
    """As of transformers: a dict whose items are attributes too."""

    def __getattr__(self, name):
        return self[name]


class ReturnsOutput(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.f = conv_bn()
        self.kind = kind

    def forward(self, x):
        return self.kind(out=x + self.f(x))


Named = collections.namedtuple("Named", "out")


class TakesOutput(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.b = ReturnsOutput(kind)

    def forward(self, x):
        out = self.b(x)
        assert type(out) is self.b.kind
        return out["out"] if isinstance(out, dict) else out.out


@pytest.mark.parametrize(
    ("kind", "rewritten"),
    [(dict, True), (Named, False), (collections.OrderedDict, True), (Output, False)],
)
def test_a_block_returns_the_same_class_as_before(kind, rewritten):
    model = prepared(Body(TakesOutput(kind)))
    assert ("block.b" in {block.path for block in qatkit.plan(model, X).blocks}) == rewritten


def test_another_form_of_arguments_is_refused_by_name():
    model = qatkit.prepare(Body(Kwargs()), X)
    qatkit.calibrate(model, [X], progress=False)
    x = torch.randn(2, 8, 12, 12)
    model.block(x)
    with pytest.raises(QatkitError, match="block: called with arguments of another form"):
        model.block(x, mask=x)


def test_model_inputs_as_dict_and_tuple():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3), conv(3)

        def forward(self, image, *, other=None, scale=1.0):
            y = self.a(image)
            return y if other is None else y + self.b(other) * scale

    prepared(Two(), (X,))
    prepared(Two(), {"image": X, "other": X * 2})
    assert "b" in skipped(qatkit.plan(Two(), (X,)))


class AuxHead(nn.Module):
    """As GoogLeNet: another head and another result in training."""

    def __init__(self):
        super().__init__()
        self.stem, self.aux, self.out = conv_bn(3), conv(), conv()

    def forward(self, x):
        x = torch.relu(self.stem(x))
        if self.training:
            return self.out(x), self.aux(x)
        return self.out(x)


def test_what_only_runs_in_training_stays_float():
    model = prepared(AuxHead())
    assert skipped(qatkit.plan(model, X))["aux"] == "example_inputs do not reach it in eval mode"


class TrainingBranch(nn.Module):
    """A residual block that does more in training cannot be rewritten, and still trains."""

    def __init__(self):
        super().__init__()
        self.f, self.g = conv_bn(), conv()

    def forward(self, x):
        y = x + self.f(x)
        return y + self.g(x) if self.training else y


def test_other_operations_in_training_than_in_eval():
    model = prepared(Body(TrainingBranch()))
    assert "in training than in eval" in skipped(qatkit.plan(model, X))["block.add_quantizer"]


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = conv_bn()

    def forward(self, x):
        return x + self.f(x) if x.mean() > -1e9 else x


class ReturnsOwnType(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = conv_bn()

    def forward(self, x):
        return {"out": x + self.f(x), "size": x.shape}["out"]


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = conv_bn()

    def forward(self, x):
        def inner(y):
            return y + self.f(y)

        return torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)


def test_data_dependent_block_stays_as_it_is():
    model = prepared(Body(DataDependent()))
    assert "cannot be rewritten" in skipped(qatkit.plan(model, X))["block.add_quantizer"]


def test_python_objects_in_a_forward():
    prepared(Body(ReturnsOwnType()))


def test_activation_checkpointing():
    from torch.utils import checkpoint  # noqa: F401

    prepared(Body(Checkpointed()))


def test_hooks_on_rewritten_blocks_and_layers_still_run():
    model = Body(TwiceResidual())
    seen = []
    model.block.register_forward_hook(lambda *_: seen.append("block"))
    model.block.register_forward_pre_hook(lambda *_: seen.append("pre"))
    model.block.f[0].register_forward_hook(lambda *_: seen.append("conv"))
    model.block.f[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    qatkit.prepare(model, X)
    seen.clear()
    model.train()(X).sum().backward()
    assert seen == ["pre", "conv", "block", "backward"]


def test_a_hook_that_changes_the_output_of_a_block():
    model = Body(TwiceResidual())
    model.block.register_forward_hook(lambda module, given, out: out * 2)
    model.block.register_forward_pre_hook(lambda module, given: (given[0] + 1,))
    prepared(model, pickles=False)


def test_forward_replaced_on_the_object():
    model = Body(TwiceResidual())
    model.block.forward = types.MethodType(lambda self, x: x + self.f(x), model.block)
    plan = qatkit.plan(model, X)
    assert "its forward was replaced on the object" in skipped(plan)["block.add_quantizer"]
    prepared(model, pickles=False)


def test_a_part_that_is_prepared_already_is_refused():
    model = Body(TwiceResidual())
    qatkit.prepare(model.block, torch.randn(2, 8, 12, 12))
    with pytest.raises(QatkitError, match="prepare the whole model once, not its parts"):
        qatkit.prepare(model, X)
    assert type(model.stem[0]) is nn.Conv2d


def test_transformer_encoder_layer_with_its_fast_path():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.Sequential(
        nn.Linear(16, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    )
    x = torch.randn(2, 6, 16)
    twin = qatkit.prepare(model, x)
    call(twin.train(), x)[0].sum().backward()
    call(twin.eval(), x)


def test_unet_with_transposed_convolutions_and_concat():
    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Sequential(conv_bn(3), nn.ReLU())
            self.deep = nn.Sequential(conv_bn(8, 16), nn.ReLU())
            self.up = nn.Sequential(nn.ConvTranspose2d(16, 8, 2, 2, bias=False), nn.BatchNorm2d(8))
            self.out = conv(16, 4)
            self.pool = nn.MaxPool2d(2)

        def forward(self, x):
            a = self.down(x)
            b = self.up(self.deep(self.pool(a)))
            return self.out(torch.cat((a, torch.relu(b)), 1))

    model = prepared(UNet())
    assert len(quantizer_paths(model)) == 4


def test_squeeze_and_excite():
    class Squeeze(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool, self.fc = nn.AdaptiveAvgPool2d(1), conv(8, 8, 1)
            self.out = conv()

        def forward(self, x):
            return self.out(x * torch.sigmoid(self.fc(self.pool(x))))

    model = prepared(Body(Squeeze()))
    assert "block.pool.input_quantizer" in quantizer_paths(model)


@pytest.mark.parametrize(("size", "quantized"), [(1, True), (5, True), (12, True), (24, False)])
def test_an_adaptive_pool_that_enlarges_copies(size, quantized):
    model = prepared(nn.Sequential(conv(3), nn.AdaptiveAvgPool2d(size), conv()))
    assert ("1.input_quantizer" in quantizer_paths(model)) == quantized


def test_no_tensor_in_a_module_call():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(1, 8, 12, 12))

        def forward(self, size):
            return self.table[..., : size[0], : size[1]]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.positions, self.g = conv(3), Positions(), conv()

        def forward(self, x):
            y = self.f(x) + self.positions(tuple(x.shape[2:]))
            return y + self.g(y)

    prepared(Net())


def test_outputs_that_are_inputs():
    class Through(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = conv(3)

        def forward(self, x):
            return x, self.f(x), x

    prepared(Through())


def test_plan_survives_json():
    model = Body(UsesLists())
    plan = qatkit.plan(model, X, QuantConfig(rules=(Rule("stem", enabled=False),)))
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert str(again) == str(plan)


def test_plan_is_deterministic():
    model = Body(UsesLists())
    assert qatkit.plan(model, X) == qatkit.plan(model, X)


@pytest.mark.parametrize("pattern", ["fc", "conv", "0", "block.f.1.weight"])
def test_a_rule_that_matches_nothing(pattern):
    with pytest.raises(QatkitError, match=f"Rule\\('{pattern}'\\)"):
        qatkit.plan(Body(TwiceResidual()), X, QuantConfig(rules=(Rule(pattern, num_bits=4),)))


def test_rules_reach_adds_and_single_quantizers():
    off = QuantConfig(rules=(Rule("block.add_quantizer", enabled=False),))
    model = Body(ManyJoins())
    before = quantizer_paths(prepared(model))
    assert before - quantizer_paths(prepared(model, config=off)) == {"block.add_quantizer"}


class ManyJoins(nn.Module):
    def __init__(self):
        super().__init__()
        self.deep, self.down = nn.Sequential(conv_bn(), nn.ReLU(), conv_bn()), conv_bn(8, 8, 1)

    def forward(self, x):
        return self.deep(x) + self.down(x)


def test_a_disabled_layer_is_no_branch_that_fuses():
    config = QuantConfig(rules=(Rule("block.f", enabled=False),))
    model = prepared(Body(TwiceResidual()), config=config)
    assert quantizer_paths(model) == {"stem.0.input_quantizer", "head.1.input_quantizer"}


def test_disabling_everything_is_an_error():
    with pytest.raises(QatkitError, match="nothing to quantize"):
        qatkit.plan(Body(TwiceResidual()), X, QuantConfig(rules=(Rule("*", enabled=False),)))


def test_empty_and_batchless_inputs():
    model = nn.Sequential(conv(3), nn.ReLU(), conv())
    prepared(model, torch.randn(3, 12, 12))
    empty = qatkit.prepare(nn.Sequential(conv(3), nn.ReLU()), torch.randn(0, 3, 12, 12))
    assert same(leaves(empty(torch.zeros(0, 3, 12, 12))), [torch.zeros(0, 8, 12, 12)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    prepared(Body(TwiceResidual()).to(dtype), X.to(dtype))
