"""Keep an exporter from printing whole graphs."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def output_held() -> Iterator[None]:
    """Hold back what is printed, by C++ code too, and print it at the end; after an error drop it.

    PyTorch prints the whole graph, thousands of lines, before it raises.
    """
    out, err = io.StringIO(), io.StringIO()
    redirected = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with _descriptor_held(1), _descriptor_held(2), redirected[0], redirected[1]:
        yield
    sys.stdout.write(out.getvalue())
    sys.stderr.write(err.getvalue())


@contextlib.contextmanager
def _descriptor_held(number: int) -> Iterator[None]:
    """Do it for a file descriptor, below Python's own streams."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    try:
        terminal = os.dup(number)
    except OSError:  # no such output, so nothing to hold back
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), number)
        try:
            yield
            held.seek(0)
            os.write(terminal, held.read())
        finally:
            os.dup2(terminal, number)
            os.close(terminal)
