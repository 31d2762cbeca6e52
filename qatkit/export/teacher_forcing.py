"""Teacher forcing: every layer of a file computes from the model's own quantized tensors.

The file runs piece by piece while the model runs, each piece as soon as the model has made what it
reads, and what nothing reads any more is forgotten.
"""

from __future__ import annotations

import dataclasses
import hashlib
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qatkit.errors import QatkitError
from qatkit.export.codes import Constants, compare_codes
from qatkit.export.onnx_file import OnnxFile
from qatkit.export.onnx_runtime import Array, PieceRunner
from qatkit.export.pieces import Piece, cut, quantizer_pairs
from qatkit.export.qdq import SUFFIX_DQ, split_rows
from qatkit.export.verify_report import QuantizerCheck
from qatkit.kernels.portable import along
from qatkit.modes import quantizers
from qatkit.nn.weights import weights_of
from qatkit.quantizer import TensorQuantizer

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_SELECTING = frozenset({"NonMaxSuppression", "NonZero", "TopK", "Unique"})

Call = tuple[str, int]
"""The name of a quantizer, and which of its calls in the file."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What one call of a quantizer gave in the model, and its scale, to broadcast.

    The codes are those less the zero point.
    """

    codes: Array
    scale: Array


class Forcing:
    """Runs a file beside a model: each piece on the model's tensors and on the file's own.

    Args:
        file: the file.
        feeds: the inputs by name.
        merged: names of quantizers whose calls on equal tensors are one call in the file: it drops
            copies such as ``clone``.

    Attributes:
        checks: each quantizer call of an activation, in the file and in the model.
        names: the quantizers that ran in the model.
        constants: calls of quantizers that are on a constant in the file.
        surplus: names of quantizers that the model called more often than the file has them.
    """

    def __init__(self, file: OnnxFile, feeds: dict[str, Array], merged: set[str]) -> None:
        """Cut the file."""
        self.checks: list[QuantizerCheck] = []
        self.names: list[str] = []
        self.constants: dict[Call, Seen] = {}
        self.surplus: set[str] = set()
        self._file, self._merged = file, merged
        self._values = Constants(file)
        graph = file.model.graph
        self._pieces = cut(graph)
        self._next = 0
        self._uses = Counter(name for piece in self._pieces for name in piece.reads)
        self._uses.update(value.name for value in graph.output)
        self._own, self._forced = dict(feeds), dict(feeds)
        self._seen: dict[str, Seen] = {}
        self._selected = _selected(graph)
        self._in_file: dict[str, set[int]] = {}
        self._fixed: set[Call] = set()
        self._nodes: dict[Call, list[NodeProto]] = {}
        pairs = {dq.output[0] for _, dq in quantizer_pairs(graph)}
        for node in graph.node:
            if node.op_type == "DequantizeLinear":
                name, index = quantizer_of(node)
                self._in_file.setdefault(name, set()).add(index)
                if node.output[0] in pairs:
                    self._nodes.setdefault((name, index), []).append(node)
                else:
                    self._fixed.add((name, index))
        self._counts: Counter[str] = Counter()
        self._sources: dict[str, list[Any]] = {}

    def run_quantizer(self, name: str, source: Tensor, result: Tensor, scale: Tensor) -> None:
        """Take what a quantizer of the model gave, and run the pieces that waited for it."""
        known = self._sources.setdefault(name, [])
        if any(each() is source for each in known if isinstance(each, weakref.ref)):
            return
        known.append(weakref.ref(source))
        if name in self._merged:
            digest = _digest(source)
            if digest in known:
                return
            known.append(digest)
        call = name, self._counts[name]
        self._counts[name] += 1
        if name not in self._in_file:
            return
        if call[1] not in self._in_file[name]:
            if name not in self._merged:
                self.surplus.add(name)
            return
        step = torch.as_tensor(scale)
        seen = Seen(torch.round(result / step).to(torch.int32).numpy(), step.numpy())
        if call in self._fixed:
            self.constants[call] = seen
        for dq in self._nodes.get(call, ()):
            self._seen[dq.output[0]] = seen
            kind = self._values[dq.input[1]].dtype
            if self._uses[dq.output[0]]:
                # a copy: an activation behind it may write to the result
                self._forced[dq.output[0]] = result.numpy().astype(kind, copy=True)
        self._run_ready()

    def finish(self) -> tuple[list[Array], list[Array]]:
        """Return the outputs of the file: computed by itself, and from the model's tensors.

        Raises:
            QatkitError: the file has a quantizer that the model has not.
        """
        self._run_ready()
        if self._next < len(self._pieces):
            for _, dq in self._pieces[self._next].pairs:
                if dq.output[0] not in self._seen:
                    raise not_in_model(self._file, quantizer_of(dq)[0])
            raise QatkitError(
                f"{self._file.path}: its nodes are in no order in which they can run; "
                "export the model again"
            )
        names = [value.name for value in self._file.model.graph.output]
        fixed = {name: self._values[name] for name in names if name in self._values}
        own, forced = self._own | fixed, self._forced | fixed
        return [own[name] for name in names], [forced[name] for name in names]

    def _run_ready(self) -> None:
        """Run pieces in the order of the file as far as what they read is there."""
        while self._next < len(self._pieces) and not self.surplus:
            piece = self._pieces[self._next]
            if not piece.reads <= self._forced.keys():
                return
            if any(dq.output[0] not in self._seen for _, dq in piece.pairs):
                return
            self._run(piece)
            self._next += 1

    def _run(self, piece: Piece) -> None:
        if piece.nodes:
            runner = PieceRunner(self._file, piece, (self._own, self._forced))
            own, _ = runner.run(self._own)
            forced, codes = runner.run(self._forced)
            for (q, dq), found in zip(piece.pairs, codes, strict=True):
                self.checks.append(self._check(q, dq, found))
            self._own |= own
            self._forced = forced | self._forced  # what the model gave stays
        self._uses.subtract(piece.reads)
        for name in (*piece.reads, *piece.makes):
            if not self._uses[name]:
                self._own.pop(name, None)
                self._forced.pop(name, None)

    def _check(self, q: NodeProto, dq: NodeProto, found: Array) -> QuantizerCheck:
        seen = self._seen.pop(dq.output[0])
        selected = q.input[0] in self._selected
        if selected and found.shape != seen.codes.shape:
            size = int(seen.codes.size)  # another number of elements in the file
            name = dq.name.removesuffix(SUFFIX_DQ)
            return QuantizerCheck(name, size, size, 0, selected=True)
        check = compare_codes(dq, found, seen.codes, seen.scale, self._values)
        return dataclasses.replace(check, selected=selected)


@contextmanager
def watched(model: nn.Module, forcing: Forcing) -> Iterator[None]:
    """Show ``forcing`` what each quantizer does; of those of parameters only the name.

    What a layer quantizes of a parameter may be a part of it.
    """
    weights = {id(weight.quantizer) for weight in weights_of(model)}
    handles = []

    def hook(quantizer: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        assert isinstance(quantizer, TensorQuantizer)
        if quantizer.name not in forcing.names:
            forcing.names.append(quantizer.name)
        if id(quantizer) not in weights:
            scale = along(quantizer.scale, result, quantizer.spec.axis)
            forcing.run_quantizer(quantizer.name, given[0], result, torch.as_tensor(scale))

    for path, quantizer in quantizers(model):
        quantizer.name = quantizer.name or path
        if quantizer.quantize:
            handles.append(quantizer.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _digest(tensor: Tensor) -> bytes:
    """Return what tells tensors apart."""
    values = (tensor.detach() + 0).contiguous().numpy()  # +0.0 for -0.0
    digest = hashlib.blake2b(repr((values.shape, values.dtype)).encode())
    digest.update(values.data)
    return digest.digest()


def _selected(graph: Any) -> set[str]:
    """Return the names of the tensors that depend on a selection by value, up to the next DQ."""
    forced = {dq.output[0] for _, dq in quantizer_pairs(graph)}
    names: set[str] = set()
    for node in graph.node:
        if node.op_type in _SELECTING or not names.isdisjoint(node.input):
            names.update(set(node.output) - forced)
    return names


def selects(proto: ModelProto) -> bool:
    """Tell whether a file picks elements by value, so that a last bit can change its outputs."""
    return any(node.op_type in _SELECTING for node in proto.graph.node)


def not_in_model(file: OnnxFile, name: str) -> QatkitError:
    """Return what to raise for a quantizer of a file that the model has not."""
    return QatkitError(
        f"{file.path}: its quantizer {name!r} is not in the model; "
        "verify with the model it was exported from"
    )


def quantizer_of(dq: NodeProto) -> tuple[str, int]:
    """Return the name of the quantizer that a DequantizeLinear belongs to, and which call it is."""
    name, _, number = dq.name.removesuffix(SUFFIX_DQ).partition("#")
    return split_rows(name)[0], int(number or 0)
