"""How an operator of the namespace ``qatkit`` is registered.

Compiled graphs are cached by the names of operators: arithmetic that changes needs a new name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_torch: Any = torch.library
_LIBRARY = _torch.Library("qatkit", "FRAGMENT")


def register_call(schema: str, function: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """Register an operator that stays one call in every graph, and takes tensors in any layout.

    Unless inductor knows that they can be in any, it copies what it has laid out in its own way.

    Args:
        schema: ``name(Tensor x, ...) -> ...``, with what is written marked.
        function: computes it; not differentiated.
        shapes: returns tensors of the shapes, dtypes and strides that ``function`` does.
    """
    _LIBRARY.define(schema, tags=(torch.Tag.flexible_layout,))
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    _torch.register_fake(f"qatkit::{name}", shapes, lib=_LIBRARY)


def register_decomposed(schema: str, function: Callable[..., Any]) -> None:
    """Register an operator that Dynamo records as one and that is tensor operations behind it."""
    _LIBRARY.define(schema)
    _LIBRARY.impl(schema.partition("(")[0], function, "CompositeImplicitAutograd")
