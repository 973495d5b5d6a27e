#!/usr/bin/env bash
# The gradient lab on the tiny model: does variance grow with length, is VL Norm unbiased, which α? Under five minutes.
#
#   bash recipes/lab_cpu.sh                  the model before training, and after the quickstart, if that was run
#   bash recipes/lab_cpu.sh runs/other       after another run of verl on the tiny task
#   bash recipes/lab_cpu.sh runs/other out   and into another folder than runs/lab
set -euo pipefail
unset PYTHONPATH PYTHONHOME # else an environment module's packages come first
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ "${1:-}" != --help ] || { sed -n '/^set/q; s/^# //p' recipes/lab_cpu.sh; exit; }
run=${1:-runs/cpu/quickstart-countdown-tiny-256-vl_norm-seed0}
out=${2:-runs/lab}
if [ $# -gt 0 ] && [ ! -d "$run/checkpoints" ]; then
  echo "$run/checkpoints is not there; accepted: the folder of a run that has saved a checkpoint, or nothing" >&2
  exit 2
fi
bash recipes/install_cpu.sh
# A model this small leaves a second core idle; OpenMP's threads would wait for each other instead.
export OMP_NUM_THREADS=1
lab() {
  .venv/bin/vlnorm-verl lab run "$1" --out "$2" --modules last-qkv --modules all --projection 32768 \
    --pool-prompts 128 --no-report
}
lab vlnorm_verl/tasks/tiny/weights "$out/before"
folders=("before=$out/before")
if step=$(cat "$run/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null); then
  after="$out/$(basename "$run")-step$step"
  lab "$run/checkpoints/global_step_$step" "$after"
  folders+=("step $step=$after")
else
  echo "no checkpoint in $run: only the model before training (bash recipes/quickstart.sh makes one)"
fi
# The quickstart's mini-batch: 64 responses.
.venv/bin/vlnorm-verl lab report "${folders[@]}" --out "$out/report" --mini-batch 64
