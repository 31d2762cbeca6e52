"""Ranges as JSON encodings: a list for each tensor, with one entry or one for each channel.

    {"version": "0.6.1",
     "activation_encodings": {"conv1.input_quantizer": [{"bitwidth": 8, "dtype": "int",
        "is_symmetric": "True", "max": 1.27, "min": -1.28, "offset": -128, "scale": 0.01}]},
     "param_encodings": {"conv1.weight_quantizer": [...]}}

Codes are counted from 0: ``x = scale (code + offset)``, code = 0 .. 2^bitwidth - 1, and ``min`` and
``max`` are the values of the first and the last code.

Source: AIMET, "Quantization encodings file format", version 0.6.1.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qatkit.errors import QatkitError
from qatkit.tables.text import read_text, write_text

VERSION = "0.6.1"
_NUMBERS = ("min", "max", "scale", "offset")


@dataclass(frozen=True)
class Encoding:
    """The grid of one tensor or channel.

    Attributes:
        bitwidth: width of a code.
        is_symmetric: whether 0 stands in the middle of the codes, or first.
        min: value of the first code.
        max: value of the last code.
        scale: step of the grid.
        offset: minus the code of 0, counted from 0.
    """

    bitwidth: int
    is_symmetric: bool
    min: float
    max: float
    scale: float
    offset: int


@dataclass(frozen=True)
class Encodings:
    """The encodings of a model.

    Attributes:
        activations: name -> one encoding for each channel, or one.
        params: the same for the weights.

    >>> grid = Encoding(8, True, -1.28, 1.27, 0.01, -128)
    >>> Encodings.parse(Encodings({"conv1": (grid,)}).text()).activations["conv1"][0] == grid
    True
    """

    activations: Mapping[str, tuple[Encoding, ...]]
    params: Mapping[str, tuple[Encoding, ...]] = field(default_factory=dict)

    def text(self) -> str:
        """Return the JSON, indented."""
        content = {
            "version": VERSION,
            "activation_encodings": _plain(self.activations),
            "param_encodings": _plain(self.params),
        }
        return json.dumps(content, indent=4) + "\n"

    @classmethod
    def parse(cls, text: str, where: str = "encodings") -> Encodings:
        """Read the JSON of a file; ``where`` names it in messages.

        Raises:
            QatkitError: it is no JSON (the message has the line), or not of encodings.
        """
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise QatkitError(
                f"{where}, line {error.lineno}: no JSON ({error.msg}); give a whole file"
            ) from None
        if not isinstance(content, dict) or "activation_encodings" not in content:
            raise QatkitError(f"{where}: no 'activation_encodings', give a file of encodings")
        parts = ("activation_encodings", "param_encodings")
        return cls(*(_parse_part(content.get(part, {}), f"{where}, {part}") for part in parts))


def read_encodings(path: str | os.PathLike[str]) -> Encodings:
    """Read a file of encodings.

    Raises:
        QatkitError: the file cannot be read, or is no JSON of encodings.
    """
    return Encodings.parse(read_text(path), os.fspath(path))


def write_encodings(encodings: Encodings, path: str | os.PathLike[str]) -> None:
    """Write a file of encodings, completely or not at all.

    Raises:
        QatkitError: a file cannot be made there.
    """
    write_text(path, encodings.text())


def _plain(part: Mapping[str, tuple[Encoding, ...]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [_plain_encoding(each) for each in group] for name, group in part.items()}


def _plain_encoding(each: Encoding) -> dict[str, Any]:
    return {
        "bitwidth": each.bitwidth,
        "dtype": "int",
        "is_symmetric": str(each.is_symmetric),
        "max": each.max,
        "min": each.min,
        "offset": each.offset,
        "scale": each.scale,
    }


def _parse_part(part: object, where: str) -> dict[str, tuple[Encoding, ...]]:
    if not isinstance(part, dict):
        raise QatkitError(f"{where}: a {type(part).__name__}, give an object of lists by name")
    found = {}
    for name, group in part.items():
        if not isinstance(group, list) or not group:
            raise QatkitError(f"{where}: {name!r} is no list, give a list of encodings")
        found[name] = tuple(_parse_encoding(each, f"{where}, {name!r}") for each in group)
    return found


def _parse_encoding(each: object, where: str) -> Encoding:
    fields = each if isinstance(each, dict) else {}
    bits, numbers = fields.get("bitwidth"), [fields.get(name) for name in _NUMBERS]
    whole = isinstance(bits, int) and not isinstance(bits, bool)
    if not whole or not all(_is_finite(number) for number in numbers):
        raise QatkitError(
            f"{where}: {each!r}, give an object with bitwidth and finite {', '.join(_NUMBERS)}"
        )
    if fields.get("dtype", "int") != "int":
        raise QatkitError(f"{where}: dtype {fields['dtype']!r}, give only integer encodings")
    low, high, scale, offset = numbers
    symmetric = str(fields.get("is_symmetric", "False")).lower() == "true"
    return Encoding(bits, symmetric, float(low), float(high), float(scale), int(offset))  # type: ignore[arg-type]


def _is_finite(number: object) -> bool:
    plain = isinstance(number, int | float) and not isinstance(number, bool)
    return plain and math.isfinite(number)  # type: ignore[arg-type]
