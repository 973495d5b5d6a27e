#!/usr/bin/env bash
# Runs the checks and tests on a CPU.
#
#   bash recipes/test.sh           ruff, mypy, the tests and a training run of two steps: what CI runs (ten minutes)
#   bash recipes/test.sh slow      all that takes longer (an hour and a half): two ranks, two nodes, kill -9 of each part,
#                                  every trainer, other engines, patches of older releases, the wheel. It needs a Chromium or
#                                  Chrome on the PATH, for the report's page
set -euo pipefail
unset PYTHONPATH PYTHONHOME # else an environment module's packages come first
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
  "" | slow) ;;
  -h | --help) sed -n '/^set/q; s/^# //p' recipes/test.sh; exit ;;
  *) echo "unknown argument '$1'; accepted: slow, --help, or nothing" >&2; exit 2 ;;
esac
bash recipes/install_cpu.sh
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
case "${1:-}" in
  # Two workers with a pool of threads each would wait for each other's: some tests then take four times as long.
  "") OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25 ;;
  slow)
    target=.venv
    source recipes/installer.sh
    install playwright==1.65.2  # drives the browser; too large (165 MB) for the set that everybody installs
    exec .venv/bin/python -m pytest -m slow --durations=25
    ;;
esac
