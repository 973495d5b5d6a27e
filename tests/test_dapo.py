"""DAPO's parts: overlong filtering, soft punishment, and the bound on dynamic sampling, each through verl's own door.

Covered: the estimator against verl's GRPO; what verl's reward manager gives in training and in validation; the replay
buffer's limits, its settings and its metrics with a stand-in for the queue's contents. Not covered: whole runs with
them (test_e2e.py).
"""

import asyncio
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from vlnorm_verl.paper import overlong
from vlnorm_verl.paper.overlong import ESTIMATOR, LENGTH_KEY, up_to_last_valid
from vlnorm_verl.plugin import checks

# ------------------------------------------------------------------------------------------------ overlong filtering


def batch(lengths: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards 1, 0, 1, 0 … at the last token, and the mask; [B x T]."""
    mask = (torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]).float()
    rewards = torch.zeros(len(lengths), width)
    for row, length in enumerate(lengths):
        rewards[row, length - 1] = float(row % 2 == 0)
    return rewards, mask


def estimated(lengths: list[int], width: int, limit: int, std: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """(ours, verl's GRPO) for one group."""
    from verl.trainer.ppo import core_algos

    rewards, mask = batch(lengths, width)
    before = mask.clone()
    index = np.array(["a"] * len(lengths), dtype=object)
    config = OmegaConf.create({"norm_adv_by_std_in_grpo": std, LENGTH_KEY: limit})
    ours, _ = core_algos.get_adv_estimator_fn(ESTIMATOR)(
        token_level_rewards=rewards, response_mask=mask, index=index, config=config
    )
    assert torch.equal(mask, before)  # so an overlong response keeps its place in every denominator
    grpo, _ = core_algos.compute_grpo_outcome_advantage(rewards, mask, index, norm_adv_by_std_in_grpo=std)
    return ours, grpo


@pytest.mark.parametrize("std", [True, False])
def test_only_overlong_responses_lose_their_advantage(std: bool) -> None:
    ours, grpo = estimated([3, 8, 7, 8], width=8, limit=8, std=std)
    assert torch.equal(ours[[0, 2]], grpo[[0, 2]])  # their group's mean and deviation still count the overlong ones
    assert not ours[[1, 3]].any()
    assert grpo[[1, 3]].any()


def test_the_length_is_up_to_the_last_valid_token() -> None:
    """A tool's tokens lie between a model's, and count for the limit."""
    assert up_to_last_valid(torch.tensor([[1, 1, 0, 1], [1, 0, 1, 0], [0, 0, 0, 0]])).tolist() == [4, 3, 0]


def test_a_batch_narrower_than_the_limit_has_no_overlong_response() -> None:
    """verl pads to the longest response of the batch: a full row is not an overlong one."""
    ours, grpo = estimated([3, 6], width=6, limit=8)
    assert torch.equal(ours, grpo)


def test_a_response_cut_at_the_limit_is_overlong_whatever_tokens_its_mask_leaves_out() -> None:
    """Tool tokens in the middle, and the last token taken out by rollout_rs; by verl's own compute_advantage (V0)."""
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage

    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0], [1, 1, 1, 0]])
    data = DataProto.from_dict(
        tensors={
            "token_level_rewards": torch.tensor([[0.0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]),
            "response_mask": mask,
            "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]),
        },
        non_tensors={"uid": np.array(["a"] * 3, dtype=object)},
    )
    config = OmegaConf.create({"norm_adv_by_std_in_grpo": True, LENGTH_KEY: 4})
    advantages = compute_advantage(data, adv_estimator=ESTIMATOR, config=config).batch["advantages"]
    assert advantages.any(dim=-1).tolist() == [False, False, True]


def test_several_outputs_of_a_session_have_grpos_advantages() -> None:
    """V1 takes the last output of a session into the group (trainer/ppo/v1/utils.py), and its tags tell the lengths."""
    from verl import DataProto
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

    keys = ["p_0_0", "p_0_1", "p_1_0", "p_2_0"]  # prompt, session, output

    def compute(estimator: str, lengths: list[int]) -> torch.Tensor:
        def stock(self: Any, batch: Any) -> Any:
            data = DataProto.from_dict(
                tensors={
                    "token_level_rewards": torch.tensor([[0.0, 0], [0, 1], [0, 0], [0, 0]]),
                    "response_mask": torch.tensor([[1, 0], [1, 1], [1, 1], [1, 0]]),
                },
                non_tensors={"uid": np.array(["p"] * 4, dtype=object)},
            )
            algorithm = self.config.algorithm
            return compute_advantage_for_multi_trajectories(data, keys, algorithm.adv_estimator, config=algorithm)

        algorithm = OmegaConf.create({"adv_estimator": estimator, "norm_adv_by_std_in_grpo": True, LENGTH_KEY: 2})
        trainer = SimpleNamespace(config=SimpleNamespace(algorithm=algorithm))
        batch = SimpleNamespace(tags=[{"response_len": length} for length in lengths])
        return overlong.with_lengths(stock)(trainer, batch).batch["advantages"]

    grpo = compute("grpo", [2, 2, 2, 2])
    assert torch.equal(compute(ESTIMATOR, [1, 1, 1, 1]), grpo)
    filtered = compute(ESTIMATOR, [1, 1, 1, 2])  # its last token was taken out
    assert torch.equal(filtered[:3], grpo[:3])
    assert not filtered[3].any()
    assert hasattr(PPOTrainer._compute_advantage, "__wrapped__")


@pytest.mark.parametrize("length", [None, 0, 9, "8", True])
def test_a_missing_or_wrong_length_is_refused_before_ray(length: Any) -> None:
    algorithm = {"adv_estimator": ESTIMATOR, LENGTH_KEY: length}
    config = OmegaConf.create({"algorithm": algorithm, "data": {"max_response_length": 8}})
    with pytest.raises(ValueError, match=rf"algorithm\.{LENGTH_KEY}={length!r}.*1 to data\.max_response_length=8"):
        checks.check_overlong_filtering(config)
    config.algorithm[LENGTH_KEY] = 8
    checks.check_overlong_filtering(config)


def test_a_trainer_that_hands_on_no_config_is_told() -> None:
    def stock(data: Any, adv_estimator: Any, config: Any = None) -> Any:
        return data

    with pytest.raises(ValueError, match=r"needs config=config\.algorithm"):
        overlong.filtering(stock)(None, adv_estimator=ESTIMATOR)


def test_a_context_that_cuts_responses_below_the_limit_is_refused() -> None:
    """verl clamps a response to max_model_len less its prompt: no response would be overlong."""
    config = OmegaConf.create({"algorithm": {"adv_estimator": ESTIMATOR, LENGTH_KEY: 8}})
    config.data = {"max_prompt_length": 4, "max_response_length": 8}
    config.actor_rollout_ref = {"rollout": {"max_model_len": 11}}
    with pytest.raises(ValueError, match=rf"max_model_len=11.* algorithm\.{LENGTH_KEY}=8 .*= 12$"):
        checks.check_overlong_filtering(config)
    config.actor_rollout_ref.rollout.max_model_len = 12
    checks.check_overlong_filtering(config)
    config.actor_rollout_ref.rollout.name = "sglang"
    with pytest.raises(ValueError, match=r"\+ 1 = 13$"):
        checks.check_overlong_filtering(config)


# --------------------------------------------------------------------------------------------------- soft punishment


def rewarded(length: int, extra_info: dict[str, Any], result: Any) -> dict[str, Any]:
    """What the manager gives a response of `length` tokens; limit 8, buffer 4, so the punishment begins at 5."""
    from tensordict import TensorDict
    from verl import DataProto

    from vlnorm_verl.paper.soft_punishment import SoftPunishment

    buffer = {"enable": True, "len": 4, "penalty_factor": 1.0, "log": False}
    config = OmegaConf.create({"reward": {"reward_kwargs": {"max_resp_len": 8, "overlong_buffer_cfg": buffer}}})
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "text")

    async def run() -> dict[str, Any]:
        manager = SoftPunishment(config, tokenizer, lambda **kwargs: result)
        data = DataProto(
            batch=TensorDict(
                {
                    "responses": torch.ones(1, length, dtype=torch.long),
                    "attention_mask": torch.ones(1, 3 + length, dtype=torch.long),
                },
                [1],
            ),
            non_tensor_batch={
                "data_source": np.array(["x"], dtype=object),
                "reward_model": np.array([{"ground_truth": "1"}], dtype=object),
                "extra_info": np.array([extra_info], dtype=object),
            },
        )
        return await manager.run_single(data)

    return asyncio.run(run())


SCORE = {"score": 1.0, "acc": 1.0}


@pytest.mark.parametrize(("length", "punished"), [(4, 1.0), (5, 0.75), (6, 0.5), (8, 0.0)])
def test_length_is_punished_in_training_and_never_in_validation(length: int, punished: float) -> None:
    assert float(rewarded(length, {"split": "train"}, SCORE)["reward_score"]) == punished
    validated = rewarded(length, {"split": "test"}, SCORE)
    assert float(validated["reward_score"]) == 1.0
    assert validated["reward_extra_info"]["acc"] == 1.0


def test_data_without_a_split_is_refused() -> None:
    with pytest.raises(ValueError, match=r"extra_info\.split"):
        rewarded(4, {}, SCORE)
    with pytest.raises(ValueError, match="score"):
        rewarded(4, {"split": "test"}, 1.0)


# -------------------------------------------------------------------------------------------------- dynamic sampling


def buffer(refill: Any, **groups: Any) -> Any:
    from vlnorm_verl.paper.replay_buffer import BoundedReplayBuffer

    filter_groups = {"enable": True, "metric": "acc", "max_inflight_gen_batches": 3, "max_num_gen_batches": 2, **groups}
    kwargs = {"filter_groups": filter_groups, "train_batch_size": 4, "poll_interval": 0.01}
    return BoundedReplayBuffer(
        trainer_mode="sync",
        trainer_config={},
        max_off_policy_threshold=8,
        max_off_policy_strategy="drop",
        sampler_kwargs=OmegaConf.create(kwargs),
        refill_fn=refill,
    )


def test_the_buffer_gets_verls_own_filter_settings() -> None:
    made = buffer(lambda prompts: prompts)
    assert (made.filter_groups_metric, made.train_batch_size, made.gen_batch_size) == ("acc", 4, 1)
    assert (made.max_inflight_gen_batches, made.poll_interval) == (3, 0.01)
    assert buffer(lambda prompts: prompts, enable=False).filter_groups_metric is None


class Queue:
    """The contents of verl's TransferQueue, where every group that was asked for is finished at once, all equal."""

    def __init__(self, acc: list[float]) -> None:
        self.acc, self.prompts, self.rows, self.number = acc, {}, {}, itertools.count()
        self.asked: list[int] = []

    def add(self, prompts: int) -> int:
        for _ in range(prompts):
            uid = f"u{next(self.number)}"
            self.prompts[uid] = {"is_prompt": True, "status": "finished", "global_steps": 1}
            for session, acc in enumerate(self.acc):
                self.rows[f"{uid}_{session}_0"] = {"acc": acc, "outcome": "correct" if acc else "wrong"}
        return prompts

    def refill(self, prompts: int) -> int:
        self.asked.append(prompts)
        return self.add(prompts)

    def kv_list(self, partition_id: str | None = None) -> dict[str, Any]:
        return {"train": {**self.prompts, **{key: {} for key in self.rows}}}

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str]) -> dict[str, Any]:
        return {"extra_fields": [{"reward_extra_info": self.rows[key]} for key in keys]}

    def kv_clear(self, partition_id: str, keys: list[str]) -> None:
        for key in keys:
            self.prompts.pop(key, None)
            self.rows.pop(key, None)


def connected(monkeypatch: pytest.MonkeyPatch, queue: Queue) -> None:
    import transfer_queue

    for name in ("kv_list", "kv_batch_get", "kv_clear"):
        monkeypatch.setattr(transfer_queue, name, getattr(queue, name))


@pytest.mark.timeout(300)  # without the bound it goes on for ever
def test_sampling_ends_loudly_when_no_group_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(acc=[1.0, 1.0])
    connected(monkeypatch, queue)
    made = buffer(queue.refill)
    queue.add(4)
    with pytest.raises(RuntimeError, match=r"24 prompts were generated for one step \(max_num_gen_batches=2\)"):
        made.sample(global_steps=1, partition_id="train", batch_size=4)
    assert 4 + sum(queue.asked) <= 24 < 4 + sum(queue.asked) + 12  # 2 batches of 3 · 4; verl has at most 12 in flight


@pytest.mark.timeout(300)
def test_the_limit_is_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run has thousands of steps, of which most drop a group."""
    queue = Queue(acc=[1.0, 0.0])
    connected(monkeypatch, queue)
    made = buffer(queue.refill)  # 24 prompts a step
    for step in range(1, 9):
        queue.prompts, queue.rows = {}, {}
        queue.acc = [1.0, 1.0]
        queue.add(1)
        queue.acc = [1.0, 0.0]
        queue.add(3)
        batch, _ = made.sample(global_steps=step, partition_id="train", batch_size=4)
        assert len(batch.keys) == 8
    assert sum(queue.asked) > 8


def test_a_mixed_batch_is_sampled_with_its_outcomes(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(acc=[1.0, 0.0, 0.0, 0.0])
    connected(monkeypatch, queue)
    queue.add(4)
    chosen, metrics = buffer(queue.add).sample(global_steps=1, partition_id="train", batch_size=4)
    assert len(chosen.keys) == 16
    assert metrics["training/outcome/correct"] == 0.25
    assert metrics["training/outcome/wrong"] == 0.75


@pytest.mark.timeout(60)
@pytest.mark.parametrize("partition", ["train", "val"])
@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("failure", "1 prompts failed in {}"),
        ("running", "no response has come in .* and 1 prompts are not finished"),
    ],
)
def test_a_rollout_or_reward_that_fails_or_hangs_ends_the_run(
    status: str, said: str, partition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock verl pads a failed group away in training, counts it as wrong in validation, and waits for ever."""
    queue = Queue(acc=[1.0, 0.0])
    connected(monkeypatch, queue)
    queue.add(4)
    next(iter(queue.prompts.values()))["status"] = status
    monkeypatch.setattr("transfer_queue.kv_list", lambda: {partition: queue.kv_list()["train"]})
    monkeypatch.setattr("vlnorm_verl.paper.replay_buffer.STALL_S", 0.3)
    with pytest.raises(RuntimeError, match=said.format(partition)):
        buffer(queue.add).sample(global_steps=1, partition_id=partition, batch_size=4)


def test_a_slow_rollout_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as responses come in, and however long the step before took."""
    queue = Queue(acc=[1.0, 0.0])
    connected(monkeypatch, queue)
    monkeypatch.setattr("vlnorm_verl.paper.replay_buffer.STALL_S", 0.05)
    queue.add(4)
    slow = next(iter(queue.prompts))
    queue.prompts[slow]["status"] = "running"
    polls = itertools.count(1)

    def kv_list() -> dict[str, Any]:
        if (poll := next(polls)) % 4 == 0:
            queue.rows[f"{slow}_{poll}_0"] = {"acc": 1.0}
        if poll == 40:
            queue.prompts[slow]["status"] = "finished"
        return queue.kv_list()

    monkeypatch.setattr("transfer_queue.kv_list", kv_list)
    chosen, _ = buffer(queue.add).sample(global_steps=1, partition_id="train", batch_size=4)
    assert len(chosen.keys) == 18
