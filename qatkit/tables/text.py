"""Reading and writing whole text files, with errors that say where."""

from __future__ import annotations

import math
import os
from pathlib import Path

from qatkit.errors import QatkitError, shorten
from qatkit.files import replacing


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a UTF-8 file, its line ends as they are.

    Raises:
        QatkitError: it cannot be read or is no text.
    """
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        reason = error.strerror or shorten(str(error))
        raise QatkitError(
            f"{os.fspath(path)}: cannot be read ({reason}); give a file that is"
        ) from None
    except UnicodeDecodeError as error:
        raise QatkitError(
            f"{os.fspath(path)}: byte {error.start} is no UTF-8, give a text file"
        ) from None


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file with the line ends of ``text``, completely or not at all.

    Raises:
        QatkitError: a file cannot be made there.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def finite(text: str, where: str, what: str) -> float:
    """Return the number that ``text`` is.

    Raises:
        QatkitError: it is none, or not finite.

    >>> finite("1e-3", "a.txt line 1", "the threshold")
    0.001
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise QatkitError(f"{where}: {what} is {shorten(text, 40)!r}, give a finite number")
    return number
