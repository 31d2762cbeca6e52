"""The calibration data of an algorithm, and what goes in and out of a module while it runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.batches import BatchReader, device_of, to_device
from qatkit.errors import QatkitError, QatkitTypeError, shorten
from qatkit.graph.level import float_class
from qatkit.graph.structure import map_tensors, tensors
from qatkit.modes import select_quantizers

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Stop(BaseException):
    """Everything that a forward was run for is known."""


@dataclass(frozen=True, eq=False)
class Record:
    """One call of a module.

    Attributes:
        args: positional arguments.
        kwargs: arguments by name.
        output: what it returned, ``None`` if that was not asked for.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None


@dataclass(frozen=True, eq=False)
class Runs:
    """A model and the batches that it runs on.

    Attributes:
        model: the model.
        batches: its arguments for each batch.
        where: the algorithm, for messages.
    """

    model: nn.Module
    batches: tuple[Arguments, ...]
    where: str

    @classmethod
    def read(cls, model: nn.Module, data: Iterable[Any], batches: int | None, where: str) -> Runs:
        """Take the batches out of ``data``, as `qatkit.calibrate` does.

        Raises:
            QatkitError: no quantizers in the model, no batches in the data, or a wrong type.
        """
        select_quantizers(model, "*", where)
        if isinstance(data, Tensor | str | bytes | dict | nn.Module) or not isinstance(
            data, Iterable
        ):
            raise QatkitTypeError(
                f"{where}: data is a {type(data).__name__}; give an iterable of batches, "
                "for example a DataLoader or [x]"
            )
        whole = isinstance(batches, int) and not isinstance(batches, bool) and batches >= 1
        if batches is not None and not whole:
            raise QatkitError(
                f"{where}(batches={batches!r}): give a positive integer, or None for all"
            )
        reader, device = BatchReader(model), device_of(model)
        found = tuple(
            to_device(reader.arguments(batch, index), device)
            for index, batch in enumerate(islice(data, batches))
        )
        if not found:
            raise QatkitError(
                f"{where}: the data has no batches; give a fresh iterator or a longer data set"
            )
        return cls(model, found, where)

    def data(self) -> list[Any]:
        """Return the batches in a form that `read` takes again."""
        return [args if not kwargs else self._named(args, kwargs) for args, kwargs in self.batches]

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        names = list(inspect.signature(float_class(type(self.model)).forward).parameters)[1:]
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def run_all(self) -> None:
        """Run the model on every batch, for hooks."""
        for index in range(len(self.batches)):
            self.run(index)

    def run(self, index: int) -> Any:
        """Run the model on one batch without gradients; return its output."""
        args, kwargs = self.batches[index]
        with torch.no_grad():
            try:
                return self.model(*_copy(args), **_copy(kwargs))
            except (QatkitError, Stop):
                raise
            except Exception as error:
                shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in tensors((args, kwargs)))
                raise QatkitError(
                    f"{self.where}: {type(self.model).__name__} does not run on batch {index}, "
                    f"{shapes} ({shorten(str(error))}); give the data that it is used with"
                ) from error

    def size(self, index: int) -> int:
        """Return the number of samples in a batch, by the first axis of its first tensor."""
        first = tensors(self.batches[index])[0]
        return first.shape[0] if first.dim() else 1

    def inputs(self, module: nn.Module, calls: int = 1) -> list[Record]:
        """Return the arguments of every call of a module; it is called so often in each batch."""
        found: list[Record] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(Record(_copy(args), _copy(kwargs)))
            if len(found) % calls == 0:
                raise Stop

        with ExitStack() as stack:
            handle = module.register_forward_pre_hook(keep, with_kwargs=True)
            stack.callback(handle.remove)
            self._run_all()
        return found

    def until(self, module: nn.Module, calls: int = 1) -> None:
        """Run all batches up to the last call of a module; other hooks on it come first."""
        seen = [0]

        def stop(*_: Any) -> None:
            seen[0] += 1
            if seen[0] % calls == 0:
                raise Stop

        handle = module.register_forward_hook(stop)
        try:
            self._run_all()
        finally:
            handle.remove()

    def of(self, model: nn.Module) -> Runs:
        """Return the same batches for another model."""
        return Runs(model, self.batches, self.where)

    def sizes(self, calls: int = 1) -> list[int]:
        """Return the number of samples in each call of a module that runs so often in a batch."""
        return [self.size(index) for index in range(len(self.batches)) for _ in range(calls)]

    def _run_all(self) -> None:
        for index in range(len(self.batches)):
            with suppress(Stop):
                self.run(index)


def _copy(value: Any) -> Any:
    """Return a copy that no operation in place can reach."""
    return map_tensors(value, lambda tensor: tensor.detach().clone())
