"""Quantized recurrent cells, one time step at a time (rules F1 and F2)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.nn.quantized import QuantizedComposite
from qatkit.nn.recurrent import Direction, GRUDirection, LSTMDirection, Quantize, RNNDirection
from qatkit.nn.registry import quantizes
from qatkit.nn.slots import Slots, quantizer_of


class _Cell(QuantizedComposite, nn.RNNCellBase):
    """What the cells have in common; they differ in `direction`. Each call is seen by itself."""

    @classmethod
    def slots(cls, layer: nn.Module) -> Slots:
        """Return the quantizers of the two products."""
        hidden = ("hidden_quantizer", quantizer_of("weight_hh"))
        return Slots(parameters=("weight_ih",), inner=(hidden,))

    @abstractmethod
    def direction(self, hidden: Quantize, weight: Tensor) -> Direction:
        """Return what a time step does; ``hidden`` quantizes the hidden state."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Map (N, H_in) or (H_in,), and the state before in the form of ``torch.nn``, to the next.

        Raises:
            QatkitError: a size does not fit.
        """
        before = None if hx is None else tuple(hx) if isinstance(self, nn.LSTMCell) else (hx,)
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)
        if before is None:
            count = 2 if isinstance(self, nn.LSTMCell) else 1
            before = tuple(x.new_zeros(x.shape[0], self.hidden_size) for _ in range(count))
        elif not batched:
            before = tuple(each.unsqueeze(0) for each in before)
        self._check(x, self.input_size, "input", x)
        for each in before:
            self._check(each, self.hidden_size, "hx", x)
        weight = self.quantized_parameter("weight_ih")
        gates = F.linear(self.quantized_input(x), weight, self._input_bias())
        hidden = self.get_submodule("hidden_quantizer")
        direction = self.direction(hidden, self.quantized_parameter("weight_hh"))
        after = direction.step(gates, before)
        if not batched:
            after = tuple(each.squeeze(0) for each in after)
        return after if isinstance(self, nn.LSTMCell) else after[0]

    def _input_bias(self) -> Tensor | None:
        """Return what is added to the input's part of the gates: both biases."""
        return self.bias_ih + self.bias_hh if self.bias else None

    def _check(self, x: Tensor, size: int, name: str, input: Tensor) -> None:
        if x.dim() != 2 or x.shape[1] != size or x.shape[0] != input.shape[0]:
            raise QatkitError(
                f"{type(self).__name__}: {name} of shape {tuple(x.shape)}, counted as a batch; "
                f"give (N, {self.input_size}) and a state of (N, {self.hidden_size}), "
                "or both without N"
            )


@quantizes(nn.LSTMCell)
class QuantLSTMCell(_Cell, nn.LSTMCell):
    """``torch.nn.LSTMCell`` with quantized products; biases, gates and cell state stay float.

    Takes the arguments of ``torch.nn.LSTMCell``, then ``weight_spec`` and ``input_spec``.

    >>> hidden, cell = QuantLSTMCell(4, 8)(torch.randn(3, 4))
    >>> hidden.shape, cell.shape
    (torch.Size([3, 8]), torch.Size([3, 8]))
    """

    def direction(self, hidden: Quantize, weight: Tensor) -> Direction:
        """Return what a time step does."""
        return LSTMDirection(hidden, weight)


@quantizes(nn.GRUCell)
class QuantGRUCell(_Cell, nn.GRUCell):
    """``torch.nn.GRUCell`` with quantized products; biases and gates stay float.

    Takes the arguments of ``torch.nn.GRUCell``, then ``weight_spec`` and ``input_spec``.

    >>> QuantGRUCell(4, 8)(torch.randn(3, 4)).shape
    torch.Size([3, 8])
    """

    def direction(self, hidden: Quantize, weight: Tensor) -> Direction:
        """Return what a time step does."""
        return GRUDirection(hidden, weight, self._biases()[1])

    def _input_bias(self) -> Tensor | None:
        """Return what is added to the input's part of the gates."""
        return self._biases()[0]

    def _biases(self) -> tuple[Tensor | None, Tensor | None]:
        return GRUDirection.biases(self.bias_ih, self.bias_hh) if self.bias else (None, None)


@quantizes(nn.RNNCell)
class QuantRNNCell(_Cell, nn.RNNCell):
    """``torch.nn.RNNCell`` with quantized products; biases and the activation stay float.

    Takes the arguments of ``torch.nn.RNNCell``, then ``weight_spec`` and ``input_spec``.

    >>> QuantRNNCell(4, 8, nonlinearity="relu")(torch.randn(3, 4)).shape
    torch.Size([3, 8])
    """

    def direction(self, hidden: Quantize, weight: Tensor) -> Direction:
        """Return what a time step does."""
        return RNNDirection(hidden, weight, getattr(torch, self.nonlinearity))
