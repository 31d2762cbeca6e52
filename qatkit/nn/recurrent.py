"""The arithmetic of recurrent layers: one time step, and the loop over all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qatkit.quantizer import TensorQuantizer

State = tuple[Tensor, ...]
"""The hidden state (N, H_out), then the cell state (N, H) of an LSTM."""
Quantize = Callable[[Tensor], Tensor]


class Direction(ABC):
    """One direction of a recurrent layer, its weights as they are multiplied.

    The hidden state is quantized in front of its product, the rest is float.

    Args:
        hidden: quantizes the hidden state.
        weight: (G, H_out) of the hidden state.
    """

    def __init__(self, hidden: Quantize, weight: Tensor) -> None:
        """Keep the operands of the hidden product."""
        self._hidden = hidden
        self._weight_HG = weight.t()

    @abstractmethod
    def step(self, gates: Tensor, state: State) -> State:
        """Return the state after one time step; ``gates`` (N, G) is what the input adds."""


class LSTMDirection(Direction):
    """``c' = sigmoid(f) * c + sigmoid(i) * tanh(g)`` and ``h' = sigmoid(o) * tanh(c')``.

    The gates i, f, g and o are ``gates + W h``.

    Args:
        hidden: quantizes the hidden state.
        weight: (4 H, H_out) of the hidden state.
        projection: quantizes what is projected to the hidden state; ``None`` for no projection.
        projection_weight: (H_out, H).
    """

    def __init__(
        self,
        hidden: Quantize,
        weight: Tensor,
        projection: Quantize | None = None,
        projection_weight: Tensor | None = None,
    ) -> None:
        """Keep the operands of the products."""
        super().__init__(hidden, weight)
        self._size = int(weight.shape[0]) // 4
        self._projection = projection
        self._projection_HP = None if projection_weight is None else projection_weight.t()

    def step(self, gates: Tensor, state: State) -> State:
        """Return the hidden and the cell state after one time step."""
        hidden, cell = state
        gates = torch.addmm(gates, self._hidden(hidden), self._weight_HG)
        i, f, g, o = torch.split(gates, self._size, dim=1)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.sigmoid(o) * torch.tanh(cell)
        if self._projection is not None and self._projection_HP is not None:
            hidden = torch.mm(self._projection(hidden), self._projection_HP)
        return hidden, cell


class GRUDirection(Direction):
    """``n = tanh(gates_n + r * (W_n h + b))`` and ``h' = (1 - z) * n + z * h``.

    The gates r and z are ``sigmoid(gates + W h)``.

    Args:
        hidden: quantizes the hidden state.
        weight: (3 H, H) of the hidden state: W for r and z, then W_n.
        bias: (H,) b, ``None`` for none.
    """

    def __init__(self, hidden: Quantize, weight: Tensor, bias: Tensor | None) -> None:
        """Keep the operands of the products."""
        self._size = int(weight.shape[0]) // 3  # an exporter's tracer counts in tensors
        super().__init__(hidden, weight[: 2 * self._size])
        self._new_HH = weight[2 * self._size :].t()
        self._bias = bias

    def step(self, gates: Tensor, state: State) -> State:
        """Return the hidden state after one time step."""
        (hidden,) = state
        quantized = self._hidden(hidden)
        gates, new = torch.split(gates, [2 * self._size, self._size], dim=1)
        gates = torch.sigmoid(torch.addmm(gates, quantized, self._weight_HG))
        reset, update = torch.split(gates, self._size, dim=1)
        if self._bias is None:
            own = torch.mm(quantized, self._new_HH)
        else:
            own = torch.addmm(self._bias, quantized, self._new_HH)
        new = torch.tanh(new + reset * own)
        return (new + update * (hidden - new),)

    @staticmethod
    def biases(from_input: Tensor, from_hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return what to add to the input's part (3 H,) of all gates, and b (H,).

        Args:
            from_input: (3 H,) the bias of the input.
            from_hidden: (3 H,) the bias of the hidden state; r scales its last third.
        """
        gates = 2 * (from_input.shape[0] // 3)
        joint = from_input[:gates] + from_hidden[:gates]
        return torch.cat((joint, from_input[gates:])), from_hidden[gates:]


class RNNDirection(Direction):
    """``h' = f(gates + W h)``.

    Args:
        hidden: quantizes the hidden state.
        weight: (H, H) of the hidden state.
        activation: f.
    """

    def __init__(self, hidden: Quantize, weight: Tensor, activation: Quantize) -> None:
        """Keep the operands of the product."""
        super().__init__(hidden, weight)
        self._activation = activation

    def step(self, gates: Tensor, state: State) -> State:
        """Return the hidden state after one time step."""
        gates = torch.addmm(gates, self._hidden(state[0]), self._weight_HG)
        return (self._activation(gates),)


class StepQuantizer:
    """Quantizes one tensor at every time step, with one range for all of them.

    While the range is estimated, the steps of a sequence are quantized with what is remembered of
    the sequences before, and then seen together, as one tensor: one estimate for each sequence,
    whatever its length, in which all steps weigh the same.

    Args:
        quantizer: a `TensorQuantizer`, or what stands for one.
    """

    def __init__(self, quantizer: nn.Module) -> None:
        """Start a sequence."""
        self._quantizer = quantizer
        self._seen: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x`` on the grid."""
        quantizer = self._quantizer
        if isinstance(quantizer, TensorQuantizer) and quantizer.observing:
            self._seen.append(x.detach())
            return quantizer.unobserved(x)
        quantized: Tensor = quantizer(x)
        return quantized

    def finish(self) -> None:
        """Let the quantizer see the sequence, if it estimates its range."""
        if self._seen:
            self._quantizer(torch.cat(self._seen))


def run(
    direction: Direction,
    gates: Sequence[Tensor],
    start: State,
    sizes: Sequence[int] | None,
    *,
    reverse: bool,
) -> tuple[list[Tensor], State]:
    """Run one direction of a layer over a sequence.

    Args:
        direction: what a step computes.
        gates: what the input adds at each time step, (N_t, G).
        start: the state before the first step, N_0 rows.
        sizes: the rows N_t of each step, which do not grow, of sequences of several lengths;
            ``None`` where all have N_0.
        reverse: begin with the last time step.

    Returns:
        the hidden states after each step in the order of time, and the state of each sequence after
        its last step.
    """
    state = start
    ended: list[State] = []
    outputs: list[Tensor] = []
    for t in range(len(gates) - 1, -1, -1) if reverse else range(len(gates)):
        if sizes is not None:
            state, done = _with_rows(state, start, sizes[t])
            ended.append(done)
        state = direction.step(gates[t], state)
        outputs.append(state[0])
    if ended and not reverse:
        parts = [state, *ended[::-1]]
        state = tuple(torch.cat(each) for each in zip(*parts, strict=True))
    return outputs[::-1] if reverse else outputs, state


def _with_rows(state: State, start: State, rows: int) -> tuple[State, State]:
    """Return a state with so many rows, and those that it had more; new ones are at the start."""
    have = state[0].shape[0]
    if have < rows:
        pairs = zip(state, start, strict=True)
        state = tuple(torch.cat((now, first[have:rows])) for now, first in pairs)
    return tuple(each[:rows] for each in state), tuple(each[rows:] for each in state)
