"""Both front ends must write the same graph, and a failing one must leave nothing behind."""

from __future__ import annotations

import collections
import contextlib
import logging
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import torchvision
from onnx import helper, numpy_helper
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

import qatkit
from qatkit import QatkitError
from tests.export.canonical import Canonical, explain


class Residual(nn.Module):
    """Two residual adds, one with a downsampling branch."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)
        )
        self.down = nn.Sequential(nn.Conv2d(8, 8, 1, 2), nn.BatchNorm2d(8))
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(x + self.deep(x))
        x = F.relu(self.pool(self.deep(x)) + self.down(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Joined(nn.Module):
    """Concatenation of branches, one of them shuffled, upsampled in the end."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1, groups=1)
        self.c, self.norm = nn.Conv2d(8, 6, 1), nn.GroupNorm(2, 6)

    def forward(self, x):
        y = torch.cat([F.silu(self.a(x)), F.hardswish(self.b(x))], 1)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        one, two, three = F.mish(self.norm(self.c(y))).chunk(3, 1)
        y = F.pad(one * two + three, (1, 0, 0, 1))
        return F.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=False)


def resnet():
    return torchvision.models.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5
    )


def mobilenet_v2():
    blocks = [[1, 8, 1, 1], [6, 16, 2, 2]]
    return torchvision.models.MobileNetV2(5, 0.5, inverted_residual_setting=blocks)


def mobilenet_v3():
    Block = torchvision.models.mobilenetv3.InvertedResidualConfig
    blocks = [Block(16, 3, 16, 16, True, "HS", 1, 1, 1), Block(16, 5, 32, 24, True, "RE", 2, 1, 1)]
    return torchvision.models.MobileNetV3(blocks, 32, num_classes=5)


def vit():
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32
    )
    nn.init.normal_(model.heads.head.weight)
    return model


NETS = {f.__name__: f for f in (Residual, Joined, resnet, mobilenet_v2, mobilenet_v3, vit)}
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def ready(model, x=X):
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm):
            with torch.no_grad():
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.uniform_(-0.5, 0.5)
    qatkit.prepare(model.eval(), x)
    qatkit.calibrate(model, [x], progress=False)
    return model


def run(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})


def signature(proto):
    return [
        (
            value.name,
            value.type.tensor_type.elem_type,
            value.type.tensor_type.shape.dim[0].dim_param,
        )
        for value in (*proto.graph.input, *proto.graph.output)
    ]


@pytest.mark.parametrize("name", NETS)
def test_same_graph(tmp_path, name):
    model = ready(NETS[name]())
    graphs, findings, outputs, protos = [], [], [], []
    for front_end in ("legacy", "dynamo"):
        path = tmp_path / f"{front_end}.onnx"
        report = qatkit.export_onnx(model, X, path, front_end=front_end)
        assert report.front_end == front_end
        assert report.verify.ok, str(report)
        protos.append(onnx.load(path))
        onnx.checker.check_model(protos[-1], full_check=True)
        graphs.append(Canonical(protos[-1], {"input": X.numpy()}))
        told = ((one.rule, one.level) for one in report.findings if one.level != "INFO")
        findings.append(collections.Counter(told))
        outputs += run(path, torch.cat([X, X[:1]]))
    assert graphs[0].outputs == graphs[1].outputs, explain(*graphs)
    assert graphs[0].operators() == graphs[1].operators()
    assert findings[0] == findings[1]
    assert signature(protos[0]) == signature(protos[1])
    assert [entry.version for entry in protos[1].opset_import] == [13]
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "a.onnx"
    qatkit.export_onnx(ready(Residual()), X, path, verify=False, lint=False)
    return path


def multiply(proto, name, factor):
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    changed = numpy_helper.to_array(tensor) * np.float32(factor)
    tensor.CopyFrom(numpy_helper.from_array(changed, name))


def other_scale(proto):
    multiply(proto, "head.input_quantizer.scale", 1.01)


def other_weight(proto):
    multiply(proto, "head.weight_quantizer.weight", -1)


def without_quantizer(proto):
    dq = next(n for n in proto.graph.node if n.name == "head.input_quantizer/DequantizeLinear")
    q = next(n for n in proto.graph.node if n.output[0] == dq.input[0])
    reader = next(n for n in proto.graph.node if dq.output[0] in n.input)
    reader.input[0] = q.input[0]


def without_relu(proto):
    relu = next(n for n in proto.graph.node if n.op_type == "Relu")
    relu.op_type = "Identity"


def other_rounding(proto):
    pool = next(n for n in proto.graph.node if n.op_type == "MaxPool")
    next(a for a in pool.attribute if a.name == "ceil_mode").i = 1


@pytest.mark.parametrize(
    "change", [other_scale, other_weight, without_quantizer, without_relu, other_rounding]
)
def test_the_comparison_finds_a_difference(file, change):
    proto, changed = onnx.load(file), onnx.load(file)
    change(changed)
    feeds = {"input": X.numpy()}
    assert Canonical(proto, feeds).outputs == Canonical(onnx.load(file), feeds).outputs
    assert Canonical(proto, feeds).outputs != Canonical(changed, feeds).outputs


def conv():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))


def onnxruntime_knows(opset):
    """Tell whether this ONNX Runtime has a QuantizeLinear of an opset."""
    scale = helper.make_node("Constant", [], ["scale"], value_float=1.0)
    quantize = helper.make_node("QuantizeLinear", ["x", "scale"], ["y"])
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, [2])
    opsets = [helper.make_opsetid("", opset)]
    proto = helper.make_model(
        helper.make_graph([scale, quantize], "g", [x], [y]), opset_imports=opsets, ir_version=8
    )
    try:
        onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception:  # of a class that is not public
        return False
    return True


@pytest.mark.parametrize(
    ("front_end", "opset"),
    [*(("legacy", n) for n in (13, 17, 19, 21, 22, 23)), *(("dynamo", n) for n in (17, 21))],
)
def test_opsets(tmp_path, front_end, opset):
    path = tmp_path / "a.onnx"
    known = onnxruntime_knows(opset)
    assert known or opset > 22
    report = qatkit.export_onnx(
        ready(conv()), X, path, opset=opset, front_end=front_end, verify=known
    )
    assert not known or report.verify.ok, str(report)
    assert not [one for one in report.findings if one.level == "ERROR"]
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", opset)]
    assert proto.ir_version == {13: 7, 17: 8, 19: 9, 21: 10, 22: 10, 23: 11}[opset]
    constants = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    found = [n for n in proto.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(found) == 8
    for node in found:
        assert constants[node.input[2]].dtype == np.int8
        assert [a.name for a in node.attribute] == ["axis"]


def test_the_legacy_one_is_chosen_while_there_is_one(tmp_path, monkeypatch):
    model = ready(conv())
    assert qatkit.export_onnx(model, X, tmp_path / "a.onnx").front_end == "legacy"
    monkeypatch.delattr(torch.onnx, "register_custom_op_symbolic")
    report = qatkit.export_onnx(model, X, tmp_path / "b.onnx")
    assert report.front_end == "dynamo"
    assert report.verify.ok
    assert "dynamo front end" in str(report)
    with pytest.raises(QatkitError, match=r"front_end='legacy'\): torch .* use front_end='dynamo'"):
        qatkit.export_onnx(model, X, tmp_path / "c.onnx", front_end="legacy")
    assert not (tmp_path / "c.onnx").exists()


@pytest.mark.parametrize("front_end", ["torchscript", None, 1])
def test_unknown_front_end(tmp_path, front_end):
    with pytest.raises(QatkitError, match="give one of 'auto', 'legacy', 'dynamo'"):
        qatkit.export_onnx(ready(conv()), X, tmp_path / "a.onnx", front_end=front_end)


def test_a_batch_of_one_stays_open(tmp_path):
    model, path = ready(conv(), X[:1]), tmp_path / "a.onnx"
    assert qatkit.export_onnx(model, X[:1], path, front_end="dynamo").verify.ok
    for count in (1, 3):
        x = torch.randn(count, 3, 32, 32)
        assert run(path, x)[0].shape == (count, 2, 30, 30)


class FixedBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.factors = nn.Parameter(torch.rand(2, 1, 1, 1))

    def forward(self, x):
        return self.conv(x) * self.factors


def test_a_batch_that_the_model_fixes(tmp_path):
    model, path = ready(FixedBatch()), tmp_path / "a.onnx"
    with pytest.raises(QatkitError, match=r"FixedBatch: .*dynamic_batch=False") as error:
        qatkit.export_onnx(model, X, path, front_end="dynamo")
    assert "\n" not in str(error.value)
    assert qatkit.export_onnx(model, X, path, front_end="dynamo", dynamic_batch=False).verify.ok
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2


class NoOperator(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return torch.linalg.svdvals(self.conv(x))


class Raises(NoOperator):
    def forward(self, x):
        traced = isinstance(x, FakeTensor | FunctionalTensor) or torch.jit.is_tracing()
        if traced or torch.compiler.is_compiling():
            raise ValueError("not for export\nat all")
        return self.conv(x)


def loud(caplog):
    return [one for one in caplog.records if one.levelno >= logging.INFO]


def settings():
    return {
        "disabled": logging.root.manager.disable,
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "grad": torch.is_grad_enabled(),
        "filters": list(warnings.filters),
        "random": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize(
    ("model", "reason"),
    [(NoOperator, "linalg_svd"), (Raises, "not for export at all")],
)
def test_a_failure_is_one_line_and_leaves_nothing(tmp_path, model, reason, capfd, caplog):
    model = ready(model())
    before = settings()
    with pytest.raises(QatkitError, match=f"{type(model).__name__}: .*{reason}") as error:
        qatkit.export_onnx(model, X, tmp_path / "a.onnx", front_end="dynamo")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    assert settings() == before
    assert list(tmp_path.iterdir()) == []
    assert (*capfd.readouterr(), loud(caplog)) == ("", "", [])


class Picks(NoOperator):
    """Where PyTorch fails on a size that depends on the data, it prints the graph before."""

    def forward(self, x):
        y = self.conv(x).flatten()
        kept = y[y > 0]
        return kept + 1 if kept.numel() > 7 else kept


def test_no_graph_is_printed(tmp_path, capfd, caplog):
    with contextlib.suppress(QatkitError):
        qatkit.export_onnx(ready(Picks()), X, tmp_path / "a.onnx", front_end="dynamo", verify=False)
    assert (*capfd.readouterr(), loud(caplog)) == ("", "", [])


def test_success_says_and_changes_nothing_either(tmp_path, capfd, caplog):
    model = ready(conv())
    before = settings()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    qatkit.export_onnx(model, X, tmp_path / "a.onnx", front_end="dynamo")
    assert settings() == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert (*capfd.readouterr(), loud(caplog)) == ("", "", [])


def test_the_file_says_nothing_of_the_code(tmp_path):
    qatkit.export_onnx(ready(conv()), X, tmp_path / "a.onnx", front_end="dynamo")
    proto = onnx.load(tmp_path / "a.onnx")
    assert not proto.functions
    assert b".py" not in proto.SerializeToString()
    assert not [t for t in proto.graph.initializer if t.external_data]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        q = self.conv(x)
        mask = torch.ones(8, 8).tril()
        attention = F.scaled_dot_product_attention
        return (
            attention(q, q, q * 2, is_causal=True),
            attention(q, q[:, :2], q[:, 1:3], enable_gqa=True),
            attention(q, q * 2, q, attn_mask=mask.bool()),
            attention(q, q, q * 3, attn_mask=mask, scale=0.3),
        )


def test_attention(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    path = tmp_path / "a.onnx"
    report = qatkit.export_onnx(ready(Attention(), x), x, path, front_end="dynamo")
    assert report.verify.ok, str(report)
    assert report.verify.outputs == 4 * 2 * 4 * 8 * 8
    assert report.verify.relative_difference < 1e-5


class Pooling(nn.Module):
    """Averages tensors whose channels lie last in memory, and others."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        y = self.conv(x)
        z = y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        pool = F.adaptive_avg_pool2d
        one = F.adaptive_avg_pool1d(y.flatten(2), 5)
        return one, pool(y, (3, 8)), pool(z, 1), pool(y, 1), pool(z, (2, 4)), pool(z, (5, 3))


def test_adaptive_pooling(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    path = tmp_path / "a.onnx"
    report = qatkit.export_onnx(ready(Pooling(), x), x, path, front_end="dynamo")
    assert report.verify.ok, str(report)
    assert report.verify.relative_difference < 1e-5
    kinds = collections.Counter(node.op_type for node in onnx.load(path).graph.node)
    assert (kinds["GlobalAveragePool"], kinds["AveragePool"]) == (2, 1)
    assert not kinds.keys() & {"Gather", "GatherND"}


class Norms(nn.Module):
    """Batch norms that no layer takes: one without parameters, one without statistics."""

    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 4, 1)
        self.last = nn.BatchNorm2d(4, track_running_stats=False)
        self.first.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.last(F.relu(self.conv(self.first(x))))


def test_batch_norms(tmp_path):
    path = tmp_path / "a.onnx"
    model = Norms()
    nn.init.uniform_(model.last.bias)
    qatkit.prepare(model.eval(), X)
    qatkit.calibrate(model, [X], progress=False)
    report = qatkit.export_onnx(model, X, path, front_end="dynamo")
    assert report.verify.ok, str(report)
    assert report.verify.relative_difference < 1e-5
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(path).graph.node}


def test_results_that_are_no_tensors_are_left_out(tmp_path):
    class Net(FixedBatch):
        def forward(self, x):
            y = self.conv(x)
            return x.shape[0], y, None, {"twice": y * 2}["twice"]

    path = tmp_path / "a.onnx"
    assert qatkit.export_onnx(ready(Net()), X, path, front_end="dynamo").verify.ok
    assert [value.name for value in onnx.load(path).graph.output] == ["output_1", "output_3"]
