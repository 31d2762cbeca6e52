"""`torch.nn.functional.grid_sample` in operators of opset 13, which has no GridSample.

The point ``(x, y)`` of the grid lies between four pixels, and the result is their mean weighted by
nearness: ``sum over corners of (1 - |x - x_c|) (1 - |y - y_c|) input[y_c, x_c]``.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

GRID_SAMPLE_OPSET = 16
"""The first opset with GridSample."""


def grid_sample(
    input: Tensor,
    grid: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> Tensor:
    """Sample by gathering pixels; what has no such form is left to PyTorch.

    Args:
        input: (N, C, H, W) float; H and W are those of this run.
        grid: (N, h, w, 2) of x and y in -1..1.
        mode: bilinear or nearest, else PyTorch's own.
        padding_mode: zeros or border, else PyTorch's own.
        align_corners: whether -1 and 1 are the centers of the outer pixels, not their edges.

    Returns:
        (N, C, h, w)

    >>> import torch
    >>> image, center = torch.arange(4.0).reshape(1, 1, 2, 2), torch.zeros(1, 1, 1, 2)
    >>> grid_sample(image, center, align_corners=False)
    tensor([[[[1.5000]]]])
    """
    known = mode in ("bilinear", "nearest") and padding_mode in ("zeros", "border")
    if input.dim() != 4 or not known:
        return F.grid_sample(input, grid, mode, padding_mode, align_corners)
    height, width = (int(length) for length in input.shape[-2:])
    x = _pixels(grid[..., 0], width, bool(align_corners))
    y = _pixels(grid[..., 1], height, bool(align_corners))
    if padding_mode == "border":
        x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
    if mode == "nearest":
        return _gathered(input, x.round(), y.round())
    left, top = x.floor(), y.floor()
    right, bottom = left + 1, top + 1
    corners = (
        (left, top, (right - x) * (bottom - y)),
        (right, top, (x - left) * (bottom - y)),
        (left, bottom, (right - x) * (y - top)),
        (right, bottom, (x - left) * (y - top)),
    )
    first, second, third, fourth = (_gathered(input, *at) * w.unsqueeze(1) for *at, w in corners)
    return first + second + third + fourth


def _pixels(coordinate: Tensor, length: int, align_corners: bool) -> Tensor:
    """Return the position in pixels of a coordinate in -1..1."""
    if align_corners:
        return (coordinate + 1) * ((length - 1) / 2)
    return (coordinate + 1) * (length / 2) - 0.5


def _gathered(input: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return the pixels of ``input`` (N, C, H, W) at whole x and y (N, h, w), 0 outside."""
    channels, height, width = (int(length) for length in input.shape[-3:])
    h, w = (int(length) for length in x.shape[-2:])
    column, row = x.clamp(0, width - 1), y.clamp(0, height - 1)
    inside = ((column == x) & (row == y)).to(input.dtype).unsqueeze(1)
    index = (row * width + column).long().reshape(-1, 1, h * w).expand(-1, channels, -1)
    pixels = input.flatten(2).gather(2, index).reshape(-1, channels, h, w)
    return pixels * inside
