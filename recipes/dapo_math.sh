#!/usr/bin/env bash
# Full DAPO on Math.
#
#   bash recipes/dapo_math.sh model=3b length=3072 method=vl_norm     model: 3b|7b|tiny; method: dapo|overlong_filtering|soft_punishment|vl_norm
#   bash recipes/dapo_math.sh --help          every choice and flag
#   bash recipes/dapo_math.sh --dry-run       every value with its source, checked against verl, no GPU needed
#   bash recipes/dapo_math.sh model=tiny      the same with a tiny model on this machine's CPU
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$python" -m vlnorm_verl launch family=dapo length=3072 task=math "$@"
