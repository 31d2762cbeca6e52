"""`InputData`: the samples of a folder or a list of files, as batches that a model takes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from qatkit.data.arrays import read_npy, read_npz, unnamed
from qatkit.data.image_preprocess import ImagePreprocess
from qatkit.data.listing import Sample, files_of_folder, files_of_list, one_kind
from qatkit.errors import QatkitError

Batch: TypeAlias = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
Shapes: TypeAlias = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class InputData:
    """Batches of the samples in some files; iterate over it as often as you like.

    Nothing is kept in memory, and the order is always the same. A batch is a tensor, a tuple of
    tensors where the model has several inputs, or a dict where the arrays of .npz files have names.

    Attributes:
        where: the folder or list, for messages.
        kind: ``"images"``, ``"npy"`` or ``"npz"``.
        samples: the files of each sample, one for each input.
        batch_size: samples in a batch; the last one may have less.
        preprocess: how images become tensors, ``None`` for arrays.
        shapes: the shape of each input of one sample, in the order of the inputs; ``None`` for that
            of the first sample.
    """

    where: str
    kind: str
    samples: tuple[Sample, ...]
    batch_size: int
    preprocess: ImagePreprocess | None = None
    shapes: Shapes | None = None

    def __len__(self) -> int:
        """Return how many batches there are."""
        return -(-len(self.samples) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches.

        Raises:
            QatkitError: a file cannot be read, or its shape or dtype is not that of the others.
        """
        first: dict[str, Tensor] | None = None
        for start in range(0, len(self.samples), self.batch_size):
            rows = []
            for sample in self.samples[start : start + self.batch_size]:
                inputs = self._read(sample)
                if first is None:
                    first = inputs
                rows.append(self._checked(inputs, first, sample))
            yield self._batch(rows)

    def _read(self, sample: Sample) -> dict[str, Tensor]:
        """Return the inputs of one sample by name or number."""
        if self.preprocess is not None:
            return {str(i): self.preprocess.read(path) for i, path in enumerate(sample)}
        if self.kind == "npy":
            return {str(i): read_npy(path) for i, path in enumerate(sample)}
        found = [read_npz(path) for path in sample]
        if len(found) == 1 and not unnamed(found[0]):
            return found[0]
        flat = [tensor for arrays in found for tensor in arrays.values()]
        return {str(i): tensor for i, tensor in enumerate(flat)}

    def _checked(
        self, inputs: dict[str, Tensor], first: dict[str, Tensor], sample: Sample
    ) -> dict[str, Tensor]:
        """Return the inputs of a sample, all of the shape that they should have."""
        if list(inputs) != list(first) and sorted(inputs) != sorted(first):
            raise QatkitError(
                f"{sample[0]}: holds the arrays {', '.join(inputs)} and "
                f"{self.samples[0][0].name} {', '.join(first)}; give all files the same"
            )
        if self.shapes is not None and len(self.shapes) != len(inputs):
            raise QatkitError(
                f"{sample[0]}: {len(inputs)} inputs, shapes= has {len(self.shapes)}; "
                "give a shape for each"
            )
        checked = {}
        for index, name in enumerate(first):
            tensor, like = inputs[name], first[name]
            path = sample[min(index, len(sample) - 1)]
            wanted = tuple(like.shape) if self.shapes is None else self.shapes[index]
            if self.shapes is not None and tuple(tensor.shape) == (1, *wanted):
                tensor = tensor[0]  # saved with the batch axis
            if tuple(tensor.shape) != wanted or tensor.dtype != like.dtype:
                raise QatkitError(
                    f"{path}: shape {tuple(tensor.shape)}, {tensor.dtype}, and should be "
                    f"{wanted}, {like.dtype}{self._remedy(path)}"
                )
            checked[name] = tensor
        return checked

    def _remedy(self, path: Path) -> str:
        if self.preprocess is not None and self.preprocess.size is None:
            return "; give ImagePreprocess(size=...)"
        if self.shapes is not None:
            return "; give the shape of the files, or files of that shape"
        return f" as {self.samples[0][0].name}; give samples of one shape"

    def _batch(self, rows: list[dict[str, Tensor]]) -> Batch:
        joined = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        if not all(name.isdecimal() for name in joined):
            return joined
        tensors = tuple(joined.values())
        return tensors[0] if len(tensors) == 1 else tensors


def load_inputs(
    folder: str | os.PathLike[str] | None = None,
    *,
    data_list: str | os.PathLike[str] | None = None,
    samples: int | None = None,
    batch_size: int = 8,
    preprocess: ImagePreprocess | None = None,
    shapes: Sequence[Sequence[int]] | None = None,
) -> InputData:
    """Return the samples of a folder, or of the files that a list names, for `qatkit.calibrate`.

    Every file is a sample, or an input of one where a line of the list names several between
    commas: images, .npy files with an array each, or .npz files with one array for each input. The
    arrays of .npz files are inputs by name, those that were saved without a name by number. The
    files of a folder come in the order of their paths, those of a list in the order of the list.

    Args:
        folder: a folder with the files, or with folders of them.
        data_list: a text file with a sample per line, relative to its own folder.
        samples: use the first so many; ``None`` for all. Fewer files are no error.
        batch_size: samples in a batch.
        preprocess: how images become tensors; by default (C, H, W) with 0..1.
        shapes: the shape of each input of one sample. Arrays may then have a batch axis of length 1
            in front of it.

    Returns:
        a frozen `InputData`.

    Raises:
        QatkitError: not exactly one source, one that does not exist or is empty, files of several
            kinds, a number below 1, or ``preprocess`` for arrays.

    >>> import tempfile
    >>> import numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for index in range(3):
    ...         np.save(f"{folder}/{index}.npy", np.full((2, 4), index, np.float32))
    ...     data = load_inputs(folder, batch_size=2)
    ...     [tuple(batch.shape) for batch in data]
    [(2, 2, 4), (1, 2, 4)]
    """
    verb = "load_inputs"
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not whole and not (name == "samples" and value is None):
            raise QatkitError(f"{verb}({name}={value!r}): give a positive integer")
    if (folder is None) == (data_list is None):
        raise QatkitError(f"{verb}: give either a folder or data_list")
    source = Path(os.fspath(folder if folder is not None else data_list or ""))
    if folder is not None and not source.is_dir():
        remedy = "give it as data_list=" if source.is_file() else "give one that exists"
        raise QatkitError(f"{source}: no such folder; {remedy}")
    if data_list is not None and not source.is_file():
        raise QatkitError(f"{source}: no such list; give a text file with one sample per line")
    found = files_of_folder(source) if folder is not None else files_of_list(source)
    kind = one_kind(found, str(source))
    if preprocess is not None and kind != "images":
        raise QatkitError(f"{verb}(preprocess=...): {source} has {kind} files; it is for images")
    if kind == "images" and preprocess is None:
        preprocess = ImagePreprocess()
    checked = None if shapes is None else tuple(tuple(int(n) for n in each) for each in shapes)
    return InputData(str(source), kind, tuple(found[:samples]), batch_size, preprocess, checked)
