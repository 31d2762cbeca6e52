"""Write a file completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from qatkit.errors import QatkitError, shorten


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary name beside ``path``; the file written there takes its place at the end.

    After an error the temporary file is gone and what ``path`` held before is still there.

    Args:
        path: the file to write; a link is followed.

    Yields:
        the path to write to; it does not exist yet.

    Raises:
        QatkitError: a file cannot be made there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(folder + "/a.txt") as temporary:
    ...         _ = temporary.write_text("all of it")
    ...     Path(folder, "a.txt").read_text()
    'all of it'
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{os.urandom(4).hex()}.{target.name}")
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        temporary.touch(exist_ok=False)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        reason = error.strerror or shorten(str(error))
        raise QatkitError(
            f"{os.fspath(path)}: cannot be written ({reason}); give a file in a folder that exists "
            "and is writable, with enough space"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
