#!/usr/bin/env bash
# Runs the checks and tests on a CPU.
#
#   bash recipes/test.sh           ruff, mypy, the tests and training runs of two steps: what CI runs (under half an hour)
#   bash recipes/test.sh slow      longer runs (an hour): two ranks, two nodes, resume, kill -9 of each part, hostile answers
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash recipes/install_cpu.sh
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
case "${1:-}" in
  "") exec .venv/bin/python -m pytest ;;
  slow) exec .venv/bin/python -m pytest -m slow ;;
  *) echo "unknown argument '$1'; accepted: nothing, or slow" >&2; exit 2 ;;
esac
