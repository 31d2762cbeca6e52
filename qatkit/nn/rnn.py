"""Quantized recurrent layers over whole sequences (rules F1 and F2).

The products are quantized: the input of each layer with ``weight_ih``, the hidden state with
``weight_hh``, what is projected with ``weight_hr``. Biases, gates and the cell state stay float. A
tracing exporter unrolls the time steps: the file is for the sequence length of its example.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from qatkit.errors import QatkitError
from qatkit.nn.quantized import QuantizedComposite
from qatkit.nn.recurrent import (
    Direction,
    GRUDirection,
    LSTMDirection,
    Quantize,
    RNNDirection,
    State,
    StepQuantizer,
    run,
)
from qatkit.nn.registry import quantizes
from qatkit.nn.slots import Slots, quantizer_of


class _Recurrent(QuantizedComposite, nn.RNNBase):
    """What LSTM, GRU and plain RNN have in common; they differ in `direction`."""

    @classmethod
    def slots(cls, layer: Any) -> Slots:
        """Return the quantizers of the products of each layer and direction."""
        inner: list[tuple[str, ...]] = []
        for k, ends in enumerate(_ends(layer)):
            if k:
                weights = [quantizer_of(f"weight_ih_{end}") for end in ends]
                inner.append((f"input_l{k}_quantizer", *weights))
            for end in ends:
                inner.append((f"hidden_{end}_quantizer", quantizer_of(f"weight_hh_{end}")))
                if layer.proj_size:
                    inner.append((f"projection_{end}_quantizer", quantizer_of(f"weight_hr_{end}")))
        return Slots(
            parameters=tuple(f"weight_ih_{end}" for end in _ends(layer)[0]), inner=tuple(inner)
        )

    @abstractmethod
    def direction(self, end: str, hidden: Quantize, projection: Quantize | None) -> Direction:
        """Return what a layer and direction does at each time step.

        Args:
            end: how the names of its parameters end.
            hidden: quantizes the hidden state.
            projection: quantizes what is projected; ``None`` for no projection.
        """

    def forward(
        self, input: Tensor | PackedSequence, hx: Any = None
    ) -> tuple[Tensor | PackedSequence, Any]:
        """Run over (L, N, H_in), (N, L, H_in) with ``batch_first``, (L, H_in), or packed sequences.

        Args:
            input: the sequences.
            hx: the state before them as in ``torch.nn``, ``None`` for zeros.

        Returns:
            the hidden states of the last layer in the form of ``input``, and the last state of each
            layer and direction.

        Raises:
            QatkitError: no time steps, or packed sequences while the layer is exported.
        """
        before = hx if hx is None or isinstance(hx, tuple) else (hx,)
        output: Tensor | PackedSequence
        if isinstance(input, PackedSequence):
            output, after = self._run_packed(input, before)
        else:
            output, after = self._run_padded(input, before)
        return output, after if isinstance(self, nn.LSTM) else after[0]

    def _run_packed(
        self, packed: PackedSequence, before: State | None
    ) -> tuple[PackedSequence, State]:
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise QatkitError(
                f"{type(self).__name__}: the lengths of a PackedSequence would become constants of "
                "the file; export the model with a padded tensor"
            )
        before = before and _rows(before, packed.sorted_indices)
        self._check(packed.data, before, packed.batch_sizes)
        sizes = packed.batch_sizes.tolist()
        output, after = self._run_layers(packed.data, before, sizes)
        return PackedSequence(output, *packed[1:]), _rows(after, packed.unsorted_indices)

    def _run_padded(self, x: Tensor, before: State | None) -> tuple[Tensor, State]:
        if x.dim() == 3:
            self._check(x, before, None)
            return self._run_layers(x, before, None)
        batch = 0 if self.batch_first else 1
        one = x.unsqueeze(batch)
        before = before and tuple(each.unsqueeze(1) for each in before)
        self._check(one, before, None)
        output, after = self._run_layers(one, before, None)
        return output.squeeze(batch), tuple(each.squeeze(1) for each in after)

    def _check(self, x: Tensor, before: State | None, sizes: Tensor | None) -> None:
        """Raise what ``torch.nn`` raises for sizes that do not fit."""
        if before is None:
            self.check_input(x, sizes)
        else:
            state: Any = before if isinstance(self, nn.LSTM) else before[0]
            self.check_forward_args(x, state, sizes)
        if x.shape[self._time if sizes is None else 0] == 0:
            raise QatkitError(
                f"{type(self).__name__}: got a sequence without time steps, of shape "
                f"{tuple(x.shape)}; give at least one"
            )

    def _run_layers(
        self, x: Tensor, before: State | None, sizes: list[int] | None
    ) -> tuple[Tensor, State]:
        """Return the output of the last layer and the last states, each (layers, N, H)."""
        states = self._states(x, before, sizes)
        after: list[State] = []
        for k, ends in enumerate(_ends(self)):
            x = self.get_submodule(f"input_l{k}_quantizer")(x) if k else self.quantized_input(x)
            both = [
                self._run_direction(x, end, states[len(after) + i], sizes)
                for i, end in enumerate(ends)
            ]
            after += [state for _, state in both]
            x = both[0][0] if len(both) == 1 else torch.cat([output for output, _ in both], dim=-1)
            if self.dropout and k + 1 < self.num_layers:
                x = F.dropout(x, self.dropout, self.training)
        return x, tuple(torch.stack(each) for each in zip(*after, strict=True))

    def _run_direction(
        self, x: Tensor, end: str, before: State, sizes: list[int] | None
    ) -> tuple[Tensor, State]:
        """Multiply all time steps with the input's weight at once, then go through them."""
        gates = F.linear(x, self.quantized_parameter(f"weight_ih_{end}"), self._input_bias(end))
        steps = gates.unbind(self._time) if sizes is None else torch.split(gates, sizes)
        reverse = end.endswith("_reverse")
        names = [f"{part}_{end}_quantizer" for part in ("hidden", "projection")]
        found = [StepQuantizer(self.get_submodule(name)) for name in names if name in self._modules]
        direction = self.direction(end, *found, *[None] * (len(names) - len(found)))
        outputs, after = run(direction, steps, before, sizes, reverse=reverse)
        for quantizer in found:
            quantizer.finish()
        output = torch.stack(outputs, self._time) if sizes is None else torch.cat(outputs)
        return output, after

    def _states(self, x: Tensor, before: State | None, sizes: list[int] | None) -> list[State]:
        """Return the state before the first step for each layer and direction."""
        if before is not None:
            return list(zip(*(each.unbind(0) for each in before), strict=True))
        rows = x.shape[1 - self._time] if sizes is None else sizes[0]
        widths = [self.proj_size or self.hidden_size]
        if isinstance(self, nn.LSTM):
            widths.append(self.hidden_size)
        every = [end for ends in _ends(self) for end in ends]
        return [tuple(x.new_zeros(rows, width) for width in widths) for _ in every]

    def _input_bias(self, end: str) -> Tensor | None:
        """Return what is added to the input's part of the gates: both biases."""
        if not self.bias:
            return None
        both: Tensor = getattr(self, f"bias_ih_{end}") + getattr(self, f"bias_hh_{end}")
        return both

    @property
    def _time(self) -> int:
        """The axis of the time steps in a padded tensor."""
        return 1 if self.batch_first else 0


@quantizes(nn.LSTM)
class QuantLSTM(_Recurrent, nn.LSTM):  # type: ignore[misc]
    """``torch.nn.LSTM`` with quantized products.

    Takes the arguments of ``torch.nn.LSTM``, then ``weight_spec`` and ``input_spec``. The hidden
    state of each layer and direction has one quantizer for all time steps; while ranges are
    estimated it quantizes with the range of the sequences before.

    >>> layer = QuantLSTM(4, 8, num_layers=2, batch_first=True)
    >>> output, (hidden, cell) = layer(torch.randn(3, 5, 4))
    >>> output.shape, hidden.shape
    (torch.Size([3, 5, 8]), torch.Size([2, 3, 8]))
    """

    def direction(self, end: str, hidden: Quantize, projection: Quantize | None) -> Direction:
        """Return what one layer and direction does at each time step."""
        weight = self.quantized_parameter(f"weight_hh_{end}")
        if projection is None:
            return LSTMDirection(hidden, weight)
        return LSTMDirection(
            hidden, weight, projection, self.quantized_parameter(f"weight_hr_{end}")
        )


@quantizes(nn.GRU)
class QuantGRU(_Recurrent, nn.GRU):  # type: ignore[misc]
    """``torch.nn.GRU`` with quantized products.

    Takes the arguments of ``torch.nn.GRU``, then ``weight_spec`` and ``input_spec``. Its quantizers
    are those of `QuantLSTM`.

    >>> output, hidden = QuantGRU(4, 8, bidirectional=True)(torch.randn(5, 3, 4))
    >>> output.shape, hidden.shape
    (torch.Size([5, 3, 16]), torch.Size([2, 3, 8]))
    """

    def direction(self, end: str, hidden: Quantize, projection: Quantize | None) -> Direction:
        """Return what one layer and direction does at each time step."""
        weight = self.quantized_parameter(f"weight_hh_{end}")
        return GRUDirection(hidden, weight, self._biases(end)[1])

    def _input_bias(self, end: str) -> Tensor | None:
        """Return what is added to the input's part of the gates."""
        return self._biases(end)[0]

    def _biases(self, end: str) -> tuple[Tensor | None, Tensor | None]:
        if not self.bias:
            return None, None
        return GRUDirection.biases(getattr(self, f"bias_ih_{end}"), getattr(self, f"bias_hh_{end}"))


@quantizes(nn.RNN)
class QuantRNN(_Recurrent, nn.RNN):  # type: ignore[misc]
    """``torch.nn.RNN`` with quantized products.

    Takes the arguments of ``torch.nn.RNN``, then ``weight_spec`` and ``input_spec``. Its quantizers
    are those of `QuantLSTM`.

    >>> output, hidden = QuantRNN(4, 8, nonlinearity="relu")(torch.randn(5, 3, 4))
    >>> output.shape, hidden.shape
    (torch.Size([5, 3, 8]), torch.Size([1, 3, 8]))
    """

    def direction(self, end: str, hidden: Quantize, projection: Quantize | None) -> Direction:
        """Return what one layer and direction does at each time step."""
        activation = torch.relu if self.mode == "RNN_RELU" else torch.tanh
        return RNNDirection(hidden, self.quantized_parameter(f"weight_hh_{end}"), activation)


def _ends(layer: Any) -> list[list[str]]:
    """Return how the names of the parameters end, for each layer and direction.

    >>> _ends(nn.GRU(2, 2, num_layers=2, bidirectional=True))
    [['l0', 'l0_reverse'], ['l1', 'l1_reverse']]
    """
    directions = ("", "_reverse") if layer.bidirectional else ("",)
    return [[f"l{k}{direction}" for direction in directions] for k in range(layer.num_layers)]


def _rows(state: State, order: Tensor | None) -> State:
    """Return a state with its sequences, axis 1, in another order."""
    return state if order is None else tuple(each.index_select(1, order) for each in state)
