"""Rule F18: no quantizer between a padding with zeros and the convolution behind it."""

from __future__ import annotations

from typing import Any

from qatkit.graph.capture import Call, Value
from qatkit.graph.levels import Levels
from qatkit.graph.structure import unflatten

_CONVOLUTIONS = ("Conv", "ConvTranspose")


def pad_before(call: Call, value: Value, levels: Levels) -> Call | None:
    """Return the padding that a convolution reads through, ``None`` if it quantizes behind it.

    Zero is on every symmetric grid: to quantize in front of the padding gives the same numbers.

    Args:
        call: a layer or function that reads ``value``.
        value: what it reads.
        levels: the forwards of the blocks; the quantizer is going to stand where the padding is.
    """
    pad = value.producer
    if pad is None or pad.kind != "Pad" or call.kind not in _CONVOLUTIONS:
        return None
    inside = f"{pad.parent.name}." if pad.parent is not None and pad.parent.name else ""
    reached = call.name.startswith(inside) if call.module is not None else call.parent is pad.parent
    alone = value.consumers == [call] and reached and not pad.inputs[0].constant
    return pad if alone and _adds_zeros(pad) and not levels.why_not(pad.parent) else None


def _adds_zeros(pad: Call) -> bool:
    module: Any = pad.module
    if module is not None:
        return not getattr(module, "value", 0)
    args, kwargs = unflatten(pad.template, iter(pad.inputs))
    given = dict(zip(("input", "pad", "mode", "value"), args, strict=False)) | kwargs
    return given.get("mode", "constant") == "constant" and not given.get("value")
