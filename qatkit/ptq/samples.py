"""What a unit is trained on: its inputs in float and quantized, and what it should return."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qatkit.graph.structure import flatten, map_tensors, tensors
from qatkit.ptq.learned_step import random_mask
from qatkit.ptq.runs import Record

_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Samples:
    """Calls of a unit; where the first axis of all tensors counts samples, they are one call.

    Attributes:
        exact: the arguments in the float model, with its results as `Record.output`.
        quantized: the arguments in the quantized model.
        rows: the length of the first axis of all tensors, 0 where it does not count samples.
    """

    exact: tuple[Record, ...]
    quantized: tuple[Record, ...]
    rows: int

    @classmethod
    def of(cls, exact: list[Record], quantized: list[Record], sizes: list[int]) -> Samples:
        """Join records of batches of ``sizes`` samples into one where that is possible."""
        joined = _joined(exact, sizes), _joined(quantized, sizes)
        if joined[0] is None or joined[1] is None:
            return cls(tuple(exact), tuple(quantized), 0)
        return cls((joined[0],), (joined[1],), sum(sizes))

    def with_targets(self, unit: Callable[..., Any]) -> Samples:
        """Return the same with the results of a float unit."""
        with torch.no_grad():
            return self._with(
                [
                    Record(e.args, e.kwargs, unit(*_at(e, None).args, **e.kwargs))
                    for e, _ in self.parts()
                ],
                [q for _, q in self.parts()],
            )

    def onward(self, unit: Callable[..., Any]) -> Samples:
        """Return what a unit behind this one gets, which is now ``unit`` in the quantized model."""
        with torch.no_grad():
            return self._with(
                [Record((e.output,), {}) for e, _ in self.parts()],
                [Record((unit(*q.args, **q.kwargs),), {}) for _, q in self.parts()],
            )

    def _with(self, exact: list[Record], quantized: list[Record]) -> Samples:
        if not self.rows:
            return Samples(tuple(exact), tuple(quantized), 0)
        sizes = [min(_AT_ONCE, self.rows - start) for start in range(0, self.rows, _AT_ONCE)]
        return Samples.of(exact, quantized, sizes)

    def parts(self) -> Iterator[tuple[Record, Record]]:
        """Yield all in pieces that fit in memory, ``(exact, quantized)``."""
        for exact, quantized in zip(self.exact, self.quantized, strict=True):
            if not self.rows:
                yield exact, quantized
                continue
            for start in range(0, self.rows, _AT_ONCE):
                piece = slice(start, start + _AT_ONCE)
                yield _at(exact, piece), _at(quantized, piece)

    def shuffled(self) -> Samples:
        """Return the same in random order, so that neighbours are a random choice."""
        if not self.rows:
            return self
        order = torch.randperm(self.rows)
        return Samples((_at(self.exact[0], order),), (_at(self.quantized[0], order),), self.rows)

    def choose(self, count: int) -> tuple[Record, Record]:
        """Return ``count`` neighbours at random, or one call where calls are not samples."""
        if not self.rows:
            index = int(torch.randint(len(self.exact), ()))
            return _at(self.exact[index], None), _at(self.quantized[index], None)
        # A slice keeps the memory format.
        start = int(torch.randint(max(1, self.rows - count + 1), ()))
        piece = slice(start, start + count)
        return _at(self.exact[0], piece), _at(self.quantized[0], piece)

    def count(self, record: Record) -> int:
        """Return how many samples a record holds, 1 for a call where calls are not samples."""
        return tensors(record.output)[0].shape[0] if self.rows else 1

    def mean_energy(self) -> float:
        """Return the mean sum of squares of the exact results, for a sample or a call."""
        return sum(energy(e.output) for e in self.exact) / (self.rows or len(self.exact))


def mixed(exact: Record, quantized: Record, share: float) -> Record:
    """Return the quantized arguments with a random ``share`` of their elements exact."""
    if share <= 0:
        return quantized
    others = iter(tensors((exact.args, exact.kwargs)))

    def mix(x: Tensor) -> Tensor:
        other = next(others)
        if not x.is_floating_point() or x.shape != other.shape:
            return x
        return torch.lerp(x, other, random_mask(x, share))

    args, kwargs = map_tensors((quantized.args, quantized.kwargs), mix)
    return Record(args, kwargs, quantized.output)


def distance(found: Any, wanted: Any) -> Tensor:
    """Return the squared distance of all float tensors in two results, summed."""
    total = torch.zeros(())
    for x, y in zip(tensors(found), tensors(wanted), strict=True):
        if x.is_floating_point():
            total = total.to(x.device) + (x.float() - y.float()).square().sum()
    return total


def energy(wanted: Any) -> float:
    """Return the sum of squares of all float tensors in a result."""
    return float(sum(y.float().square().sum() for y in tensors(wanted) if y.is_floating_point()))


def _joined(records: list[Record], sizes: list[int]) -> Record | None:
    """Return one record with all rows, ``None`` if the first axis does not count samples."""
    if len(records) != len(sizes):
        return None
    flat = [flatten((r.args, r.kwargs, r.output)) for r in records]
    template, leaves = flat[0]
    for (other, found), size in zip(flat, sizes, strict=True):
        if other != template:
            return None
        for x, y in zip(leaves, found, strict=True):
            if not y.dim() or y.shape[0] != size or y.shape[1:] != x.shape[1:]:
                return None
    columns = iter([torch.cat(rows) for rows in zip(*(found for _, found in flat), strict=True)])
    whole = (records[0].args, records[0].kwargs, records[0].output)
    return Record(*map_tensors(whole, lambda _: next(columns)))


def _at(record: Record, rows: Any) -> Record:
    """Return a copy of some rows, of all for ``None``."""

    def pick(x: Tensor) -> Tensor:
        if rows is None or isinstance(rows, slice):
            return (x if rows is None else x[rows]).clone()
        picked = torch.empty_like(x)  # in its memory format, which indexing loses
        return picked.copy_(x[rows])

    whole = (record.args, record.kwargs, record.output)
    return Record(*map_tensors(whole, pick))
