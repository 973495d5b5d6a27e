"""verl's replay buffer, stricter, with two settings and a metric more (`trainer.v1.sampler.custom_sampler`).

- The polling interval. verl asks its queue every 2 s whether a batch is complete (trainer/ppo/v1/replay_buffer.py:144),
  so a step of a few seconds on a CPU is rounded up to the next 2 s.
- `algorithm.filter_groups.max_num_gen_batches`. verl 0.9's trainer ignores it (trainer_base.py:203): with a model that
  solves every prompt, or none, it would generate for ever.
- Outcome rates. The reward functions here say what became of each response ("correct", "no_answer" …); verl puts that
  into validation dumps, but into no metric of training. Logged as `training/outcome/<class>`, shares of the batch.
- Failures. verl's V1 agent loop catches what a rollout or a reward function raises, and marks the prompt's group as
  failed (trainer/ppo/v1/agent_loop_tq.py). In training its missing responses are then padded away, in validation they
  count as wrong. Here a failed group ends the run.
- Hangs. verl waits for its responses without a time limit: an engine or a reward process that hangs keeps all GPUs
  idle until somebody looks. Here the run ends when no response has come in for STALL_S.

Dropping the groups of equal outcome is verl's own code. A custom sampler has to hand `algorithm.filter_groups` to it
(trainer_base.py:162), which is what `trainer.v1.sampler.sampler_kwargs` is for.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import transfer_queue as tq
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

# Seconds of polling. The longest responses of the recipes, on the slowest cards, take minutes.
STALL_S = 3600.0


class BoundedReplayBuffer(ReplayBuffer):
    """verl's synchronous ReplayBuffer; see the module. Its `sampler_kwargs` are

    filter_groups     ${algorithm.filter_groups}
    train_batch_size  ${data.train_batch_size}, prompts
    poll_interval     seconds

    Raises:
        RuntimeError (in `sample`): a rollout or its reward failed; no response came in for STALL_S; or a step has used
            up its max_num_gen_batches, each max_inflight_gen_batches · train_batch_size prompts, what verl has in
            flight at most.
    """

    def __init__(self, sampler_kwargs: Any, refill_fn: Callable[[int], int], **kwargs: Any) -> None:
        groups, prompts = sampler_kwargs.filter_groups, sampler_kwargs.train_batch_size
        self._refill = refill_fn
        self._groups = groups
        self._limit = groups.max_num_gen_batches * groups.max_inflight_gen_batches * prompts
        self._generated = 0
        self._outcomes: set[str] = set()  # seen so far
        self._seen: tuple[frozenset[str], int] | None = None  # prompts not finished, responses: at the last poll
        self._idle_polls = 0
        super().__init__(
            sampler_kwargs=sampler_kwargs,
            refill_fn=self._refill_within_limit,
            poll_interval=sampler_kwargs.poll_interval,
            filter_groups_metric=groups.metric if groups.enable else None,
            train_batch_size=prompts,
            gen_batch_size=1,  # the trainer's data loader gives single prompts when it filters (trainer_base.py:728)
            max_inflight_gen_batches=groups.max_inflight_gen_batches,
            **kwargs,
        )

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> Any:
        self._generated = batch_size  # what the trainer itself has asked for
        self._seen = None
        batch, metrics = super().sample(global_steps=global_steps, partition_id=partition_id, batch_size=batch_size)
        if partition_id == "train":
            fields = tq.kv_batch_get(keys=batch.keys, partition_id=partition_id, select_fields=["extra_fields"])
            metrics |= self._outcome_rates(getattr(extra, "data", extra) for extra in fields["extra_fields"])
        return batch, metrics

    def _sync_metadata_from_transfer_queue(self) -> None:
        super()._sync_metadata_from_transfer_queue()
        for partition, failed in self.failure_keys.items():
            if failed:
                raise RuntimeError(
                    f"{len(failed)} prompts failed in {partition}: a rollout or the reward function raised an error. "
                    'verl has logged it as "Error in _run_prompt", and would go on without these prompts'
                )
        self._refuse_stall()

    def _refuse_stall(self) -> None:
        """End a run that waits in vain. Polls are counted: time in which this process was stopped is not."""
        waiting = frozenset[str]().union(*self.pending_keys.values(), *self.running_keys.values())
        seen = waiting, sum(map(len, self.partitions.values()))
        self._idle_polls = self._idle_polls + 1 if seen == self._seen else 0
        self._seen = seen
        if self._idle_polls * self.poll_interval > STALL_S:
            raise RuntimeError(
                f"no response has come in for {STALL_S / 60:.0f} minutes, and {len(waiting)} prompts are not finished: "
                "a vLLM engine or a reward process hangs. verl would wait for ever; the same command goes on from the "
                "last checkpoint"
            )

    def _refill_within_limit(self, prompts: int) -> int:
        self._generated += prompts
        if 0 < self._limit < self._generated:
            raise RuntimeError(
                f"algorithm.filter_groups: {self._limit} prompts were generated for one step "
                f"(max_num_gen_batches={self._groups.max_num_gen_batches}), and still fewer than "
                f"{self.train_batch_size} of their groups differ in {self._groups.metric!r}. The model solves nearly "
                "all prompts or nearly none: raise max_num_gen_batches (0: no limit)"
            )
        return self._refill(prompts)

    def _outcome_rates(self, extra_fields: Iterable[dict[str, Any]]) -> dict[str, float]:
        """Shares of the responses whose reward function named an outcome; 0 for a class that is not in this batch."""
        named = Counter(extra.get("reward_extra_info", {}).get("outcome") for extra in extra_fields)
        named.pop(None, None)
        self._outcomes |= named.keys()
        return {f"training/outcome/{name}": named[name] / named.total() for name in sorted(self._outcomes) if named}
