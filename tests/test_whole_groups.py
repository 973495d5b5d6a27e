"""Mini-batches of whole prompt groups: what each rank's optimizer steps are given, by verl's own code.

Covered: the order that the trainer makes, cut by verl's dispatch (single_controller/base/decorator.py:71) and each
rank's iterator (utils/tensordict_utils.py:593) for 1 to 8 ranks at the recipes' sizes. Not covered: a run with it
(test_trainers.py, test_e2e.py).
"""

import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from vlnorm_verl.files import UserError
from vlnorm_verl.runs.check import validate
from vlnorm_verl.runs.config import compose

CONFIG = Path(__file__).parent.parent / "recipes" / "config"
PROMPTS, RESPONSES, MINI_BATCH = 128, 10, 32  # as in common.yaml and family/aggregation.yaml


def trainer(ranks: int, step: int, mode: str = "sync_whole_groups", workers: int = 1, seed: int = 0) -> Any:
    """A trainer as far as _balance_batch asks for it: no workers, no queue. workers: of each data-parallel rank."""
    from verl.trainer.ppo.v1 import get_trainer_cls

    made = object.__new__(get_trainer_cls(mode))
    actor = {"ppo_mini_batch_size": MINI_BATCH, "data_loader_seed": seed}
    made.config = OmegaConf.create(
        {"actor_rollout_ref": {"actor": actor, "rollout": {"n": RESPONSES}}, "trainer": {"critic_warmup": 0}}
    )
    made.use_critic, made.global_steps = False, step
    made.tokenizer = SimpleNamespace(eos_token_id=0)
    made.actor_rollout_wg = SimpleNamespace(
        _dispatch_info={"actor": [rank for rank in range(ranks) for _ in range(workers)]}
    )
    return made


def mini_batches(
    ranks: int, step: int = 1, mode: str = "sync_whole_groups", shuffle: bool = False, **of_trainer: int
) -> list[list[Any]]:
    """[(key, length)] of each rank's part of each optimizer mini-batch; the rows come in as verl's buffer gives them.

    That is in order of completion: short responses first.
    """
    from transfer_queue import KVBatchMeta
    from verl.single_controller.base.decorator import _split_args_kwargs_data_proto
    from verl.utils import tensordict_utils as tu

    rng = random.Random(0)
    typical = [rng.lognormvariate(6, 0.7) for _ in range(PROMPTS)]
    rows = [
        (f"p{prompt:03d}_{session}_0", max(1, int(rng.gauss(typical[prompt], typical[prompt] / 4))))
        for prompt in range(PROMPTS)
        for session in range(RESPONSES)
    ]
    rows.sort(key=lambda row: row[1])
    batch = KVBatchMeta(
        partition_id="train", keys=[key for key, _ in rows], tags=[{"seq_len": length} for _, length in rows]
    )
    made, metrics = trainer(ranks, step, mode, **of_trainer), {}
    batch = made._balance_batch(batch, metrics)
    assert metrics["global_seqlen/min"] < metrics["global_seqlen/balanced_min"] or ranks == 1
    place = {key: row for row, (key, _) in enumerate(rows)}
    order = torch.tensor([place[key] for key in batch.keys])
    (shares,), _ = _split_args_kwargs_data_proto(ranks, tu.get_tensordict({"row": order}))
    parts: list[list[Any]] = [[] for _ in range(PROMPTS // MINI_BATCH)]
    for rank, share in enumerate(shares):
        size = MINI_BATCH * RESPONSES // ranks  # engine_workers.py:270
        iterator = tu.make_iterator(share, size, epochs=1, seed=rank, dataloader_kwargs={"shuffle": shuffle})
        for number, part in enumerate(iterator):
            parts[number].append([rows[row] for row in part["row"].tolist()])
    return parts


def groups(mini_batch: list[Any]) -> Counter:
    return Counter(key.split("_")[0] for part in mini_batch for key, _ in part)


# With sequence parallelism several workers are one data-parallel rank.
@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2)])
def test_a_mini_batch_holds_32_whole_groups(ranks: int, workers: int) -> None:
    parts = mini_batches(ranks, workers=workers)
    assert len(parts) == 4
    for mini_batch in parts:
        assert Counter(groups(mini_batch).values()) == {RESPONSES: MINI_BATCH}
    assert len({group for mini_batch in parts for group in groups(mini_batch)}) == PROMPTS


def test_verls_own_hold_none() -> None:
    """The reason for all of this; if it fails, verl has changed."""
    for mini_batch in mini_batches(8, mode="sync", shuffle=True):
        assert len(groups(mini_batch)) > 110
        assert RESPONSES not in groups(mini_batch).values()


@pytest.mark.parametrize("ranks", [2, 8])
def test_no_rank_waits_within_a_mini_batch(ranks: int) -> None:
    for mini_batch in mini_batches(ranks):
        tokens = [sum(length for _, length in part) for part in mini_batch]
        assert max(tokens) < 1.02 * min(tokens)


def test_the_order_is_new_in_each_step_and_knows_nothing_of_lengths() -> None:
    first, again, next_step = (mini_batches(8, step) for step in (1, 1, 2))
    assert first == again
    assert groups(first[0]) != groups(next_step[0])
    assert groups(first[0]) != groups(mini_batches(8, seed=1)[0])
    # By chance the shortest of four mini-batches is the first in a quarter of the steps.
    shortest_first = 0
    for step in range(20):
        lengths = [[length for part in mini_batch for _, length in part] for mini_batch in mini_batches(8, step)]
        shortest_first += sum(lengths[0]) == min(map(sum, lengths))
    assert 1 <= shortest_first <= 11


def test_groups_of_unequal_size_lose_no_response() -> None:
    """A custom agent loop may give a prompt several outputs; verl then pads the batch."""
    from vlnorm_verl.paper.whole_groups import shares_of_ranks

    owner = [f"p{i % 5}" for i in range(13)] + ["pad0", "pad1", "pad2"]
    shares = shares_of_ranks(owner, torch.arange(1, 17), ranks=2, mini_batch=8, rng=random.Random(0))
    assert [len(share) for share in shares] == [8, 8]
    assert sorted(row for share in shares for row in share) == list(range(16))


def test_verls_padding_rows_are_spread_over_the_mini_batches() -> None:
    """Together they would fill a mini-batch, whose few responses would then be a whole optimizer step."""
    from vlnorm_verl.paper.whole_groups import groups_of, shares_of_ranks

    keys = [f"p{i // 10:03d}_{i % 10}_0" for i in range(1290)] + [f"pad0_{i}_0" for i in range(310)]
    tags = [{"seq_len": 100}] * 1290 + [{"seq_len": 2, "is_padding": True}] * 310
    groups = groups_of(keys, tags)
    assert groups[:11] == ["p000"] * 10 + ["p001"]
    for step in range(20):
        (rows,) = shares_of_ranks(groups, torch.ones(1600), ranks=1, mini_batch=320, rng=random.Random(step))
        real = [sum(row < 1290 for row in rows[start : start + 320]) for start in range(0, 1600, 320)]
        assert min(real) > 200, real


def test_verls_own_buffer_is_the_synchronous_one() -> None:
    """Without a sampler of the user's, verl chooses by the trainer's name."""
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    made = trainer(ranks=1, step=1)
    made.trainer_mode = "sync_whole_groups"
    made.config = compose(CONFIG, ["trainer.v1.sampler.custom_sampler.path=null"])
    assert type(made._build_replay_buffer()) is ReplayBuffer
    assert made.trainer_mode == "sync"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "actor_rollout_ref.actor.shuffle=true",
            r"actor\.shuffle=true with trainer\.v1\.trainer_mode=sync_whole_groups",
        ),
        (
            "trainer.v1.trainer_mode=whole_groups",
            r"Unknown trainer 'whole_groups'\. Available trainers: .*sync_whole_groups",
        ),
    ],
)
def test_what_is_no_whole_group_run_is_refused_before_ray(overrides: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(compose(CONFIG, [overrides]))
