#!/usr/bin/env bash
# The launcher behind countdown.sh, math.sh, dapo_countdown.sh and dapo_math.sh; they tell what to give it.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/vlnorm.sh" launch --recipes recipes "$@"
