#!/usr/bin/env bash
# Installs the CPU stack (verl, Ray, torch, vLLM, this package) into .venv in the project's root. installer.sh is how.
#
#   bash recipes/install_cpu.sh             what the quickstart and the tests need; a second call is quick
#   PYTHON=python3.12 bash recipes/install_cpu.sh    with another interpreter (3.11 or 3.12; default: python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

requirements=recipes/requirements-cpu.txt
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'; then
  echo "PYTHON=$python: Python 3.11 or 3.12 is needed (by verl and by numpy 2.3); name one with PYTHON=python3.11" >&2
  exit 2
fi

target=.venv
wanted=$(cat "$requirements" pyproject.toml recipes/install_cpu.sh recipes/installer.sh | cksum)
stamp=$target/installed-cpu-stack
if [ -x "$target/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi

echo "Installing the CPU stack into $target (about 4 GB on disk; a minute or two on a fast line) …"
[ -x "$target/bin/python" ] || "$python" -m venv "$target"
source recipes/installer.sh

install_cpu_torch
install --no-deps -r "$requirements"
# setuptools is in the set, so the package itself is built without fetching anything.
install --no-deps --no-build-isolation --editable .
echo "$wanted" > "$stamp"
