"""Attention made of quantized matrix products and a float softmax (rule F13)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qatkit.nn.quantized import QuantizedComposite
from qatkit.nn.registry import quantizes
from qatkit.nn.slots import Slots

OPERANDS = (
    ("q_bmm_quantizer", "k_bmm_quantizer"),
    ("softmax_quantizer", "v_bmm_quantizer"),
)
"""The quantizers of the two matrix products, see `Slots.inner`."""


def attend(
    layer: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    safe: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute ``softmax(scale * Q K^T + bias) V`` with the quantizers of ``layer``.

    Args:
        layer: holds the `OPERANDS`.
        query: (..., L, E) float.
        key: (..., S, E) float.
        value: (..., S, E_v) float.
        bias: float, broadcasts to (..., L, S); minus infinity takes a pair out; ``None`` for none.
        scale: factor of the scores, 1 / sqrt(E) by default.
        dropout: share of the probabilities that are set to zero.
        safe: a query whose pairs are all taken out gets zeros, not NaN.

    Returns:
        (..., L, E_v), and the probabilities (..., L, S) as they were multiplied.
    """
    modules: Any = layer
    keys = modules.k_bmm_quantizer(key.transpose(-2, -1))
    scores = torch.matmul(modules.q_bmm_quantizer(query), keys)
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    reached = None
    if bias is not None and safe:
        least = torch.finfo(bias.dtype).min / 2
        reached = (bias > least).any(dim=-1, keepdim=True)
        bias = bias.clamp(min=least)
    if bias is not None:
        scores = scores + bias
    shares = modules.softmax_quantizer(torch.softmax(scores, dim=-1))
    if dropout:
        shares = F.dropout(shares, dropout)
    result = torch.matmul(shares, modules.v_bmm_quantizer(value))
    return result if reached is None else result * reached.to(result.dtype), shares


class ScaledDotProductAttention(nn.Module):
    """``torch.nn.functional.scaled_dot_product_attention`` as a layer with quantizers.

    It takes the arguments of the function; the scores are computed with ``torch.matmul``.
    """

    operands: ClassVar[tuple[tuple[str, ...], ...]] = OPERANDS

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attend: (..., L, E), (..., S, E), (..., S, E_v) -> (..., L, E_v)."""
        if enable_gqa:
            times = query.shape[-3] // key.shape[-3]
            key, value = (each.repeat_interleave(times, dim=-3) for each in (key, value))
        bias = additive(attn_mask, query, taken_out=False)
        if is_causal:
            bias = causal(query.shape[-2], key.shape[-2], query)
        safe = not is_causal  # there, each query sees the first key
        return attend(self, query, key, value, bias, scale=scale, dropout=dropout_p, safe=safe)[0]


def additive(mask: Tensor | None, like: Tensor, *, taken_out: bool) -> Tensor | None:
    """Return a mask as numbers to add to the scores.

    Args:
        mask: numbers, or bool; ``None`` for none.
        like: gives the dtype.
        taken_out: what ``True`` means in a bool mask: this pair is taken out, or takes part.
    """
    if mask is None or mask.dtype != torch.bool:
        return mask
    out = mask if taken_out else torch.logical_not(mask)
    return torch.zeros_like(out, dtype=like.dtype).masked_fill(out, float("-inf"))


def causal(rows: int, columns: int, like: Tensor) -> Tensor:
    """Return the additive mask that lets each row see the columns up to its own index."""
    row = torch.arange(rows, device=like.device).unsqueeze(1)
    out = torch.arange(columns, device=like.device).unsqueeze(0) > row
    return torch.zeros_like(out, dtype=like.dtype).masked_fill(out, float("-inf"))


@quantizes(nn.MultiheadAttention)
class QuantMultiheadAttention(QuantizedComposite, nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` made of quantized projections and matrix products.

    Takes the arguments of ``torch.nn.MultiheadAttention``, then ``weight_spec`` and ``input_spec``.
    Self-attention quantizes its input once. Softmax and masks stay float.

    >>> layer = QuantMultiheadAttention(8, 2, batch_first=True)
    >>> x = torch.randn(3, 5, 8)
    >>> output, weights = layer(x, x, x)
    >>> output.shape, weights.shape
    (torch.Size([3, 5, 8]), torch.Size([3, 5, 5]))
    """

    @classmethod
    def slots(cls, layer: nn.Module) -> Slots:
        """Return the quantizers of the inputs, projections and matrix products."""
        joint = getattr(layer, "in_proj_weight", None) is not None
        return Slots(
            inputs={
                "input_quantizer": "query",
                "key_input_quantizer": "key",
                "value_input_quantizer": "value",
            },
            parameters=("in_proj_weight",)
            if joint
            else ("q_proj_weight", "k_proj_weight", "v_proj_weight"),
            inner=OPERANDS,
            layers=("out_proj",),
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as ``torch.nn.MultiheadAttention`` does, with masks and weights as there."""
        batched = query.dim() == 3
        q, k, v = self._projected(query, key, value)
        if not batched:
            q, k, v = (each.unsqueeze(1) for each in (q, k, v))
        elif self.batch_first:
            q, k, v = (each.transpose(0, 1) for each in (q, k, v))
        k, v = self._extended(k, v)
        length, batch = q.shape[0], q.shape[1]
        q, k, v = (self._heads(each) for each in (q, k, v))
        added = k.shape[-2] - key.shape[1 if batched and self.batch_first else 0]
        bias = self._bias(attn_mask, key_padding_mask, q, added)
        dropout = self.dropout if self.training else 0.0
        safe = not need_weights
        attended, shares = attend(self, q, k, v, bias, dropout=dropout, safe=safe)
        joined = attended.permute(2, 0, 1, 3).reshape(length, batch, self.embed_dim)
        if batched and self.batch_first:
            joined = joined.transpose(0, 1)
        output = self.out_proj(joined if batched else joined.squeeze(1))
        if not need_weights:
            return output, None
        weights = shares.mean(dim=1) if average_attn_weights else shares
        return output, weights if batched else weights.squeeze(0)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return Q, K and V; equal inputs are quantized and projected together."""
        quantizers: Any = self
        q = self.quantized_input(query)
        k = q if key is query else quantizers.key_input_quantizer(key)
        v = k if value is key else quantizers.value_input_quantizer(value)
        size, bias = self.embed_dim, self.in_proj_bias
        if self.in_proj_weight is None:
            sources = zip("qkv", (q, k, v), _thirds(bias, size), strict=True)
            return tuple(
                F.linear(x, self.quantized_parameter(f"{n}_proj_weight"), b) for n, x, b in sources
            )
        weight = self.quantized_parameter("in_proj_weight")
        if q is k and k is v:
            return F.linear(q, weight, bias).chunk(3, dim=-1)
        rows = (weight[:size], weight[size : 2 * size], weight[2 * size :])
        parts = zip((q, k, v), rows, _thirds(bias, size), strict=True)
        return tuple(F.linear(x, w, b) for x, w, b in parts)

    def _extended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the learned key and value, and a zero one, to (S, N, E)."""
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(1, k.shape[1], -1)])
            v = torch.cat([v, self.bias_v.expand(1, v.shape[1], -1)])
        if self.add_zero_attn:
            k = torch.cat([k, torch.zeros_like(k[:1])])
            v = torch.cat([v, torch.zeros_like(v[:1])])
        return k, v

    def _heads(self, x: Tensor) -> Tensor:
        """Split (L, N, E) into (N, heads, L, E / heads)."""
        return x.reshape(x.shape[0], x.shape[1], self.num_heads, -1).permute(1, 2, 0, 3)

    def _bias(
        self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, added: int
    ) -> Tensor | None:
        """Return both masks as one that broadcasts to (N, heads, L, S), open for added keys."""
        bias = additive(attn_mask, q, taken_out=True)
        if bias is not None and bias.dim() == 3:
            bias = bias.reshape(-1, self.num_heads, *bias.shape[1:])
        if padding is not None:
            closed = additive(padding, q, taken_out=True)
            assert closed is not None
            rows = closed.reshape(-1, 1, 1, closed.shape[-1])
            bias = rows if bias is None else bias + rows
        return bias if bias is None or not added else F.pad(bias, (0, added))


def _thirds(bias: Tensor | None, size: int) -> tuple[Tensor | None, ...]:
    """Return the parts of Q, K and V of a joint bias."""
    if bias is None:
        return None, None, None
    return bias[:size], bias[size : 2 * size], bias[2 * size :]
