#!/usr/bin/env bash
# From nothing to a verified INT8 file: makes .venv, installs qatkit, runs recipes/digits.py.
# Arguments go to the recipe: bash scripts/quickstart.sh --help
set -euo pipefail
here=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh" onnx,vision
root=$PWD
cd "$here"
exec python "$root/recipes/digits.py" "$@"
