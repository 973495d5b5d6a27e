#!/usr/bin/env bash
# Runs `vlnorm-verl` from the project's folder: in .venv if there is one, which scale=cpu makes, else with python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case " $* " in *" scale=cpu "*) bash recipes/install_cpu.sh ;; esac
python=.venv/bin/python
[ -x "$python" ] || python=python3
if ! "$python" -c 'import sys, importlib.util as u; sys.exit(u.find_spec("vlnorm_verl") is None or u.find_spec("verl") is None)'; then
  echo "$python lacks vlnorm_verl or verl. For GPUs: pip install -e '.[gpu]'. For this machine's CPU: add scale=cpu" >&2
  exit 2
fi
exec "$python" -m vlnorm_verl "$@"
