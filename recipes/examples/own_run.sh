#!/usr/bin/env bash
# A run of your own: stock verl with VL Norm. Here two steps of a tiny model on this machine's CPU, one to two minutes.
# On GPUs: without the lines marked CPU, and with what is yours (docs/your-own-run.md lists it).
# own_run.yaml is the same as a config file.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/../.."                             # CPU
python=${PYTHON:-.venv/bin/python}  # on GPUs that of verl's environment: python=python
"$python" -c 'import pathlib; from vlnorm_verl.tasks.tiny.data import make; make(pathlib.Path("data/tiny"), "countdown")'  # CPU
eval "$("$python" -m vlnorm_verl.cpu)"                                        # CPU
exec "$python" -m verl.trainer.main_ppo \
  --config-path "$PWD/vlnorm_verl/cpu/config" --config-name cpu `# CPU` \
  data.train_files=data/tiny/countdown/train.parquet data.val_files=data/tiny/countdown/test.parquet \
  data.train_batch_size=16 data.max_prompt_length=16 data.max_response_length=256 \
  algorithm.adv_estimator=grpo \
  actor_rollout_ref.model.path=data/tiny/model \
  actor_rollout_ref.actor.loss_agg_mode=vl_norm \
  trainer.v1.trainer_mode=sync_whole_groups \
  actor_rollout_ref.actor.ppo_mini_batch_size=8 actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8 \
  actor_rollout_ref.actor.optim.lr=2e-4 \
  actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
  actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16 \
  reward.custom_reward_function.path=pkg://vlnorm_verl.tasks.tiny.countdown \
  trainer.experiment_name=own_run_vl_norm \
  trainer.total_training_steps=2 trainer.val_before_train=false trainer.test_freq=-1 trainer.save_freq=-1 \
  'trainer.logger=[console]' "$@"
