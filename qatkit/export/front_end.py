"""What an ONNX exporter of PyTorch must do for `export_onnx`: the interface of a front end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from onnx import ModelProto


@dataclass(frozen=True, eq=False)
class Traceable:
    """A lowered model, ready for an exporter.

    Attributes:
        module: takes ``tensors`` one by one and returns a tensor or a tuple of tensors.
        tensors: float32 on the CPU, or integers.
        input_names: one name for each tensor.
        output_names: one for each result, or none: the exporter then chooses.
        batch_axes: names of the open dimensions by input or output and axis.
        name: the class of the model, for messages.
    """

    module: nn.Module
    tensors: tuple[Tensor, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    batch_axes: Mapping[str, Mapping[int, str]]
    name: str


@dataclass(frozen=True, eq=False)
class FrontEnd:
    """One exporter of PyTorch.

    Attributes:
        name: as the user chooses it.
        opsets: what it writes by itself; `qatkit.export.opset_conversion` makes the others.
        missing: returns what this PyTorch lacks for it, ``""`` if nothing.
        write: returns the file at one of ``opsets``, a marker node for each quantizer, weights
            inside, no local functions. Raises QatkitError for a model that it cannot express.
    """

    name: str
    opsets: range
    missing: Callable[[], str]
    write: Callable[[Traceable, int], ModelProto]

    def nearest(self, opset: int) -> int:
        """Return the opset to write on the way to ``opset``."""
        return min(max(opset, self.opsets[0]), self.opsets[-1])
