#!/usr/bin/env bash
# The paper's runs by table and figure, one after the other or as jobs. The same command again continues where the last one ended.
#
#   bash recipes/reproduce.sh --list               sets, numbers of runs, and how far they are
#   bash recipes/reproduce.sh fig2                 run a set: countdown|math|alpha|dapo|as_coded|fig2|fig3|each|all, or table2 … table5
#   bash recipes/reproduce.sh fig2 --status        how far each of its runs is
#   bash recipes/reproduce.sh fig2 --dry-run       check each of its runs against verl, no GPU needed
#   bash recipes/reproduce.sh fig2 --seeds 0,1,2   three seeds of each
#   bash recipes/reproduce.sh fig2 trainer.n_gpus_per_node=4      choices and Hydra overrides, for each of its runs
#   bash recipes/reproduce.sh fig2 --on slurm      a job for each run; or --on kubernetes | kubectl create -f -
#   bash recipes/reproduce.sh fig2 model=tiny      the same with a tiny model on this machine's CPU
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$python" -m vlnorm_verl reproduce "$@"
