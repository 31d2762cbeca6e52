"""Which files the samples of a folder or of a list are."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from qatkit.errors import QatkitError, shorten

Sample = tuple[Path, ...]
"""The files of one sample, one for each input of the model."""

KINDS = {
    "images": (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"),
    "npy": (".npy",),
    "npz": (".npz",),
}
_KIND_OF = {suffix: kind for kind, suffixes in KINDS.items() for suffix in suffixes}


def kind_of(path: Path) -> str | None:
    """Return the kind of a file by its suffix, ``None`` for a file of no known kind.

    >>> kind_of(Path("a/B.JPG")), kind_of(Path("notes.txt"))
    ('images', None)
    """
    return _KIND_OF.get(path.suffix.lower())


def files_of_folder(folder: Path) -> list[Sample]:
    """Return the files in a folder and its subfolders, one for each sample, sorted by their paths.

    Hidden files and folders do not count, and neither do files of no known kind. The order is that
    of the characters of the relative path: it does not depend on file system or locale.

    Raises:
        QatkitError: there are none, or the folder cannot be read.
    """
    found: list[tuple[tuple[str, ...], Path]] = []
    try:
        for root, folders, files in os.walk(folder, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                path = Path(root, name)
                if not name.startswith(".") and kind_of(path):
                    found.append((path.relative_to(folder).parts, path))
    except OSError as error:
        raise QatkitError(f"{error.filename}: cannot be read ({error.strerror})") from None
    if not found:
        known = ", ".join(suffix for suffixes in KINDS.values() for suffix in suffixes)
        raise QatkitError(f"{folder}: no file of a known kind in it; give a folder with {known}")
    return [(path,) for _, path in sorted(found)]


def files_of_list(path: Path) -> list[Sample]:
    """Return the files that a list names: a sample for each line, its inputs between commas.

    Relative names start at the folder of the list. Empty lines do not count.

    Raises:
        QatkitError: the list cannot be read or is empty, a line names another number of files than
            the first one, a file of no known kind, or one that does not exist.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise QatkitError(
            f"{path}: cannot be read as a list of files ({shorten(str(error), 120)}); "
            "give a text file with one sample per line"
        ) from None
    found: list[Sample] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        names = [name.strip() for name in line.split(",")]
        where = f"{path}, line {number}"
        if found and len(names) != len(found[0]):
            raise QatkitError(
                f"{where}: has {len(names)} inputs and the lines before {len(found[0])}; "
                "name as many files on each line"
            )
        found.append(tuple(_file(path.parent, name, where) for name in names))
    if not found:
        raise QatkitError(f"{path}: names no files; write one sample per line")
    return found


def one_kind(samples: Iterable[Sample], where: str) -> str:
    """Return the kind that all files have.

    Raises:
        QatkitError: they have several.
    """
    first: dict[str, Path] = {}
    for sample in samples:
        for path in sample:
            first.setdefault(kind_of(path) or "", path)
    if len(first) > 1:
        (one, path), (other, another) = list(first.items())[:2]
        raise QatkitError(
            f"{where}: mixes {one} ({path.name}) and {other} ({another.name}); "
            "give files of one kind"
        )
    return next(iter(first))


def _file(folder: Path, name: str, where: str) -> Path:
    if not name:
        raise QatkitError(f"{where}: has an empty name between its commas; name a file")
    path = folder / name
    if not path.is_file():
        raise QatkitError(f"{where}: no file {os.fspath(path)!r}; names start at {folder}")
    if kind_of(path) is None:
        raise QatkitError(
            f"{where}: {path.name!r} is of no known kind; name images, .npy or .npz files"
        )
    return path


def _raise(error: OSError) -> None:
    raise error
