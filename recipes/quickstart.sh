#!/usr/bin/env bash
# Trains a tiny model with VL Norm on this machine's CPU: verl, Ray, FSDP2 and vLLM, end to end, and shows that it learns.
#
#   bash recipes/quickstart.sh                              installs into .venv, then trains (about ten minutes)
#   bash recipes/quickstart.sh method=dapo_norm             DAPO's aggregation instead
#   bash recipes/quickstart.sh recipe.seed=1 recipe.steps=20
#   bash recipes/quickstart.sh recipe.seed=2 trainer.n_gpus_per_node=2    two data-parallel FSDP ranks, another seed
#   bash recipes/quickstart.sh --help                       every choice and flag, once it is installed
#
# The same command again continues after a stop. recipes/config/family/quickstart.yaml has its values.
set -euo pipefail
unset PYTHONHOME
[ -n "${VERL_USE_EXTERNAL_MODULES:-}" ] || unset PYTHONPATH # else an environment module's packages come first
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.."
case " $* " in
  *" --help "* | *" -h "*) [ -x .venv/bin/vlnorm-verl ] || { sed -n '/^set/q; s/^# //p' recipes/quickstart.sh; exit; } ;;
esac
bash recipes/install_cpu.sh
exec .venv/bin/python -m vlnorm_verl launch --report family=quickstart task=countdown length=8192 model=tiny "$@"
