#!/usr/bin/env bash
# Runs the checks and tests on a CPU.
#
#   bash recipes/test.sh           ruff, mypy, the tests and a two-step training run: what CI runs
#   bash recipes/test.sh slow      the longer training runs: two ranks, resume, a critic, Ctrl-C, a dead rollout engine
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
