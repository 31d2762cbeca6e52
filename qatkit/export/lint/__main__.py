"""``python -m qatkit.export.lint FILE``."""

from __future__ import annotations

import sys

from qatkit.export.lint.command import main

if __name__ == "__main__":
    sys.exit(main())
