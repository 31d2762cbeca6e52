"""Models that nobody developed against: prepared, calibrated, trained one step, exported."""

from __future__ import annotations

import copy

import pytest
import torch
from torchvision import models

import qatkit
from tests.contract.zoo import Float, equal, gradients, run, settle

SIZES = {
    "squeezenet1_1": 64,
    "regnet_x_400mf": 64,
    "mnasnet0_5": 64,
    "mobilenet_v3_small": 64,
    "convnext_tiny": 64,
    "swin_t": 64,
    "inception_v3": 299,
    "lraspp_mobilenet_v3_large": 64,
    "deeplabv3_mobilenet_v3_large": 64,
}


def build(name: str) -> Float:
    torch.manual_seed(0)
    more = {"weights_backbone": None} if "_mobilenet_v3_large" in name else {}
    more |= {"init_weights": False} if name == "inception_v3" else {}
    model = models.get_model(name, weights=None, **more)
    x = torch.randn(2, 3, SIZES[name], SIZES[name])
    settle(model, x)
    return Float(name, model.eval(), x)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_whole_way(name, tmp_path):
    case = build(name)
    model = qatkit.prepare(copy.deepcopy(case.model), case.inputs)
    with qatkit.disable_quantization(model):
        assert equal(run(case, model), run(case, case.model))
    qatkit.calibrate(model, [case.inputs], progress=False)
    case.loss(model.train()).backward()
    assert all(torch.isfinite(grad).all() for grad in gradients(model).values())
    report = qatkit.export_onnx(model, case.inputs, tmp_path / "a.onnx")
    assert report.verify.ok, str(report)
    assert [finding for finding in report.findings if finding.level == "ERROR"] == []


@pytest.mark.slow
def test_faster_rcnn(tmp_path):
    torch.manual_seed(0)
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    model = models.get_model(name, weights=None, weights_backbone=None)
    model.transform.min_size, model.transform.max_size = (64,), 96
    settle(model.backbone, torch.rand(2, 3, 96, 96))
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 80)]
    reference = copy.deepcopy(model.eval())
    case = Float(name, reference, (images,))
    qatkit.prepare(model, (images,))
    with qatkit.disable_quantization(model):
        assert equal(run(case, model), run(case, reference))
    qatkit.calibrate(model, [(images,)], progress=False)
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1])} for _ in images]
    sum(model.train()(images, targets).values()).backward()
    assert all(torch.isfinite(grad).all() for grad in gradients(model).values())
    report = qatkit.export_onnx(model, (images,), tmp_path / "a.onnx")
    assert report.verify.ok, str(report)
