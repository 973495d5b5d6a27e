#!/usr/bin/env bash
# Installs the CPU stack (verl, Ray, torch, vLLM, this package) into .venv in the project's root.
#
#   bash recipes/install_cpu.sh             what the quickstart and the tests need; a second call is quick
#   PYTHON=python3.12 bash recipes/install_cpu.sh    with another interpreter (3.11 or 3.12; default: python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

torch="torch==2.13.0+cpu"
requirements=recipes/requirements-cpu.txt
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'; then
  echo "PYTHON=$python: Python 3.11 or 3.12 is needed (by verl and by numpy 2.3); name one with PYTHON=python3.11" >&2
  exit 2
fi

wanted=$(cat "$requirements" pyproject.toml recipes/install_cpu.sh | cksum)
stamp=.venv/installed-cpu-stack
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi

echo "Installing the CPU stack into .venv (about 4 GB on disk; minutes on a fast line) …"
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check --no-input "$@"; }

# The machine's own index first (a mirror or a local wheel may have the CPU build), PyTorch's index of CPU wheels next.
# The exact "+cpu" version keeps pip from taking a CUDA build.
if ! pip install --no-deps "$torch"; then
  echo "The configured index has no $torch; trying PyTorch's index of CPU wheels …"
  pip install --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch"
fi
pip install --no-deps -r "$requirements"
# setuptools is in the set, so the package itself is built without fetching anything.
pip install --no-deps --no-build-isolation --editable .
echo "$wanted" > "$stamp"
