"""Run a model over the batches of a data loader, for what it sees and not for what it returns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from qatkit.batches import BatchReader, device_of, to_device
from qatkit.errors import QatkitError, QatkitTypeError, shorten
from qatkit.graph.structure import tensors
from qatkit.progress import progress_bar


def check_data(data: object, batches: int | None, verb: str) -> None:
    """Raise a `QatkitError` that starts with ``verb`` unless data and limit can be run over."""
    if isinstance(data, Tensor | str | bytes | dict | nn.Module) or not isinstance(data, Iterable):
        raise QatkitTypeError(
            f"{verb}: data is a {type(data).__name__}; give an iterable of batches, "
            "for example a DataLoader or [x]"
        )
    whole = isinstance(batches, int) and not isinstance(batches, bool)
    if batches is not None and not (whole and batches >= 1):
        raise QatkitError(f"{verb}(batches={batches!r}): give a positive integer, or None for all")


def run_over(
    model: nn.Module,
    data: Iterable[Any],
    limit: int | None,
    verb: str,
    *,
    progress: bool,
    after_batch: Callable[[], None] | None = None,
) -> tuple[int, int]:
    """Run the model over the data without gradients.

    Args:
        model: in the mode that it is to run in.
        data: see `check_data` and `qatkit.batches.BatchReader`.
        limit: use only so many batches; ``None`` for all.
        verb: who runs, for messages and the progress bar.
        progress: show a progress bar if tqdm is installed and the output is a terminal.
        after_batch: called after each batch.

    Returns:
        how many batches and samples there were; see `require_batches`.

    Raises:
        QatkitError: a batch has no input, or the model does not run on one.
    """
    reader, device = BatchReader(model), device_of(model)
    count = samples = 0
    with torch.no_grad():
        for batch in _with_progress(data, limit, verb, progress):
            args, kwargs = to_device(reader.arguments(batch, count), device)
            given = tensors((args, kwargs))
            try:
                model(*args, **kwargs)
            except QatkitError:
                raise
            except Exception as error:
                shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in given)
                raise QatkitError(
                    f"{type(model).__name__}: does not run on batch {count}, {shapes} "
                    f"({shorten(str(error))}); give {verb} the data that the model is used with"
                ) from error
            if after_batch is not None:
                after_batch()
            count += 1
            samples += given[0].shape[0] if given[0].dim() else 1
    return count, samples


def require_batches(count: int, verb: str) -> None:
    """Raise a `QatkitError` that starts with ``verb`` if there were no batches."""
    if not count:
        raise QatkitError(
            f"{verb}: the data has no batches; give a fresh iterator or a longer data set"
        )


def uncompiled() -> AbstractContextManager[Any]:
    """Let compiled models run eagerly: their graphs know nothing of the hooks."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _with_progress(
    data: Iterable[Any], limit: int | None, verb: str, progress: bool
) -> Iterable[Any]:
    """Return the first ``limit`` batches, with a bar on a terminal."""
    lengths = [length for length in (limit, _length(data)) if length is not None]
    total = min(lengths, default=None)
    return progress_bar(islice(data, limit), verb, "batch", progress, total)


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None
