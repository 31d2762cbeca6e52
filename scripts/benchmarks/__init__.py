"""The parts of `scripts/bench.py`, one module for each benchmark."""
