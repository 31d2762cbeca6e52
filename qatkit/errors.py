"""The errors of qatkit: one base class, so that one ``except`` catches them all.

Every message is one line: what is wrong, where (module path or file), the offending value, and the
remedy.
"""

from __future__ import annotations


class QatkitError(ValueError):
    """Base of every error that qatkit raises on purpose."""


class QatkitTypeError(QatkitError, TypeError):
    """An argument has the wrong type, for example a model that is not a ``torch.nn.Module``."""


class MissingExtraError(QatkitError, ImportError):
    """A feature needs a package that is not installed."""

    def __init__(self, package: str, extra: str | None = None) -> None:
        """Name the missing ``package`` and the ``extra`` that brings it, if there is one."""
        wanted = package if extra is None else f"'qatkit[{extra}]'"
        super().__init__(f"{package} is not installed: pip install {wanted}")
        self.package = package
        self.extra = extra


def shorten(text: str, limit: int = 300) -> str:
    r"""Return the first line of ``text``, cut to ``limit`` characters, for an error message.

    >>> shorten("first line\nsecond line")
    'first line'
    """
    line = text.strip().splitlines()[0] if text.strip() else ""
    return line if len(line) <= limit else line[: limit - 3] + "..."
