"""The arguments of a model as an ONNX file takes them."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.graph.level import float_class
from qatkit.graph.structure import flatten, map_tensors, tensors

_TRACED = (Tensor, int, float, torch.SymInt, torch.SymFloat)
"""What may be a tensor while a model is traced."""


def to_cpu_float32(value: Any) -> Any:
    """Return arguments with every tensor on the CPU, and float32 in place of other float dtypes."""
    return map_tensors(value, _cpu_float32)


def arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that hold tensors by name, in order.

    A single one is ``input``; several have the names of the parameters of the model's forward.
    """
    if len(args) == 1 and not kwargs:
        return {"input": args[0]}
    parameters = list(inspect.signature(float_class(type(model)).forward).parameters.values())[1:]
    known = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    names = [*known, *(f"input_{i}" for i in range(len(known), len(args)))]
    named = dict(zip(names, args, strict=False)) | kwargs
    return {name: value for name, value in named.items() if tensors(value)}


def input_names(given: dict[str, Any]) -> list[str]:
    """Return a name for each tensor in `arguments`: its argument's, numbered if that holds more."""
    names = []
    for name, value in given.items():
        count = len(tensors(value))
        names += [name] if isinstance(value, Tensor) else [f"{name}_{i}" for i in range(count)]
    return names


def take_tensors(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> None:
    """Let ``model`` take the tensors of the arguments one by one; all else in them is constant.

    The exporter would turn numbers into inputs, and keywords into positions. What the model returns
    becomes a tensor or a tuple of the tensors in it: numbers would become outputs, for while the
    exporter traces they are tensors. ``result`` is what the model returns otherwise.
    """
    forward = model.forward
    kept = [isinstance(leaf, Tensor) for leaf in flatten(result, _TRACED)[1]]

    def call(*leaves: Tensor) -> Any:
        left = iter(leaves)
        filled = map_tensors((args, kwargs), lambda _: next(left))
        traced = forward(*filled[0], **filled[1])
        if isinstance(traced, Tensor):
            return traced
        return tuple(itertools.compress(flatten(traced, _TRACED)[1], kept))

    model.forward = call


def output_names(result: Any) -> dict[str, Tensor]:
    """Return the outputs of a model by their names in the file, nothing if they are nested deeper.

    A single one is ``output``, those of a tuple ``output_0`` ..., those of a dict ``output_KEY``;
    what holds no tensor is no output.
    """
    if isinstance(result, Tensor):
        return {"output": result}
    many: Any = result.items() if isinstance(result, dict) else ()
    if isinstance(result, tuple | list):
        many = enumerate(result)
    named = {f"output_{key}": value for key, value in many if tensors(value)}
    return named if all(isinstance(value, Tensor) for value in named.values()) else {}


def batch_axes(
    inputs: dict[str, Any], outputs: dict[str, Tensor], *, dynamic: bool
) -> dict[str, dict[int, str]]:
    """Return which inputs and outputs have an open batch dimension, as the exporter wants it.

    The first input with two or more dimensions has it, and all that is as long as that: other
    inputs of two or more dimensions, and outputs.
    """
    lengths = {name: x.shape[0] for name, x in inputs.items() if _has_batch(x)}
    if not dynamic or not lengths:
        return {}
    batch = next(iter(lengths.values()))
    lengths |= {name: y.shape[0] for name, y in outputs.items() if y.dim() > 0}
    return {name: {0: "batch"} for name, length in lengths.items() if length == batch}


def _has_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 1


def _cpu_float32(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor
