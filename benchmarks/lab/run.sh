#!/usr/bin/env bash
# The lab on two pretrained models and three tasks: does the theory hold of a real language model, and which α?
#
#   bash benchmarks/lab/run.sh lab                         all of it: hours on two CPU cores; again: goes on where it was
#   MEASURE=smollm2-list bash benchmarks/lab/run.sh lab    one of the four
#   bash benchmarks/lab/run.sh lab --slope-prompts 2 --slope-responses 4 --pool-prompts 4 --pool-responses 4    a try
#
# SMOLLM2 and QWEN: a name on the hub, or a folder. What follows the folder goes to `vlnorm-verl lab run`.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:?the folder to write to}
python=${PYTHON:-.venv/bin/python}
declare -A models=(
  [smollm2]=${SMOLLM2:-HuggingFaceTB/SmolLM2-135M-Instruct}
  [qwen]=${QWEN:-Qwen/Qwen2.5-Coder-0.5B-Instruct}
)
folders=()
for measured in ${MEASURE:-smollm2-list smollm2-addition qwen-list qwen-multiplication}; do
  task=${measured#*-}
  [ -f "$out/$task.parquet" ] || "$python" benchmarks/lab/tasks.py "$task" --out "$out/$task.parquet"
  "$python" -m vlnorm_verl lab run "${models[${measured%%-*}]}" --out "$out/$measured" \
    --task custom --data "$out/$task.parquet" --reward benchmarks/lab/tasks.py --max-response-length 200 \
    --slope-prompts 8 --slope-responses 96 --pool-prompts 96 --pool-responses 8 "${@:2}" --no-report
  folders+=("$out/$measured")
done
"$python" -m vlnorm_verl lab report "${folders[@]}" --out "$out/report"
