#!/usr/bin/env bash
# Loss aggregation alone on Math (paper: Figure 3): GRPO with one of five methods.
#
#   bash recipes/math.sh model=3b length=8192 method=vl_norm     model: 3b|7b|tiny; length: 3072|8192; method: grpo_norm|dapo_norm|dr_grpo_norm|dr_grpo|vl_norm, or …_as_coded
# --help: every choice and flag. --dry-run: every value with its source, checked against verl. model=tiny: on this CPU.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$python" -m vlnorm_verl launch family=aggregation task=math "$@"
