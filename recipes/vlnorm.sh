#!/usr/bin/env bash
# Runs `vlnorm-verl` from the project's folder, in the active environment, else in .venv-gpu, else in .venv. A run that
# cannot be done in that one (no CUDA in its torch, or no vLLM for CPUs) goes over to the other, or is refused.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
installed='import importlib.metadata as m; m.version("verl"); m.version("vlnorm-verl")'
for python in "${VIRTUAL_ENV:-}/bin/python" "${CONDA_PREFIX:-}/bin/python" "$PWD"/{.venv-gpu,.venv}/bin/python python3; do
  if "$python" -c "$installed" 2> /dev/null; then exec "$python" -m vlnorm_verl "$@"; fi
done
echo "Nothing is installed yet. For GPUs: bash recipes/install_gpu.sh. For scale=cpu: bash recipes/install_cpu.sh" >&2
exit 2
