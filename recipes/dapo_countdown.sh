#!/usr/bin/env bash
# Full DAPO on CountDown (paper: Figure 2).
#
#   bash recipes/dapo_countdown.sh model=3b length=3072 method=vl_norm     model: 3b|7b|tiny; method: dapo|overlong_filtering|soft_punishment|vl_norm, or …_as_coded
# --help: every choice and flag. --dry-run: every value with its source, checked against verl. model=tiny: on this CPU.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$python" -m vlnorm_verl launch family=dapo length=3072 task=countdown "$@"
