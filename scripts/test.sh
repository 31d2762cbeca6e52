#!/usr/bin/env bash
# Sets up .venv if needed, then runs every check. Arguments go to pytest: bash scripts/test.sh -m "not slow"
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh" dev
python -m ruff check .
python -m ruff format --check .
python -m mypy --strict qatkit
exec python -m pytest -q "$@"
