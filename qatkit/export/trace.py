"""Run one of PyTorch's ONNX exporters on a lowered model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from qatkit.errors import QatkitError, shorten
from qatkit.export.dynamo import DYNAMO
from qatkit.export.front_end import FrontEnd, Traceable
from qatkit.export.inputs import (
    arguments,
    batch_axes,
    input_names,
    output_names,
    take_tensors,
)
from qatkit.export.legacy import LEGACY
from qatkit.export.marker import settings_kept
from qatkit.graph.structure import tensors

if TYPE_CHECKING:
    from onnx import ModelProto

FRONT_ENDS = (LEGACY, DYNAMO)
"""In the order in which ``"auto"`` tries them."""


def choose_front_end(name: str) -> FrontEnd:
    """Return the front end of a name, or for ``"auto"`` the first one that this PyTorch has.

    Raises:
        QatkitError: an unknown name, or this PyTorch does not have it.
    """
    by_name = {front_end.name: front_end for front_end in FRONT_ENDS}
    if name == "auto":
        found = next((one for one in FRONT_ENDS if not one.missing()), None)
    elif name in by_name:
        found = None if by_name[name].missing() else by_name[name]
    else:
        known = ", ".join(repr(one) for one in ("auto", *by_name))
        raise QatkitError(f"export_onnx(front_end={name!r}): unknown; give one of {known}")
    if found is None:
        lacking = by_name.get(name, FRONT_ENDS[-1])
        raise QatkitError(f"export_onnx(front_end={name!r}): {lacking.missing()}")
    return found


def trace(
    lowered: nn.Module,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    front_end: FrontEnd,
    opset: int,
    dynamic_batch: bool,
) -> ModelProto:
    """Return what the exporter makes of ``lowered``, with marker nodes in it.

    Args:
        lowered: the lowered copy; it takes tensors one by one afterwards.
        model: the model it was made from, for names.
        args: positional arguments, float32 on the CPU.
        kwargs: keyword arguments.
        front_end: the exporter.
        opset: the opset that is wanted in the end; the file has the nearest one that the front end
            writes.
        dynamic_batch: leave the batch dimension open.

    Raises:
        QatkitError: the exporter cannot express the model.
    """
    inputs = arguments(model, args, kwargs)
    with settings_kept():
        result = _run(lowered, args, kwargs, type(model).__name__)
        outputs = output_names(result)
        take_tensors(lowered, args, kwargs, result)
        traceable = Traceable(
            module=lowered,
            tensors=tuple(tensors((args, kwargs))),
            input_names=tuple(input_names(inputs)),
            output_names=tuple(outputs),
            batch_axes=batch_axes(inputs, outputs, dynamic=dynamic_batch),
            name=type(model).__name__,
        )
        return front_end.write(traceable, front_end.nearest(opset))


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    try:
        return model(*args, **kwargs)
    except QatkitError:
        raise
    except Exception as error:
        raise QatkitError(
            f"{name}: does not run on example_inputs ({shorten(str(error), 160)}); "
            "give what it was prepared with"
        ) from None
