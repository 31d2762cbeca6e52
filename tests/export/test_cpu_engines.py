"""Files for ONNX Runtime and OpenVINO: what they hold, and what the engines make of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

import qatkit
from qatkit import QatkitError, QuantConfig, QuantSpec
from qatkit.config import WEIGHT

ORT, OPENVINO = "onnxruntime-uint8", "openvino-int8"
X = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def conv_bn(inputs: int, outputs: int, size: int = 3, **more: Any) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **more)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """A stem with a max pool, two residual blocks, a linear head."""

    fused: ClassVar = {"QLinearConv": 6, "QLinearAdd": 2, "NhwcMaxPool": 1, "QGemm": 1}

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = conv_bn(3, 16), nn.MaxPool2d(2)
        self.a, self.b = conv_bn(16, 16), conv_bn(16, 16)
        self.c, self.d = conv_bn(16, 32, stride=2), conv_bn(32, 32)
        self.down, self.fc = conv_bn(16, 32, 1, stride=2), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.stem(x)))
        x = torch.relu(self.b(torch.relu(self.a(x))) + x)
        y = self.d(torch.relu(self.c(x)))
        y += self.down(x)
        return self.fc(F.adaptive_avg_pool2d(torch.relu(y), 1).flatten(1))


class MobileNet(nn.Module):
    """Inverted residuals with squeeze-excite, ReLU6 and hard swish."""

    fused: ClassVar = {
        **{"QLinearConv": 7, "QLinearAdd": 1, "QLinearMul": 1, "QGemm": 2},
        "QLinearGlobalAveragePool": 1,
    }

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 16), nn.Hardswish(inplace=True))
        self.expand = nn.Sequential(*conv_bn(16, 32, 1), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(*conv_bn(32, 32, groups=32), nn.Hardswish(inplace=True))
        self.squeeze, self.gate = nn.AdaptiveAvgPool2d(1), nn.Hardsigmoid()
        self.reduce, self.restore = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.project = conv_bn(32, 16, 1)
        self.last = nn.Sequential(*conv_bn(16, 32, 1), nn.ReLU6(inplace=True))
        self.head = nn.Sequential(nn.Linear(32, 24), nn.Hardswish(), nn.Linear(24, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depthwise(self.expand(x))
        y = y * self.gate(self.restore(torch.relu(self.reduce(self.squeeze(y)))))
        x = self.last(x + self.project(y))
        return self.head(x.mean((2, 3)))


class Inception(nn.Module):
    """Parallel branches, one with a max pool, and a concatenation; the head has a float result."""

    fused: ClassVar = {"QLinearConv": 5, "QLinearConcat": 1, "NhwcMaxPool": 1, "Conv": 1}

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv_bn(3, 16), conv_bn(16, 16), conv_bn(16, 16)
        self.pool, self.c, self.out = nn.MaxPool2d(3, 1, 1), conv_bn(16, 16, 1), conv_bn(48, 16)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        branches = [self.a(x), self.b(x), self.c(self.pool(x))]
        y = self.out(torch.cat([torch.relu(branch) for branch in branches], 1))
        return self.head(torch.tanh(y))


class Mixer(nn.Module):
    """Linear layers over three dimensions, which the exporter writes as MatMul and Add."""

    fused: ClassVar = {"QLinearConv": 1, "MatMulIntegerToFloat": 2, "QGemm": 1}

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.norm = nn.LayerNorm(32)
        self.up, self.down, self.fc = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.fc(x.mean(1))


NETS: list[type[Any]] = [ResNet, MobileNet, Inception, Mixer]


def ready(net: type[nn.Module], config: Any, steps: int = 1) -> nn.Module:
    """Prepare, calibrate and train a network."""
    torch.manual_seed(0)
    model = qatkit.prepare(net(), X, config)
    qatkit.calibrate(model, [torch.randn(8, 3, 24, 24)], progress=False)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3, 24, 24)).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    return model.eval()


def assert_verified(report: qatkit.ExportReport) -> None:
    """Check that the codes agree but for a rounding or two: there are few codes here."""
    assert report.verify is not None
    assert report.verify.missing == ()
    assert report.verify.largest_step <= 1, str(report)
    assert report.verify.differing <= 2, str(report)


def optimized(path: Path) -> Counter[str]:
    """Return how many nodes of each kind ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    target = path.with_suffix(".optimized.onnx")
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(target).graph.node)


def run(path: Path, x: Tensor = X) -> Any:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def zero_points(path: Path) -> Counter[tuple[str, str, int]]:
    """Count the quantizers of a file by role, type and zero point."""
    graph = onnx.load(path).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found: Counter[tuple[str, str, int]] = Counter()
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            role = "weight" if "weight_quantizer" in node.name else "activation"
            zero = arrays[node.input[2]]
            assert len(set(zero.ravel().tolist())) == 1
            found[role, str(zero.dtype), int(zero.ravel()[0])] += 1
    return found


@pytest.mark.parametrize(("weights", "dynamic"), [("float", True), ("int8", False)])
@pytest.mark.parametrize("net", NETS)
def test_onnx_runtime_runs_every_layer_in_integers(
    net: type[Any], weights: Any, dynamic: bool, tmp_path: Path
) -> None:
    model, path = ready(net, ORT), tmp_path / "net.onnx"
    report = qatkit.export_onnx(model, X, path, weights=weights, dynamic_batch=dynamic)
    assert_verified(report)
    assert report.findings == ()
    kinds = optimized(path)
    assert {kind: kinds[kind] for kind in net.fused} == net.fused
    float_layers = {"Conv", "FusedConv", "Gemm", "MatMul", "FusedMatMul", "MaxPool"}
    assert float_layers & set(kinds) <= set(net.fused)
    with torch.no_grad():
        expected = model(X).numpy()
    assert np.abs(run(path) - expected).max() <= 0.15 * np.abs(expected).max()


@pytest.mark.parametrize("net", NETS)
def test_the_types_of_the_codes(net: type[nn.Module], tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    qatkit.export_onnx(ready(net, ORT), X, path, verify=False, lint=False)
    found = zero_points(path)
    assert {key[1:] for key in found if key[0] == "weight"} == {("int8", 0)}
    assert {key[1:] for key in found if key[0] == "activation"} <= {("uint8", 0), ("uint8", 128)}
    qatkit.export_onnx(ready(net, OPENVINO), X, path, verify=False, lint=False)
    found = zero_points(path)
    assert {key[1:] for key in found if key[0] == "weight"} == {("int8", 0)}
    assert {key[1:] for key in found if key[0] == "activation"} <= {("uint8", 0), ("int8", 0)}
    assert not any(node.op_type == "Clip" and "quantizer" in node.name for node in nodes(path))


def nodes(path: Path) -> list[Any]:
    return list(onnx.load(path).graph.node)


@pytest.mark.parametrize("net", NETS)
def test_openvino_computes_what_onnx_runtime_does(net: type[nn.Module], tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    path = tmp_path / "net.onnx"
    report = qatkit.export_onnx(ready(net, OPENVINO), X, path, dynamic_batch=False)
    assert_verified(report)
    assert report.findings == ()
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    found, expected = compiled(X.numpy())[0], run(path)
    assert np.abs(found - expected).max() <= 0.15 * np.abs(expected).max()
    layers = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    types = [
        layer["runtimePrecision"].astype(str)
        for layer in layers
        if layer["layerType"].astype(str) in ("Convolution", "FullyConnected")
    ]
    assert len(types) >= 4
    if "avx512_vnni" in Path("/proc/cpuinfo").read_text():
        assert set(types) <= {"u8", "i8"}


@pytest.mark.parametrize("preset", [ORT, OPENVINO])
def test_save_and_load(preset: str, tmp_path: Path) -> None:
    model = ready(MobileNet, preset)
    qatkit.save(model, tmp_path / "net.safetensors")
    again = qatkit.load(MobileNet(), tmp_path / "net.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(again(X), model(X))
    for i, each in enumerate((model, again)):
        qatkit.export_onnx(each, X, tmp_path / f"{i}.onnx", verify=False, lint=False)
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "1.onnx").read_bytes()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_zero_points_of_asymmetric_activations(backend: str, signed: bool, tmp_path: Path) -> None:
    spec = QuantSpec(symmetric=False, signed=signed)
    model = ready(ResNet, QuantConfig(activation=spec, backend=backend))
    report = qatkit.export_onnx(model, X, tmp_path / "net.onnx")
    assert_verified(report)
    assert [str(one) for one in report.findings if one.level != "INFO"] == []
    found = {key[1:] for key in zero_points(tmp_path / "net.onnx") if key[0] == "activation"}
    assert len(found) > 3  # each tensor has its own
    lowest = ("uint8", 0) if backend == "onnxruntime" or not signed else ("int8", -128)
    assert lowest in found  # behind a ReLU


def test_four_unsigned_bits_in_a_file_for_tensorrt(tmp_path: Path) -> None:
    config = QuantConfig(
        weight=WEIGHT.replace(num_bits=4),
        activation=QuantSpec(num_bits=4),
        first_last_bits=8,
        unsigned_activations=True,
    )
    path = tmp_path / "net.onnx"
    report = qatkit.export_onnx(ready(ResNet, config), X, path)
    assert_verified(report)
    assert [str(one) for one in report.findings if one.level != "INFO"] == []
    assert {key[1:] for key in zero_points(path)} == {("int8", 0)}
    graph = onnx.load(path).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    ends = []
    for node in graph.node:
        if node.op_type == "Clip" and "quantizer" in node.name:
            scale = arrays[node.input[1].replace(".low", ".scale")]
            ends.append(tuple(round(float(arrays[name] / scale)) for name in node.input[1:]))
    assert (0, 15) in ends
    assert set(ends) <= {(0, 15), (-8, 7)}


def test_a_trained_model_is_written_for_another_engine(tmp_path: Path) -> None:
    model = ready(ResNet, "tensorrt-int8")
    plain, shifted = tmp_path / "tensorrt.onnx", tmp_path / "onnxruntime.onnx"
    qatkit.export_onnx(model, X, plain)
    report = qatkit.export_onnx(model, X, shifted, backend="onnxruntime")
    assert_verified(report)
    assert report.findings == tuple(qatkit.lint_onnx(shifted, backend="onnxruntime"))
    assert {"F20", "F21"} <= {finding.rule for finding in report.findings}
    assert {key[1:] for key in zero_points(shifted)} == {("int8", 0), ("uint8", 128)}
    assert len(nodes(plain)) == len(nodes(shifted)) - 1  # the bias of the Gemm
    with pytest.raises(QatkitError, match="unknown backend 'onnx'"):
        qatkit.export_onnx(model, X, shifted, backend="onnx")


def test_ranges_of_a_trained_model_move_to_another_placement() -> None:
    trained = ready(ResNet, "tensorrt-int8")
    model = qatkit.prepare(ResNet(), X, ORT)
    result = model.load_state_dict(trained.state_dict(), strict=False)
    assert not result.unexpected_keys
    qatkit.calibrate(model, [torch.randn(8, 3, 24, 24)], progress=False)
    with torch.no_grad():
        expected, found = trained(X), model.eval()(X)
    assert float((found - expected).norm() / expected.norm()) < 0.1


def test_what_tensorrt_refuses_is_refused_for_it_alone(tmp_path: Path) -> None:
    model = ready(ResNet, QuantConfig(activation=QuantSpec(symmetric=False), backend="openvino"))
    with pytest.raises(QatkitError, match=r"has a zero point, which tensorrt refuses \(P2\)"):
        qatkit.export_onnx(model, X, tmp_path / "net.onnx", backend="tensorrt")
    model = ready(ResNet, ORT)
    with pytest.raises(QatkitError, match="codes up to 255 do not fit int8"):
        qatkit.export_onnx(model, X, tmp_path / "net.onnx", backend="tensorrt")
    assert not list(tmp_path.iterdir())


def test_calibrators_know_unsigned_codes(tmp_path: Path) -> None:
    model = ready(ResNet, ORT, steps=0)
    for method in ("entropy", "mse", "percentile"):
        qatkit.calibrate(model, [torch.randn(8, 3, 24, 24)], method=method, progress=False)
        report = qatkit.export_onnx(model, X, tmp_path / "net.onnx")
        assert_verified(report)
