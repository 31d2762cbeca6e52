"""Quantized embeddings: the table is quantized, the indices are integers anyway.

One scale for the whole table is the default: only then can an engine gather the codes and scale
what it gathered. With ``axis=0`` each row has its own.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.nn.quantized import QuantizedComposite
from qatkit.nn.registry import quantizes
from qatkit.nn.slots import Slots
from qatkit.quantizer import TensorQuantizer
from qatkit.spec import QuantSpec

_MAX_NORM = "max_norm changes the table while it is read"


class _Table(QuantizedComposite):
    """A layer that reads rows of a table; its range is that of the whole table.

    Only the rows that are read are put on the grid, which costs little and keeps a sparse gradient
    sparse. The range still costs a pass over the table in each forward, until it is frozen.
    """

    weight: Tensor
    padding_idx: int | None
    scale_grad_by_freq: bool
    sparse: bool
    default_axis: ClassVar[int | None] = None

    def __init__(self, *args: Any, weight_spec: QuantSpec | None = None, **kwargs: Any) -> None:
        """Make the float layer from its own arguments, then add the quantizer.

        Args:
            *args: arguments of the float layer.
            weight_spec: spec of the table; 8 bit, per-tensor by default.
            **kwargs: arguments of the float layer.

        Raises:
            QatkitError: ``max_norm`` is given.
        """
        super().__init__(*args, weight_spec=weight_spec, **kwargs)
        if self.refusal(self):
            raise QatkitError(
                f"{type(self).__name__}: {_MAX_NORM}; leave it out, or use the layer of torch.nn"
            )

    @classmethod
    def slots(cls, layer: nn.Module) -> Slots:
        """Return the quantizer of the table."""
        return Slots(inputs={}, parameters=("weight",))

    @classmethod
    def refusal(cls, layer: nn.Module) -> str:
        """Return why a float layer cannot be swapped."""
        return "" if getattr(layer, "max_norm", None) is None else _MAX_NORM

    def rows(self, indices: Tensor) -> Tensor:
        """Return the quantized rows (..., E) at the indices (...)."""
        quantizer = self.get_submodule("weight_quantizer")
        if not isinstance(quantizer, TensorQuantizer):  # while exporting: a file holds whole tables
            return F.embedding(indices, quantizer(self.weight))
        at = indices.flatten()
        options = (self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse)
        part: Tensor = quantizer(self.weight, F.embedding(at, self.weight, *options), at)
        return part.reshape(*indices.shape, part.shape[-1])


@quantizes(nn.Embedding)
class QuantEmbedding(_Table, nn.Embedding):
    """``torch.nn.Embedding`` with a quantized table.

    Takes the arguments of ``torch.nn.Embedding``, then ``weight_spec``; ``max_norm`` is refused.

    >>> QuantEmbedding(10, 4, padding_idx=0)(torch.tensor([[1, 0, 9]])).shape
    torch.Size([1, 3, 4])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map indices (...) to rows (..., E)."""
        return self.rows(input)


@quantizes(nn.EmbeddingBag)
class QuantEmbeddingBag(_Table, nn.EmbeddingBag):
    """``torch.nn.EmbeddingBag`` with a quantized table; the sum, mean or maximum is float.

    Takes the arguments of ``torch.nn.EmbeddingBag``, then ``weight_spec``; ``max_norm`` is refused.

    >>> QuantEmbeddingBag(10, 4, mode="sum")(torch.tensor([[1, 0, 9], [2, 2, 3]])).shape
    torch.Size([2, 4])
    """

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Map bags (B, L), or (n,) with the offsets (B,) at which they begin, to (B, E).

        Raises:
            QatkitError: the arguments do not go together.
        """
        self._check(input, offsets, per_sample_weights)
        counts = None if self.padding_idx is None else input != self.padding_idx
        rows = self.rows(input)
        if offsets is None:
            return self._reduced(rows, counts, per_sample_weights)
        at = torch.arange(len(rows), device=rows.device)
        padding = None
        if counts is not None:
            padding = len(rows)
            at = torch.where(counts, at, padding)
            rows = F.pad(rows, (0, 0, 0, 1))
        return F.embedding_bag(
            at,
            rows,
            offsets.to(at.dtype),
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding,
        )

    def _reduced(
        self, rows_BLE: Tensor, counts_BL: Tensor | None, weights_BL: Tensor | None
    ) -> Tensor:
        """Return the sum, mean or maximum (B, E) of the rows that count."""
        if weights_BL is not None:
            rows_BLE = rows_BLE * weights_BL.unsqueeze(-1)
        out = None if counts_BL is None else torch.logical_not(counts_BL).unsqueeze(-1)
        if self.mode == "max":
            if out is None:
                return rows_BLE.max(dim=1).values
            largest = rows_BLE.masked_fill(out, -torch.inf).max(dim=1).values
            return largest.masked_fill(out.all(dim=1), 0.0)
        if out is None or counts_BL is None:
            return rows_BLE.sum(dim=1) if self.mode == "sum" else rows_BLE.mean(dim=1)
        total = rows_BLE.masked_fill(out, 0.0).sum(dim=1)
        if self.mode == "sum":
            return total
        return total / counts_BL.sum(dim=1, keepdim=True).clamp(min=1)

    def _check(self, input: Tensor, offsets: Tensor | None, weights: Tensor | None) -> None:
        where = f"{type(self).__name__}(mode={self.mode!r})"
        if input.is_nested or input.dim() != (2 if offsets is None else 1):
            given = "without offsets" if offsets is None else "with offsets"
            raise QatkitError(
                f"{where}: input with {input.dim()} dimensions {given}; "
                "give (B, L), or (n,) and the offsets (B,)"
            )
        if weights is not None and (self.mode != "sum" or weights.shape != input.shape):
            raise QatkitError(
                f"{where}: per_sample_weights of shape {tuple(weights.shape)}; "
                f"give them with mode='sum' and of the shape of the input, {tuple(input.shape)}"
            )
