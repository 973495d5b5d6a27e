#!/usr/bin/env bash
# Trains a tiny model with VL Norm on this machine's CPU: verl, Ray, FSDP2 and vLLM, end to end, and shows that it learns.
#
#   bash recipes/quickstart.sh                        installs into .venv, then trains (about ten minutes)
#   bash recipes/quickstart.sh --mode token-mean      DAPO's aggregation instead
#   bash recipes/quickstart.sh --ranks 2              two data-parallel FSDP ranks
#   bash recipes/quickstart.sh --help                 everything else
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash recipes/install_cpu.sh
exec .venv/bin/vlnorm-verl quickstart "$@"
