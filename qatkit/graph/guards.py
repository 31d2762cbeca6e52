"""What a graph cannot hold of a forward: a block that does it is not rewritten.

A traced forward keeps its tensor operations. Lost would be: attributes that it writes, random
decisions in Python, gradient and autocast contexts, and tensors that it makes from numbers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

_MADE_BY_FX = "_tensor_constant"

PLAIN = (bool, int, float, str, type(None))


class Unfaithful(Exception):
    """The graph would not do what the forward does; the message says why."""


@contextmanager
def faithful(twin: nn.Module) -> Iterator[None]:
    """Raise `Unfaithful` if the body, a trace of ``twin``, did what a graph cannot hold."""
    before, draws = _state(twin), _random_states()
    yield
    after = _state(twin)
    written = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if written:
        raise Unfaithful(f"it writes its attribute {written[0]!r}")
    if draws != _random_states():
        raise Unfaithful("it draws random numbers outside of tensor operations")


def check_constants(graph: fx.Graph, block: nn.Module) -> None:
    """Raise `Unfaithful` if a graph reads a tensor that is not the block's: one that it makes."""
    owned = {name for name, _ in (*block.named_parameters(), *block.named_buffers())}
    owned |= {name for name, value in block.__dict__.items() if isinstance(value, Tensor)}
    if any(node.op == "get_attr" and node.target not in owned for node in graph.nodes):
        raise Unfaithful("it makes a tensor of numbers; keep that in a buffer")


def modes() -> tuple[bool, ...]:
    """Return which of the contexts are open that a graph cannot hold."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


def _state(twin: nn.Module) -> dict[str, tuple[int, int]]:
    """Return who each attribute is, and how long or in which version."""
    attributes: dict[str, Any] = {**twin.__dict__, **twin._buffers, **twin._parameters}
    own = {name: value for name, value in attributes.items() if not name.startswith(_MADE_BY_FX)}
    return {name: (id(value), _extent(value)) for name, value in own.items()}


def _extent(value: Any) -> int:
    if isinstance(value, Tensor):
        return value._version
    return len(value) if isinstance(value, (list, dict, set)) else 0


def _random_states() -> tuple[Any, ...]:
    drawn: Any = np.random.get_state(legacy=True)
    return bytes(torch.get_rng_state().numpy()), random.getstate(), bytes(drawn[1]), drawn[2]
