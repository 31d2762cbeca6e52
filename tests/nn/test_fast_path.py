"""The fused kernel of transformer layers does not go around the quantizers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qatkit


def layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)


@pytest.mark.parametrize("build", [layer, lambda: nn.TransformerEncoder(layer(), 2)])
def test_quantizers_run_in_eval_without_gradients(build, tmp_path):
    model, x = build().eval(), torch.randn(2, 7, 32)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[1, 5:] = True
    with torch.no_grad():
        expected = model(x)
        qatkit.prepare(model, x)
        qatkit.calibrate(model, [x], progress=False)
        found = model(x)
        assert 0 < (found - expected).abs().max() < 0.2
        with qatkit.disable_quantization(model):
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        assert torch.isfinite(model(x, src_key_padding_mask=mask)[0]).all()
    torch.testing.assert_close(model(x), found, rtol=1e-5, atol=1e-5)
    assert qatkit.export_onnx(model, x, tmp_path / "a.onnx").verify.ok


def test_a_float_transformer_keeps_its_fast_path():
    model = nn.Sequential(nn.Linear(32, 32), layer())
    config = qatkit.QuantConfig(rules=(qatkit.Rule("1", enabled=False),))
    qatkit.prepare(model, torch.randn(2, 7, 32), config)
    assert model[1].activation_relu_or_gelu == 1
