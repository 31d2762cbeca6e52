"""Functions whose place in a rewritten block a module with quantizers takes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from qatkit.nn.attention import ScaledDotProductAttention
from qatkit.nn.einsum import Einsum

FUNCTIONS: Mapping[str, type[ScaledDotProductAttention] | type[Einsum]] = MappingProxyType(
    {"scaled_dot_product_attention": ScaledDotProductAttention, "einsum": Einsum}
)
"""The module for each function by name: it takes the same arguments, and has the quantizers that
its ``operands`` name, those of one product together."""
