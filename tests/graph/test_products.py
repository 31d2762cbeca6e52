"""Matrix products and attention in the forward of a block get quantized factors."""

from __future__ import annotations

import json

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qatkit
from qatkit import Plan, QuantConfig, Rule
from qatkit.nn.einsum import Einsum
from tests.graph.blocks import prepared, skipped

TOKENS = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """Four heads on (N, L, 16), the product written in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.qkv, self.proj, self.way = nn.Linear(16, 48), nn.Linear(16, 16), way

    def forward(self, x):
        n, length, size = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, 4, size // 4).permute(2, 0, 3, 1, 4).unbind(0)
        if self.way == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.way == "matmul":
            y = torch.softmax(q @ k.transpose(-2, -1) * 0.5, -1) @ v
        elif self.way == "einsum":
            scores = torch.einsum("nhic,nhjc->nhij", q, k) * 0.5
            y = torch.einsum("nhij,nhjc->nhic", scores.softmax(-1), v)
        else:
            q, k, v = (each.reshape(-1, length, size // 4) for each in (q, k, v))
            zero = torch.zeros(1, device=x.device)
            scores = torch.baddbmm(zero, q, k.transpose(1, 2), beta=0, alpha=0.5)
            y = torch.bmm(scores.softmax(-1), v).reshape(n, 4, length, size // 4)
        return x + self.proj(y.transpose(1, 2).reshape(n, length, size))


class Weights(nn.Module):
    """Products with parameters of the block, plain, transposed, computed and shared."""

    def __init__(self) -> None:
        super().__init__()
        self.right = nn.Parameter(torch.randn(16, 24) / 4)
        self.left = nn.Parameter(torch.randn(16, 24) / 4)
        self.bias = nn.Parameter(torch.randn(16))

    def forward(self, x):
        y = F.relu(x @ self.right)
        y = F.linear(y, self.left, self.bias)
        y = y @ F.normalize(self.right, dim=0)
        return y @ self.left.t()


def exported(model, x, path, **options):
    qatkit.calibrate(model, [x], progress=False)
    report = qatkit.export_onnx(model, x, path, **options)
    assert report.verify.ok, report
    assert not [finding for finding in report.findings if finding.level == "ERROR"]
    return onnx.load(path).graph


def products(graph):
    """Return how many factors of each product are dequantized."""
    made = {out for node in graph.node for out in node.output if node.op_type == "DequantizeLinear"}
    kinds = ("MatMul", "Gemm", "Conv", "Einsum")
    return [
        sum(name in made for name in node.input[:2]) for node in graph.node if node.op_type in kinds
    ]


@pytest.mark.parametrize("weights", ["float", "int8"])
@pytest.mark.parametrize("way", ["sdpa", "matmul", "einsum", "bmm"])
def test_attention(way, weights, tmp_path):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 16), Attention(way), Attention(way), nn.Linear(16, 4))
    prepared(model, TOKENS, exact=way not in ("sdpa", "einsum"))
    plan = qatkit.plan(model, TOKENS)
    assert not plan.skipped
    assert plan.groups == ()  # q, k and v are parts of one tensor with ranges of their own
    model = qatkit.prepare(model.eval(), TOKENS)
    graph = exported(model, TOKENS, tmp_path / "a.onnx", weights=weights)
    assert products(graph) == [2] * 10
    softmax = {name for node in graph.node if node.op_type == "Softmax" for name in node.input}
    made = {out for node in graph.node for out in node.output if node.op_type == "DequantizeLinear"}
    assert not softmax & made
    assert not [node for node in graph.node if node.op_type == "Einsum"]


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_weights_of_a_block(weights, tmp_path):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 16), Weights(), nn.Linear(16, 4))
    prepared(model, TOKENS)
    model = qatkit.prepare(model.eval(), TOKENS)
    roles = {entry.path: entry for entry in qatkit.plan(model, TOKENS).quantizers}
    assert roles["1.right_quantizer"].spec.axis == 1
    assert roles["1.left_quantizer"].spec.axis == 0
    qatkit.calibrate(model, [TOKENS], progress=False)
    with torch.no_grad():
        model[1].right *= 3  # the range of a weight is that of the weight at hand
    assert products(exported(model, TOKENS, tmp_path / "a.onnx", weights=weights)) == [2] * 6
    model.train()(TOKENS).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bhic,bhjc->bhij", ((2, 3, 4, 5), (2, 3, 6, 5))),
        ("bhij,bhjd->bhid", ((2, 3, 4, 5), (2, 3, 5, 6))),
        ("byhwc,hkc->byhwk", ((2, 3, 4, 5, 6), (4, 7, 6))),
        ("bqhd, bkhd -> bhqk", ((2, 5, 3, 4), (2, 6, 3, 4))),
        ("hkc,byhwc->byhwk", ((4, 7, 6), (2, 3, 4, 5, 6))),
        ("i,j->ij", ((3,), (4,))),
        ("bij,bij->b", ((2, 3, 4), (2, 3, 4))),
        ("...ij,...jk->...ik", ((2, 3, 4), (2, 4, 5))),
    ],
)
def test_einsum_is_what_it_was(equation, shapes):
    layer = Einsum()
    for name in layer.operands[0]:
        layer.add_module(name, nn.Identity())
    factors = [torch.randn(shape) for shape in shapes]
    expected = torch.einsum(equation, *factors)
    torch.testing.assert_close(layer(equation, *factors), expected)
    torch.testing.assert_close(layer(equation, factors), expected)


def test_a_rule_leaves_both_factors_in_float(tmp_path):
    config = QuantConfig(rules=(Rule("*.scaled_dot_product_attention", enabled=False),))
    model = nn.Sequential(nn.Linear(16, 16), Attention("sdpa"), nn.Linear(16, 4)).eval()
    qatkit.prepare(model, TOKENS, config)
    plan = qatkit.plan(model, TOKENS)
    path = "1.scaled_dot_product_attention"
    off = {
        f"{path}.{name}": "disabled by a rule" for name in ("q_bmm_quantizer", "softmax_quantizer")
    }
    assert skipped(plan) == off
    assert sorted(products(exported(model, TOKENS, tmp_path / "a.onnx"))) == [0, 0, 2, 2, 2, 2]
    config = QuantConfig(rules=(Rule("*.matmul_input_0_quantizer", enabled=False),))
    model = nn.Sequential(nn.Linear(16, 16), Attention("matmul"), nn.Linear(16, 4)).eval()
    qatkit.prepare(model, TOKENS, config)
    assert sorted(products(exported(model, TOKENS, tmp_path / "a.onnx"))) == [0, 2, 2, 2, 2, 2]
    config = QuantConfig(rules=(Rule("1.matmul", enabled=False),))
    assert "1.matmul" in skipped(
        qatkit.plan(nn.Sequential(nn.ReLU(), Attention("matmul")), TOKENS, config)
    )


@pytest.mark.parametrize(
    ("path", "floats"),
    [
        ("1.scaled_dot_product_attention.v_bmm_quantizer", 1),
        ("1.scaled_dot_product_attention.k_bmm_quantizer", 1),
        ("2.out_proj.input_quantizer", 1),
        ("2.out_proj", 1),
        ("2.in_proj_weight_quantizer", 6),
        ("2.k_bmm_quantizer", 1),
        ("2", 6),
    ],
)
def test_a_rule_can_name_any_quantizer(path, floats, tmp_path):
    model = nn.Sequential(nn.Linear(16, 16), Attention("sdpa"), nn.Identity(), nn.Linear(16, 4))
    model[2] = SelfAttention()
    config = QuantConfig(rules=(Rule(path.replace("2", "2.layer", 1), enabled=False),))
    qatkit.prepare(model.eval(), TOKENS, config)
    counts = products(exported(model, TOKENS, tmp_path / "a.onnx"))
    model.train()(TOKENS).sum().backward()
    assert counts.count(0) == floats or path in ("2", "2.in_proj_weight_quantizer")
    assert set(counts) == {0, 2}


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.layer(x, x, x, need_weights=False)[0]


def test_a_plan_with_modules_for_functions_survives_json():
    model = nn.Sequential(nn.Linear(16, 16), Attention("sdpa"), nn.Linear(16, 4))
    plan = qatkit.plan(model, TOKENS)
    assert plan.blocks[0].replacements
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize("way", ["sdpa", "matmul", "einsum"])
def test_a_saved_model_loads(way, tmp_path):
    def build():
        return nn.Sequential(nn.Linear(16, 16), Attention(way), nn.Linear(16, 4)).eval()

    model = qatkit.prepare(build(), TOKENS)
    qatkit.calibrate(model, [TOKENS], progress=False)
    qatkit.save(model, tmp_path / "a.safetensors")
    again = qatkit.load(build(), tmp_path / "a.safetensors")
    assert torch.equal(again(TOKENS), model(TOKENS))


class Unpacks(nn.Module):
    """Queries, keys and values by iterating over a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        n, length, size = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, 4, size // 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(y.transpose(1, 2).reshape(n, length, size))


def test_a_tensor_that_is_unpacked(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16), Unpacks(), nn.Linear(16, 4)).eval()
    assert not qatkit.plan(model, TOKENS).skipped
    qatkit.prepare(model, TOKENS)
    assert products(exported(model, TOKENS, tmp_path / "a.onnx")) == [2] * 6


class Gate(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        scale = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.two(F.relu(self.one(scale))))


def test_both_inputs_of_a_gate(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), Gate(), nn.Conv2d(8, 4, 1)).eval()
    prepared(model, x)
    qatkit.prepare(model, x)
    graph = exported(model, x, tmp_path / "a.onnx")
    made = {out for node in graph.node for out in node.output if node.op_type == "DequantizeLinear"}
    gates = [node for node in graph.node if node.op_type == "Mul" and set(node.input) <= made]
    assert len(gates) == 1
    alone = nn.Sequential(nn.Conv2d(3, 8, 3), Gate())
    assert "without a quantized layer" in skipped(qatkit.plan(alone, x))["1.mul"]


class Pyramid(nn.Module):
    """A feature pyramid: it iterates over what its child returns."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.lateral = Levels(), nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2))

    def forward(self, x):
        features = [conv(v) for conv, v in zip(self.lateral, self.body(x).values(), strict=True)]
        top = F.interpolate(features[1], size=features[0].shape[-2:])
        return features[0] + top, features[1]


class Levels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)

    def forward(self, x):
        y = self.one(x)
        return {"fine": y, "coarse": self.two(y)}


class Top(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fpn, self.head = Pyramid(), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return [self.head(level) for level in self.fpn(x)]


def test_a_pyramid_and_a_shared_head(tmp_path):
    x = torch.randn(2, 3, 12, 12)
    model = prepared(Top(), x)
    plan = qatkit.plan(model, x)
    assert "fpn.add_quantizer" in {entry.path for entry in plan.quantizers}
    assert [entry.path for entry in plan.quantizers if entry.path.startswith("head")] == [
        "head.input_quantizer",
        "head.weight_quantizer",
    ]
    exported(model.eval(), x, tmp_path / "a.onnx")


def test_a_child_that_returns_another_form_is_named():
    x = torch.randn(2, 3, 12, 12)
    model = qatkit.prepare(Top().eval(), x)
    qatkit.calibrate(model, [x], progress=False)
    model.fpn.body.forward = lambda x: {"fine": x}
    with pytest.raises(qatkit.QatkitError, match="another form than on example_inputs"):
        model(x)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x, mask=None):
        return self.encoder(x, src_key_padding_mask=mask)


def test_a_mask_that_the_example_did_not_have():
    model = qatkit.prepare(Masked().eval(), TOKENS)
    assert not qatkit.plan(model, TOKENS).skipped
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 4:] = True
    qatkit.calibrate(model, [TOKENS], progress=False)
    with torch.no_grad(), qatkit.disable_quantization(model):
        torch.testing.assert_close(model(TOKENS, mask)[0], model(TOKENS)[0])
        assert not torch.allclose(model(TOKENS, mask)[1], model(TOKENS)[1])


class Sized(nn.Module):
    """A block that is told the size of the image, as in PVT and SegFormer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Linear(16, 16)

    def forward(self, x, height, width):
        n, _, size = x.shape
        image = x.transpose(1, 2).reshape(n, size, height, width)
        return x + self.fc(self.conv(image).flatten(2).transpose(1, 2))


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 16, 4, 4), Sized()

    def forward(self, x):
        x = self.stem(x)
        return self.block(x.flatten(2).transpose(1, 2), *x.shape[-2:])


def test_sizes_among_the_arguments_stay_open(tmp_path):
    x, wide = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 32)
    floats = Patches().eval()
    expected = floats(wide)
    model = prepared(floats, x)
    assert qatkit.plan(model, x).blocks[0].numbers
    with qatkit.disable_quantization(model.eval()):
        torch.testing.assert_close(model(wide), expected)
    exported(model, wide, tmp_path / "a.onnx")


@pytest.mark.parametrize(("policy", "count"), [(None, 1), ("skip", 1), ("both", 2), ("none", 0)])
def test_the_residual_policy_is_a_switch(policy, count, tmp_path):
    model = nn.Sequential(nn.Linear(16, 16), Attention("matmul"), nn.Linear(16, 4)).eval()
    qatkit.prepare(model, TOKENS, QuantConfig(transformer_residual=policy))
    graph = exported(model, TOKENS, tmp_path / "a.onnx")
    made = {out for node in graph.node for out in node.output if node.op_type == "DequantizeLinear"}
    constants = {tensor.name for tensor in graph.initializer}
    adds = [node.input for node in graph.node if node.op_type == "Add"]
    (join,) = [inputs for inputs in adds if not set(inputs) & constants]
    assert len(set(join) & made) == count


def test_einsum_by_lists_of_axes():
    class Sublists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x):
            y = self.fc(x)
            return torch.einsum(y, [0, 1, 2], x, [0, 3, 2], [0, 1, 3])

    prepared(Sublists(), TOKENS, exact=False)


class Clashes(nn.Module):
    """Has a child of the name of the function."""

    def __init__(self) -> None:
        super().__init__()
        self.einsum = nn.Linear(16, 16)

    def forward(self, x):
        return torch.einsum("nlc,nmc->nlm", self.einsum(x), x)


class Walks(nn.Sequential):
    """Walks over its children, then attends."""

    def forward(self, x):
        for child in self:
            x = child(x)
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("build", [Clashes, lambda: Walks(nn.Linear(16, 16), nn.ReLU())])
def test_blocks_keep_their_children(build):
    model = nn.Sequential(nn.Linear(16, 16), build())
    keys = list(model.state_dict())
    twin = prepared(model, TOKENS, exact=False)
    assert set(keys) <= set(twin.state_dict())
    assert not qatkit.plan(model, TOKENS).skipped


class Drops(nn.Module):
    """Reads the mode of a child and the settings in a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.drop, self.factors = nn.Linear(16, 16), nn.Dropout(0.5), [1.0, 2.0]

    def forward(self, x):
        y = F.dropout(self.one(x), self.drop.p, self.drop.training)
        return x + y * self.factors[0]


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_of_a_child_and_settings_in_containers_are_followed(training):
    model = nn.Sequential(nn.Linear(16, 16), Drops(), nn.Linear(16, 4)).train(training)
    qatkit.prepare(model, TOKENS)
    assert {module.training for module in model.modules()} == {training}
    assert [block.path for block in qatkit.plan(model, TOKENS).blocks] == ["1"]
    qatkit.disable_quantization(model).apply()
    model.eval()
    assert torch.equal(model(TOKENS), model(TOKENS))
    model.train()
    assert not torch.equal(model(TOKENS), model(TOKENS))
    model.eval()
    before = model(TOKENS)
    model[1].factors[0] = 5.0
    assert not torch.allclose(model(TOKENS), before)


def test_frozen_ranges_follow_a_computed_weight():
    model = nn.Sequential(nn.Linear(16, 16), Weights(), nn.Linear(16, 4)).eval()
    qatkit.prepare(model, TOKENS)
    qatkit.calibrate(model, [TOKENS], progress=False)
    with torch.no_grad():
        model[1].left *= 10
    qatkit.freeze_ranges(model).apply()
    found = model[1](model[0](TOKENS))
    with qatkit.disable_quantization(model):
        expected = model[1](model[0](TOKENS))
    with qatkit.disable_quantization(model, "*_input_0_quantizer"):
        found = model[1](model[0](TOKENS))
    assert (found - expected).norm() < 0.1 * expected.norm()
    assert sum(entry.role == "weight" for entry in qatkit.summary(model).quantizers) == 6


class Shaped(nn.Module):
    """Hands the sizes that it computes to a block, as MViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.last = nn.Conv2d(3, 16, 4, 4), Sized(), Sized()

    def forward(self, x):
        x = self.stem(x)
        tokens, (height, width) = x.flatten(2).transpose(1, 2), x.shape[-2:]
        return self.last(self.block(tokens, height, width), height, width)


def test_sizes_that_the_exporter_makes_tensors_of(tmp_path):
    x = torch.randn(2, 3, 16, 16)
    model = qatkit.prepare(Shaped().eval(), x)
    graph = exported(model, x, tmp_path / "a.onnx")
    assert not [node for node in graph.node if node.op_type == "If"]
