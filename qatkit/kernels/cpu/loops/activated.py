"""An activation that cuts, as ReLU does, and rounding to a grid behind it, in one pass.

With ``f(v) = min(max(v, floor), ceiling)``, the activation, and a grid, an element passes the
gradient where ``lower < v < upper``: where neither the activation nor the grid has cut it. Whether
it does is one bit. In each `PASSING_BLOCK` of elements, the bits of a byte are those of elements
that are an eighth of the block apart, so that packing is arithmetic on whole rows of bytes.
"""

from __future__ import annotations

import numpy as np

from qatkit.kernels.cpu.loops.memory import F32, compiled, floats, inner, octets

PASSING_BLOCK = 4096
BLOCK_BYTES = PASSING_BLOCK // 8


@compiled
def round_activated(x, bits, length, scale, low, high, floor, ceiling, lower, upper):
    """Write ``clamp(round(f(x) * (1 / scale)), low, high) * scale`` over ``x``.

    Args:
        x: address of (N,).
        bits: address of the bits, ``ceil(length / 8)`` bytes; 0 for nowhere.
        length: N.
        scale: the step.
        low: lowest code.
        high: highest code.
        floor: the lowest result of the activation.
        ceiling: the highest one.
        lower: elements up to this one pass no gradient.
        upper: nor do those from this one on.
    """
    x_N, step = floats(x, length), F32(scale)
    lowest, highest, least, most = F32(low), F32(high), F32(floor), F32(ceiling)
    ends = F32(lower), F32(upper)
    passing = np.empty(PASSING_BLOCK, np.uint8)
    packed = octets(bits, (length + 7) // 8 if bits != 0 else 0)
    for start in range(0, length, PASSING_BLOCK):
        part = x_N[start : start + PASSING_BLOCK]
        if packed.size:
            for i in range(part.size):
                passing[i] = 0 if part[i] <= ends[0] or part[i] >= ends[1] else 1
            _pack(passing, packed[start // 8 : (start + part.size + 7) // 8])
        _round_activated(part, step, lowest, highest, least, most)


@inner
def _round_activated(x, scale, low, high, floor, ceiling):
    inverse = F32(1) / scale
    for i in range(x.size):
        value = floor if x[i] < floor else x[i]
        value = ceiling if value > ceiling else value
        code = np.rint(value * inverse)
        code = low if code < low else code
        code = high if code > high else code
        x[i] = code * scale


@inner
def _pack(passing, packed):
    packed[:] = 0
    for k in range(8):
        row = passing[k * packed.size : (k + 1) * packed.size]
        for j in range(packed.size):
            packed[j] |= row[j] << k


@compiled
def pass_where(grad, bits, length):
    """Set the elements of (N,) at ``grad`` to zero whose bit is 0; see `round_activated`."""
    grad_N, packed = floats(grad, length), octets(bits, (length + 7) // 8)
    for start in range(0, length, PASSING_BLOCK):
        part = grad_N[start : start + PASSING_BLOCK]
        some = packed[start // 8 : (start + part.size + 7) // 8]
        for k in range(8):
            row = part[k * some.size : (k + 1) * some.size]
            for j in range(row.size):
                row[j] = row[j] if (some[j] >> k) & 1 else F32(0)


@compiled
def unpack(bits, passing, length):
    """Write the bits to (N,) bytes at ``passing``, 0 or 1; see `round_activated`."""
    packed, passing_N = octets(bits, (length + 7) // 8), octets(passing, length)
    for start in range(0, length, PASSING_BLOCK):
        part = passing_N[start : start + PASSING_BLOCK]
        some = packed[start // 8 : (start + part.size + 7) // 8]
        for k in range(8):
            row = part[k * some.size : (k + 1) * some.size]
            for j in range(row.size):
                row[j] = (some[j] >> k) & 1
