#!/usr/bin/env bash
# Full DAPO on Math.
#
#   bash recipes/dapo_math.sh model=3b length=3072 method=vl_norm     model: 3b|7b; method: dapo|overlong_filtering|soft_punishment|vl_norm
#   bash recipes/dapo_math.sh --help          every choice and flag
#   bash recipes/dapo_math.sh --dry-run       every value with its source, checked against verl, no GPU needed
#   bash recipes/dapo_math.sh scale=cpu       the same with a tiny model on this machine's CPU
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" family=dapo length=3072 task=math "$@"
