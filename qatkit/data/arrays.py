"""Read the tensors of .npy and .npz files."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qatkit.errors import QatkitError, shorten

Arrays = dict[str, Tensor]

_UNNAMED = re.compile(r"arr_(\d+)")


def read_npy(path: Path) -> Tensor:
    """Return the array of a .npy file; floating-point numbers as float32.

    Raises:
        QatkitError: the file cannot be read, or holds something else than numbers.
    """
    with _opened(path, np.ndarray) as array:
        return _tensor(array, path, "")


def read_npz(path: Path) -> Arrays:
    """Return the arrays of a .npz file by name, in the order of the file.

    Arrays that were saved without a name (``arr_0``, ``arr_1``) come in the order of their numbers.

    Raises:
        QatkitError: the file cannot be read, is empty, or holds something else than numbers.
    """
    with _opened(path, np.lib.npyio.NpzFile) as archive:
        names = list(archive.files)
        if all(_UNNAMED.fullmatch(name) for name in names):
            names.sort(key=lambda name: int(name[4:]))
        found = {name: _tensor(archive[name], path, f", array {name!r}") for name in names}
    if not found:
        raise QatkitError(f"{path}: holds no array; take it out of the data")
    return found


def unnamed(arrays: Arrays) -> bool:
    """Tell whether the arrays of a file were saved without names."""
    return all(_UNNAMED.fullmatch(name) for name in arrays)


@contextmanager
def _opened(path: Path, kind: type) -> Iterator[Any]:
    """Give what NumPy reads from a file, which is open meanwhile."""
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            if not isinstance(found, kind):
                raise QatkitError(f"{path}: is not what its suffix {path.suffix!r} says; rename it")
            yield found
    except QatkitError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise QatkitError(
            f"{path}: cannot be read as arrays ({shorten(str(error), 120)}); "
            "replace the file or take it out of the data"
        ) from None


def _tensor(array: np.ndarray[Any, Any], path: Path, which: str) -> Tensor:
    if array.dtype.kind not in "fiub":
        raise QatkitError(f"{path}{which}: dtype is {array.dtype}; save numbers")
    dtype = np.dtype(np.float32) if array.dtype.kind == "f" else array.dtype.newbyteorder("=")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        dtype = np.dtype(np.int64)  # torch computes with no others
    plain: Tensor = torch.from_numpy(np.array(array, dtype=dtype, order="C"))
    return plain
