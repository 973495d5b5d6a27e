"""verl's synchronous V1 trainer with mini-batches of whole prompt groups: trainer.v1.trainer_mode=sync_whole_groups.

The recipes' optimizer mini-batch is 32 prompts with all of their responses (in the authors' code, of a verl that
balances ranks beforehand, some groups are split). verl 0.9's is that many responses of any prompts: its trainer deals
the responses out to the ranks by length (`_balance_batch`, trainer/ppo/v1/trainer_base.py:1608), each rank cuts its
share into mini-batches by itself (workers/engine_workers.py:273), and with actor.shuffle=true it draws them by one
permutation, the same in every step (`make_iterator`, utils/tensordict_utils.py:593, makes a new generator of the same
seed each time). No setting changes that. So this trainer, added by verl's own `register_trainer`, replaces
`_balance_batch`:

    groups       in an order drawn anew each step from actor.data_loader_seed and the step; it knows nothing of lengths
    mini-batch k the responses of the k-th ppo_mini_batch_size groups
    ranks        each mini-batch is dealt out evenly by length, so that no rank waits for another within it

Every rank's share is its part of mini-batch 0, then of mini-batch 1 … which is how the rank cuts it again. Which rank
computes a response changes no gradient.

Covered: any number of data-parallel ranks that verl accepts, and batches padded by verl (whose padding rows are groups
of one). Not covered: other trainer modes. Imported when verl has its trainers (vlnorm_verl.verl_entry).
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions, log_seqlen_unbalance

from vlnorm_verl.plugin.names import WHOLE_GROUPS


def groups_of(keys: Sequence[str], tags: Sequence[Mapping[str, Any]]) -> list[str]:
    """The prompt of each row: its uid in the key `{uid}_{session}_{output}` (trainer/ppo/v1/replay_buffer.py).

    verl's padding rows have one uid in common (trainer/ppo/padding_utils.py:179). Each is a group of its own here: all
    in one mini-batch, they would leave it with few responses to make a whole optimizer step of.
    """
    return [key if tag.get("is_padding") else key.split("_")[0] for key, tag in zip(keys, tags, strict=True)]


def shares_of_ranks(
    groups: list[str], workloads: torch.Tensor, ranks: int, mini_batch: int, rng: random.Random
) -> list[list[int]]:
    """Which rows each rank gets, in order.

    Args:
        groups: the prompt of each row.
        workloads: the cost of each row [rows].
        ranks, mini_batch: data-parallel ranks, and rows of one optimizer mini-batch over all of them. `ranks` divides
            `mini_batch`, which divides the number of rows.

    Returns:
        One list of row indices a rank. Rows k · mini_batch / ranks and following of all ranks are mini-batch k.
    """
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    drawn = [row for group in rng.sample(list(members), len(members)) for row in members[group]]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for start in range(0, len(drawn), mini_batch):
        rows = drawn[start : start + mini_batch]
        parts = get_seqlen_balanced_partitions(workloads[rows], k_partitions=ranks, equal_size=True)
        for share, part in zip(shares, parts, strict=True):
            share += [rows[place] for place in part]
    return shares


def check(config: Any) -> None:
    """Raises ValueError if a run asks for this trainer and for verl's shuffle, which would take the groups apart."""
    if config.trainer.v1.trainer_mode == WHOLE_GROUPS and config.actor_rollout_ref.actor.shuffle:
        raise ValueError(
            f"actor_rollout_ref.actor.shuffle=true with trainer.v1.trainer_mode={WHOLE_GROUPS}: verl would draw single "
            "responses. Set actor_rollout_ref.actor.shuffle=false; this trainer shuffles the groups itself"
        )


@register_trainer(WHOLE_GROUPS)
class WholeGroupTrainer(PPOTrainerSync):
    """verl's "sync" trainer; see the module. Raises ValueError as `check` does."""

    def __init__(self, config: Any) -> None:
        check(config)
        super().__init__(config)

    def _build_replay_buffer(self) -> Any:
        self.trainer_mode = "sync"  # verl asks which of its own three trainers this is, here first
        return super()._build_replay_buffer()

    def _balance_batch(
        self, batch: Any, metrics: dict[str, Any], logging_prefix: str = "global_seqlen", keep_minibatch: bool = False
    ) -> Any:
        batch = super()._balance_batch(batch, metrics, logging_prefix)  # pads it, and asks the workers for their ranks
        actor = self.config.actor_rollout_ref.actor
        lengths = torch.tensor([tag["seq_len"] for tag in batch.tags])
        shares = shares_of_ranks(
            groups_of(batch.keys, batch.tags),
            calculate_workload(lengths),
            ranks=max(self.actor_rollout_wg._dispatch_info["actor"]) + 1,
            mini_batch=actor.ppo_mini_batch_size * self.config.actor_rollout_ref.rollout.n,
            rng=random.Random(f"{actor.data_loader_seed} {self.global_steps}"),
        )
        logged = log_seqlen_unbalance(lengths.tolist(), shares, logging_prefix)
        metrics.update({name: value for name, value in logged.items() if "balanced" in name})  # the rest is of before
        batch.reorder([row for share in shares for row in share])
        return batch
