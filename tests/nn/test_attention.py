"""Attention made of quantized products computes what PyTorch's computes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qatkit
from qatkit.nn import QuantMultiheadAttention
from qatkit.nn.attention import OPERANDS, ScaledDotProductAttention
from qatkit.nn.weights import weights_of
from qatkit.quantizer import TensorQuantizer

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
KINDS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"add_bias_kv": True, "batch_first": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    {"kdim": 6, "vdim": 10, "batch_first": True},
]


def pair(**options: Any) -> tuple[nn.MultiheadAttention, QuantMultiheadAttention]:
    """Return a float layer and the quantized one with its quantizers off."""
    torch.manual_seed(0)
    floats = nn.MultiheadAttention(8, 2, **options)
    layer = QuantMultiheadAttention(8, 2, **options)
    missing = layer.load_state_dict(floats.state_dict(), strict=True)
    assert not missing.missing_keys
    qatkit.disable_quantization(layer).apply()
    return floats, layer


def inputs(layer: nn.MultiheadAttention, form: str) -> tuple[torch.Tensor, ...]:
    shapes = [(3, 5, 8), (3, 7, layer.kdim), (3, 7, layer.vdim)]
    q, k, v = (torch.randn(shape) for shape in shapes)
    if form == "unbatched":
        return q[0], k[0], v[0]
    if not layer.batch_first:
        q, k, v = (each.transpose(0, 1) for each in (q, k, v))
    return (q, q, q) if form == "self" else (q, k, v)


@pytest.mark.parametrize("form", ["self", "cross", "unbatched"])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_float_result(options, form):
    floats, layer = pair(**options)
    if form == "self" and "kdim" in options:
        pytest.skip("self-attention has keys of the size of the query")
    q, k, v = inputs(floats, form)
    keys, batch = (5 if form == "self" else 7), (1 if form == "unbatched" else 3)
    padding = torch.rand(keys if form == "unbatched" else (3, keys)) > 0.7
    masks = [None, torch.randn(5, keys), torch.rand(5, keys) > 0.8, torch.randn(2 * batch, 5, keys)]
    for mask in masks:
        for pad in (None, padding if mask is None or mask.dtype == torch.bool else padding * -9.0):
            for shown in ({"need_weights": False}, {}, {"average_attn_weights": False}):
                given = {"attn_mask": mask, "key_padding_mask": pad, **shown}
                expected, found = floats(q, k, v, **given), layer(q, k, v, **given)
                torch.testing.assert_close(found[0], expected[0], **CLOSE)
                assert (found[1] is None) == (expected[1] is None)
                if found[1] is not None:
                    torch.testing.assert_close(found[1], expected[1], **CLOSE)


def test_gradients_and_dropout():
    floats, layer = pair(batch_first=True, dropout=0.5)
    q, k, v = inputs(floats, "cross")
    for module in (floats.eval(), layer.eval()):
        module(q, k, v)[0].square().sum().backward()
    for one, other in zip(floats.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, **CLOSE)
    layer.train()
    assert not torch.equal(layer(q, k, v)[0], layer(q, k, v)[0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.rand(5, 7) > 0.3},
        {"attn_mask": torch.randn(2, 1, 5, 7)},
        {"enable_gqa": True},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_function(options):
    layer = ScaledDotProductAttention()
    for name in (name for group in OPERANDS for name in group):
        layer.add_module(name, nn.Identity())
    heads = 2 if options.get("enable_gqa") else 4
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, heads, 7, 8), torch.randn(2, heads, 7, 6)
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(layer(q, k, v, **options), expected, **CLOSE)


def test_a_query_that_may_look_at_nothing_gets_zeros():
    layer = ScaledDotProductAttention()
    for name in (name for group in OPERANDS for name in group):
        layer.add_module(name, nn.Identity())
    q, mask = torch.randn(2, 5, 8), torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    for given in (mask, torch.zeros(5, 5).masked_fill(~mask, float("-inf"))):
        expected = F.scaled_dot_product_attention(q, q, q, given)
        assert not expected[:, 2].any()
        torch.testing.assert_close(layer(q, q, q, given), expected, **CLOSE)
    floats, layer = pair(batch_first=True)
    x, padding = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    padding[1] = True
    given = {"key_padding_mask": padding, "need_weights": False}
    torch.testing.assert_close(layer(x, x, x, **given)[0], floats(x, x, x, **given)[0], **CLOSE)


def test_quantizers_of_every_product():
    layer = QuantMultiheadAttention(8, 2, batch_first=True).train()
    x = torch.randn(3, 5, 8)
    layer(x, x, x)[0].sum().backward()
    unused = {"key_input_quantizer", "value_input_quantizer"}
    never = {
        name
        for name, module in layer.named_modules()
        if isinstance(module, TensorQuantizer) and not module.calibrated
    }
    assert never == unused
    assert [weight.name for weight in weights_of(layer)] == ["in_proj_weight", "weight"]
    layer.eval()
    expected = layer(x, x, x)[0]
    with qatkit.disable_quantization(layer):
        assert 0 < (layer(x, x, x)[0] - expected).abs().max() < 0.2
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x, x, x)[0], expected)


def test_compiles_as_one_graph():
    layer = QuantMultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(3, 5, 8)
    layer.train()(x, x, x)
    layer.eval()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, x, x)[0], layer(x, x, x)[0], **CLOSE)
