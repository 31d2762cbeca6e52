"""Forwards of PyTorch's own blocks without what keeps ``torch.fx`` from tracing them.

``torch.nn.TransformerEncoderLayer`` looks at its tensors to choose between a fused kernel and its
children. A block that is rewritten always calls its children.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def plain_forward(kind: type[nn.Module]) -> Callable[..., Any]:
    """Return a function of (block, arguments) that computes what ``kind.forward`` does."""
    if kind.forward is nn.TransformerEncoderLayer.forward:
        return _encoder_layer
    forward: Callable[..., Any] = kind.forward
    return forward


def _encoder_layer(
    self: Any,
    src: Any,
    src_mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool = False,
) -> Any:
    masks = (src_mask, src_key_padding_mask, is_causal)
    if self.norm_first:
        x = src + self._sa_block(self.norm1(src), *masks)
        return x + self._ff_block(self.norm2(x))
    x = self.norm1(src + self._sa_block(src, *masks))
    return self.norm2(x + self._ff_block(x))
