#!/usr/bin/env bash
# Sets up .venv if needed, then runs every check. Arguments go to pytest: bash scripts/test.sh -m "not slow"
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh" dev
python -m ruff check .
python -m ruff format --check .
python -m mypy --strict qatkit
export OMP_NUM_THREADS=1 # two processes on two cores: threads would only get in their way
exec python -m pytest -q -n 2 --dist loadgroup "$@"
