"""Measure what `import qatkit` costs after `import torch`: the best of several fresh processes."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import time, torch
started = time.perf_counter()
import qatkit
print(time.perf_counter() - started)
"""


def main() -> None:
    """Print the best time in milliseconds."""
    runs = [
        float(subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True).stdout)
        for _ in range(7)
    ]
    print(f"import qatkit after import torch: {1000 * min(runs):.0f} ms, the best of {len(runs)}")


if __name__ == "__main__":
    main()
