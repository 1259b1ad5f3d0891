#!/usr/bin/env bash
# Sets up a virtual environment, then checks style and runs the tests in it.
#   scripts/test.sh [VENV] [pytest arguments…]      VENV: where to make it; default .venv-test
#   EXTRAS=test,parity scripts/test.sh              with torch: parity with transformers and peft, too
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${1:-.venv-test}"
shift || true
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --upgrade pip
"$venv/bin/python" -m pip install --quiet -e ".[${EXTRAS:-test}]"
"$venv/bin/python" -m ruff check .
"$venv/bin/python" -m pytest -q -n auto --dist loadfile --no-loadscope-reorder --durations=30 "$@"  # a process for each core
