"""The calibration cache of TensorRT.

The first line is ``TRT-<version>-EntropyCalibration2``, every other ``tensor: <scale>`` with the
big-endian IEEE-754 float32 of the scale in hexadecimal; codes are int8 and symmetric, so that
``scale = amax / 127``.

Source: TensorRT, ``IInt8EntropyCalibrator2.writeCalibrationCache``.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from qatkit.errors import QatkitError
from qatkit.tables.text import read_text, write_text

_HEAD = re.compile(r"TRT-(\w+)-(\w+)")
_HEX = re.compile(r"[0-9a-fA-F]{1,8}")


@dataclass(frozen=True)
class TensorRTCache:
    r"""A calibration cache; scales are rounded to float32.

    Attributes:
        scales: tensor name -> scale, in order.
        version: of TensorRT, as it stands in the first line.
        algorithm: as it stands there.

    Raises:
        QatkitError: a name or scale cannot be written.

    >>> cache = TensorRTCache({"input": 0.5, "conv1:0": 0.25})
    >>> print(cache.text(), end="")
    TRT-8601-EntropyCalibration2
    input: 3f000000
    conv1:0: 3e800000
    >>> TensorRTCache.parse(cache.text()) == cache
    True
    """

    scales: Mapping[str, float]
    version: str = "8601"
    algorithm: str = "EntropyCalibration2"

    def __post_init__(self) -> None:
        """Check every scale and round it."""
        if not _HEAD.fullmatch(f"TRT-{self.version}-{self.algorithm}"):
            raise QatkitError(
                f"TensorRTCache(version={self.version!r}, algorithm={self.algorithm!r}): give "
                "letters and digits"
            )
        rounded = {}
        for name, scale in self.scales.items():
            if not name or name != name.strip() or "\n" in name or "\r" in name:
                raise QatkitError(f"TensorRT cache: name {name!r}, give a line without ends")
            if not 0 <= scale <= _LARGEST:
                raise QatkitError(
                    f"TensorRT cache: {name!r} has scale {scale}, give a finite float32, not "
                    "negative"
                )
            rounded[name] = struct.unpack(">f", struct.pack(">f", scale))[0]
        object.__setattr__(self, "scales", rounded)

    def text(self) -> str:
        """Return the lines of the file."""
        rows = [f"{name}: {struct.pack('>f', s).hex()}" for name, s in self.scales.items()]
        return "".join(f"{x}\n" for x in [f"TRT-{self.version}-{self.algorithm}", *rows])

    @classmethod
    def parse(cls, text: str, where: str = "TensorRT cache") -> TensorRTCache:
        """Read the lines of a file; ``where`` names it in messages.

        Raises:
            QatkitError: a line is not as it has to be; the message has its number.
        """
        first, *lines = text.removesuffix("\n").split("\n")
        head = _HEAD.fullmatch(first.rstrip("\r"))
        if head is None:
            raise QatkitError(
                f"{where}, line 1: {first[:60]!r}, give TRT-<version>-EntropyCalibration2"
            )
        scales: dict[str, float] = {}
        for number, line in enumerate(lines, 2):
            name, scale = _parse_line(line, f"{where}, line {number}")
            if name in scales:
                raise QatkitError(
                    f"{where}, line {number}: {name!r} is there already, give each tensor once"
                )
            scales[name] = scale
        return cls(scales, head[1], head[2])


_LARGEST = (2 - 2**-23) * 2.0**127


def read_tensorrt_cache(path: str | os.PathLike[str]) -> TensorRTCache:
    """Read a calibration cache.

    Raises:
        QatkitError: the file cannot be read, or one of its lines, of which the message has the
            number.
    """
    return TensorRTCache.parse(read_text(path), os.fspath(path))


def write_tensorrt_cache(cache: TensorRTCache, path: str | os.PathLike[str]) -> None:
    """Write a calibration cache, completely or not at all.

    Raises:
        QatkitError: a file cannot be made there.
    """
    write_text(path, cache.text())


def _parse_line(line: str, where: str) -> tuple[str, float]:
    name, colon, digits = line.rstrip().rpartition(": ")
    if not colon or not name.strip() or not _HEX.fullmatch(digits):
        raise QatkitError(f"{where}: {line[:60]!r}, give 'tensor: <up to 8 hexadecimal digits>'")
    scale = float(struct.unpack(">f", bytes.fromhex(digits.zfill(8)))[0])
    if not (math.isfinite(scale) and scale >= 0):
        raise QatkitError(f"{where}: scale {scale}, give a finite one, not negative")
    return name.strip(), scale
