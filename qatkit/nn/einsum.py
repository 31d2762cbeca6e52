"""Einsum of two tensors as a matrix product with quantized factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Contraction:
    """How an equation becomes one ``torch.matmul``: the order of axes of each tensor.

    Attributes:
        left: permutation of the first factor, to (..., rows, contracted).
        right: permutation of the second factor, to (..., contracted, columns).
        result: permutation of (..., rows, columns) to what the equation asks for.
    """

    left: tuple[int, ...]
    right: tuple[int, ...]
    result: tuple[int, ...]


class Einsum(nn.Module):
    """``torch.einsum`` of two tensors with a quantizer for each.

    An equation that is a batched matrix product is computed as one, which engines run in INT8.
    """

    operands: ClassVar[tuple[tuple[str, ...], ...]] = (("left_quantizer", "right_quantizer"),)

    def forward(self, equation: Any, *factors: Any) -> Tensor:
        """Contract two tensors, given as ``torch.einsum`` takes them."""
        quantizers: Any = self
        if not isinstance(equation, str):
            equation, factors = _from_lists(equation, *factors)
        left, right = factors[0] if len(factors) == 1 else factors
        plan = contraction(equation)
        if plan is None:
            factors = (quantizers.left_quantizer(left), quantizers.right_quantizer(right))
            result: Tensor = torch.einsum(equation, *factors)
            return result
        left = quantizers.left_quantizer(_permuted(left, plan.left))
        right = quantizers.right_quantizer(_permuted(right, plan.right))
        return _permuted(torch.matmul(left, right), plan.result)


def contraction(equation: str) -> Contraction | None:
    """Return how an equation becomes a matrix product, ``None`` if it is none.

    It is one if a single index is summed, each factor keeps an index that the other has not, and
    one factor at most has more of them than one.

    >>> contraction("bhic,bhjc->bhij")
    Contraction(left=(0, 1, 2, 3), right=(0, 1, 3, 2), result=(0, 1, 2, 3))
    >>> contraction("bij,bj->b") is None
    True
    """
    factors, arrow, result = equation.replace(" ", "").partition("->")
    parts = factors.split(",")
    if not arrow or len(parts) != 2 or "." in equation:
        return None
    left, right = parts
    if any(len(set(part)) != len(part) for part in (left, right, result)):
        return None
    batch = [index for index in left if index in right and index in result]
    summed = [index for index in left if index in right and index not in result]
    rows = [index for index in left if index not in right]
    columns = [index for index in right if index not in left]
    kept = {*batch, *rows, *columns} == set(result)
    if len(summed) != 1 or not rows or not columns or not kept:
        return None
    if len(rows) > 1 and len(columns) > 1:
        return None
    outer = rows[:-1] + columns[:-1]
    made = [*outer, *batch, rows[-1], columns[-1]]
    return Contraction(
        _order(left, [*rows[:-1], *batch, rows[-1], *summed]),
        _order(right, [*columns[:-1], *batch, *summed, columns[-1]]),
        _order("".join(made), list(result)),
    )


def _from_lists(
    left: Tensor, axes: list[Any], right: Tensor, others: list[Any], *result: list[Any]
) -> tuple[str, tuple[Tensor, Tensor]]:
    """Return the equation of two tensors and the lists of numbers of their axes."""

    def letters(numbers: list[Any]) -> str:
        return "".join("..." if n is ... else chr(ord("a") + n) for n in numbers)

    equation = f"{letters(axes)},{letters(others)}"
    return equation + "".join(f"->{letters(numbers)}" for numbers in result), (left, right)


def _order(have: str, want: list[str]) -> tuple[int, ...]:
    return tuple(have.index(index) for index in want)


def _permuted(x: Tensor, order: tuple[int, ...]) -> Tensor:
    return x if order == tuple(range(len(order))) else x.permute(order)
