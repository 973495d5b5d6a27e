#!/usr/bin/env bash
# The launcher behind countdown.sh, math.sh, dapo_countdown.sh and dapo_math.sh; they tell what to give it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case " $* " in *" scale=cpu "*) bash recipes/install_cpu.sh ;; esac
python=.venv/bin/python
[ -x "$python" ] || python=python3
if ! "$python" -c 'import vlnorm_verl' 2>/dev/null; then
  echo "$python has no vlnorm_verl. For GPUs: pip install -e '.[gpu,math]'. For this machine's CPU: add scale=cpu" >&2
  exit 2
fi
exec "$python" -m vlnorm_verl launch --recipes recipes "$@"
