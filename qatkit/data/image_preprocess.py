"""`ImagePreprocess`: how an image becomes the tensor that a model takes."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from qatkit.errors import MissingExtraError, QatkitError, shorten
from qatkit.spec import suggest

if TYPE_CHECKING:
    from PIL.Image import Image

Layout = Literal["CHW", "HWC"]
Color = Literal["RGB", "BGR", "L"]


@dataclass(frozen=True)
class ImagePreprocess:
    """How an image becomes a float32 tensor: ``(pixel / 255 - mean) / std``.

    Attributes:
        size: (height, width) of the tensor, or one number for both; ``None`` for that of the file.
        resize: scale the image so that its shorter side has so many pixels, then cut ``size`` out
            of the middle; ``None`` stretches it to ``size``. Bilinear, with antialiasing.
        mean: one number for each channel, or for all, in units of 0..1.
        std: the same.
        layout: order of the axes of a sample, ``"CHW"`` or ``"HWC"``.
        color: ``"RGB"``, ``"BGR"`` or ``"L"`` for one channel of brightness; mean and std are in
            this order.

    Raises:
        QatkitError: a field is out of its range, or two contradict each other.

    >>> imagenet = ImagePreprocess(
    ...     size=224, resize=256, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    ... )
    >>> imagenet.shape
    (3, 224, 224)
    """

    size: int | tuple[int, int] | None = None
    resize: int | None = None
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    layout: Layout = "CHW"
    color: Color = "RGB"

    def __post_init__(self) -> None:
        """Check every field."""
        for name, choices in (("layout", get_args(Layout)), ("color", get_args(Color))):
            if getattr(self, name) not in choices:
                remedy = suggest(str(getattr(self, name)), choices)
                raise QatkitError(f"ImagePreprocess({name}={getattr(self, name)!r}): {remedy}")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
            self._check_channels(name)
        if isinstance(self.size, list):
            object.__setattr__(self, "size", tuple(self.size))
        self._check_sizes()

    @property
    def channels(self) -> int:
        """How many channels the tensor has."""
        return 1 if self.color == "L" else 3

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of a sample, ``None`` where it is that of the file."""
        if self.size is None:
            return None
        height, width = self._height_width
        if self.layout == "HWC":
            return height, width, self.channels
        return self.channels, height, width

    def read(self, path: str | os.PathLike[str]) -> Tensor:
        """Return an image file as a float32 tensor, (C, H, W) or (H, W, C).

        Raises:
            QatkitError: the file is no image that can be read, it is smaller than ``size`` where
                that is cut out of it, or pillow is not installed.
        """
        try:
            from PIL import Image
        except ImportError:
            raise MissingExtraError("pillow", "vision") from None
        try:
            with Image.open(path) as image:
                converted = image.convert("L" if self.color == "L" else "RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise QatkitError(
                f"{os.fspath(path)}: cannot be read as an image ({shorten(str(error), 120)}); "
                "replace the file or take it out of the data"
            ) from None
        pixels = np.asarray(self._resized(converted, path), dtype=np.float32) / np.float32(255)
        pixels = pixels.reshape(*pixels.shape[:2], self.channels)  # (H, W, C)
        if self.color == "BGR":
            pixels = pixels[:, :, ::-1]
        pixels = (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        if self.layout == "CHW":
            pixels = pixels.transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(pixels))

    @property
    def _height_width(self) -> tuple[int, int]:
        assert self.size is not None
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def _resized(self, image: Image, path: str | os.PathLike[str]) -> Image:
        from PIL import Image as pillow

        if self.size is None:
            return image
        height, width = self._height_width
        bilinear = pillow.Resampling.BILINEAR
        if self.resize is None:
            same = image.size == (width, height)
            return image if same else image.resize((width, height), bilinear)
        shorter = min(image.size)
        scaled = [max(1, int(self.resize * side / shorter)) for side in image.size]
        image = image.resize((scaled[0], scaled[1]), bilinear)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        if left < 0 or top < 0:
            raise QatkitError(
                f"{os.fspath(path)}: is {image.height} x {image.width} with its shorter side at "
                f"{self.resize}, less than size={self.size!r}; give a larger resize, or None"
            )
        return image.crop((left, top, left + width, top + height))

    def _check_channels(self, name: str) -> None:
        value: Any = getattr(self, name)
        numbers = value if isinstance(value, tuple) else (value,)
        fine = all(_is_number(each) and (name == "mean" or each > 0) for each in numbers)
        if not fine or (isinstance(value, tuple) and len(value) != self.channels):
            above = "" if name == "mean" else " above 0"
            raise QatkitError(
                f"ImagePreprocess({name}={value!r}): give a number{above}, "
                f"or {self.channels} of them for {self.color}"
            )

    def _check_sizes(self) -> None:
        sides = self.size if isinstance(self.size, tuple) else (self.size,)
        if self.size is not None and not (len(sides) <= 2 and all(map(_is_length, sides))):
            raise QatkitError(
                f"ImagePreprocess(size={self.size!r}): give (height, width) in pixels or one number"
            )
        if self.resize is None:
            return
        if not _is_length(self.resize):
            raise QatkitError(
                f"ImagePreprocess(resize={self.resize!r}): give the shorter side in pixels"
            )
        if self.size is None or self.resize < min(self._height_width):
            raise QatkitError(
                f"ImagePreprocess(resize={self.resize}, size={self.size!r}): size is cut out of "
                "what resize makes, give one that fits in"
            )


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type]


def _is_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
