#!/usr/bin/env bash
# What this project's method does on a GPU: exactness, cost, memory, the whole stack. 25 minutes at most on one GPU;
# docs/gpu.md says more.
#
#   bash benchmarks/gpu/check.sh [engine|stack|all] [--device cpu] [--out FOLDER] …    (--help)
#   PYTHON=.venv-gpu/bin/python bash benchmarks/gpu/check.sh    in another environment than .venv-gpu or the active one
#
# Where that Python has no verl, the archives of prepare.sh are unpacked into .gpu/site, once each.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/../.."
fail() {
  echo "$1" >&2
  exit 2
}
python=${PYTHON:-python3}
[ -n "${PYTHON:-}${VIRTUAL_ENV:-}" ] || [ ! -x .venv-gpu/bin/python ] || python=.venv-gpu/bin/python

has_verl() { "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("verl") is None)'; }
if ! has_verl; then
  site=$PWD/.gpu/site
  mkdir -p "$site"
  for archive in .gpu/engine.tar.xz .gpu/stack.tar.xz; do
    unpacked=$site/.$(basename "$archive")
    if [ -f "$archive" ] && [ ! -f "$unpacked" ]; then
      "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || fail "$python: $archive is for Python 3.12"
      "$python" -m tarfile --filter data -e "$archive" "$site"
      # Else every process of Ray compiles the same files at once.
      "$python" -m compileall -q -j 0 "$site" > /dev/null 2>&1 || true
      touch "$unpacked"
    fi
  done
  export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"
  has_verl ||
    fail "$python has no verl. bash recipes/install_gpu.sh installs it; without network see docs/gpu.md"
  "$python" benchmarks/gpu/metadata.py "$site"
fi
exec "$python" -m benchmarks.gpu.check "$@"
