"""The authors' own variants of DAPO Norm and VL Norm, through verl's advantages and policy losses.

Covered: each against its definition, summed over micro-batches and ranks as verl's engine does; what a run loads.
Not covered: whole runs with them (`bash recipes/reproduce.sh each model=tiny`).
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo import core_algos

from vlnorm_verl.files import UserError
from vlnorm_verl.paper import as_coded
from vlnorm_verl.runs.check import validate
from vlnorm_verl.runs.config import compose

CONFIG = Path(__file__).parent.parent / "recipes" / "config"
LENGTHS = [3, 40, 7, 1, 25, 12, 2, 60]  # two prompts of four responses
WIDTH = 64
MASK = (torch.arange(WIDTH)[None, :] < torch.tensor(LENGTHS)[:, None]).to(torch.float64)


def grpo() -> tuple[dict, torch.Tensor]:
    rewards = torch.zeros_like(MASK)
    rewards[torch.arange(8), torch.tensor(LENGTHS) - 1] = torch.tensor([1.0, 0, 0, 1, 1, 0, 1, 1], dtype=torch.float64)
    given = {"token_level_rewards": rewards, "response_mask": MASK, "index": np.array(list("aaaabbbb"), dtype=object)}
    return given, core_algos.compute_grpo_outcome_advantage(**given)[0]


@pytest.mark.parametrize("alpha", [0.0, 0.75, 1.0])
def test_vl_norms_weights_are_relative_to_the_rollout_batch(alpha: float) -> None:
    given, advantages = grpo()
    config = OmegaConf.create({"norm_adv_by_std_in_grpo": True, as_coded.ALPHA_KEY: alpha})
    weighted, _ = core_algos.get_adv_estimator_fn(as_coded.ESTIMATOR)(**given, config=config)
    inverse = [(length / np.mean(LENGTHS)) ** -alpha for length in LENGTHS]
    relative = torch.tensor([value / np.mean(inverse) for value in inverse])
    torch.testing.assert_close(weighted, advantages * relative[:, None], rtol=1e-6, atol=1e-9)


def test_an_empty_response_has_no_weight() -> None:
    """It divides by zero in the authors' code."""
    given, _ = grpo()
    given["response_mask"] = MASK.clone()
    given["response_mask"][3] = 0
    config = OmegaConf.create({"norm_adv_by_std_in_grpo": True, as_coded.ALPHA_KEY: 1.0})
    weighted, _ = core_algos.get_adv_estimator_fn(as_coded.ESTIMATOR)(**given, config=config)
    assert torch.isfinite(weighted).all()
    assert not weighted[3].any()
    others = [0, 1, 2, 4, 5, 6, 7]
    inverse = np.array([1 / LENGTHS[i] for i in others])
    relative = torch.tensor(inverse / inverse.mean())  # over the seven that have a token
    advantages = core_algos.compute_grpo_outcome_advantage(**given)[0]
    torch.testing.assert_close(weighted[others], advantages[others] * relative[:, None], rtol=1e-6, atol=1e-9)


def gradient(
    log_prob: torch.Tensor, rows: list[int], ranks: int, micro_batch: int, mask: torch.Tensor = MASK
) -> torch.Tensor:
    """Of a mini-batch of `rows`, cut among ranks and micro-batches; d loss / d log_prob [8 x WIDTH]."""
    from verl.utils.config import omega_conf_to_dataclass

    actor = omega_conf_to_dataclass(compose(CONFIG, ["method=dapo_norm_as_coded"]).actor_rollout_ref.actor)
    loss_fn = core_algos.get_policy_loss_fn(actor.policy_loss.loss_mode)
    tokens = int(mask[rows].sum())
    actor.global_batch_info.update(
        dp_size=ranks, batch_num_tokens=tokens, global_batch_size=len(rows), loss_scale_factor=None
    )
    _, advantages = grpo()
    leaf = log_prob.clone().requires_grad_()
    per_rank = len(rows) // ranks
    for start in range(0, len(rows), micro_batch):
        assert start // per_rank == (start + micro_batch - 1) // per_rank  # within one rank
        part = rows[start : start + micro_batch]
        loss, _ = loss_fn(
            old_log_prob=log_prob[part],
            log_prob=leaf[part],
            advantages=advantages[part],
            response_mask=mask[part],
            loss_agg_mode=actor.loss_agg_mode,
            config=actor,
        )
        (loss / ranks).backward()  # the engine averages gradients over ranks
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 8), (1, 4), (2, 4), (2, 2), (4, 1)])
def test_dapo_norm_is_the_mean_of_the_micro_batches_token_means(ranks: int, micro_batch: int) -> None:
    log_prob = -torch.rand(MASK.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = [5, 0, 3, 6, 1, 2, 7, 4]
    _, advantages = grpo()
    expected = torch.zeros_like(MASK)
    for start in range(0, 8, micro_batch):
        part = rows[start : start + micro_batch]
        # At old = new the gradient of the token loss -A·ratio is -A.
        expected[part] = -advantages[part] * MASK[part] / MASK[part].sum() / (8 // micro_batch)
    torch.testing.assert_close(gradient(log_prob, rows, ranks, micro_batch), expected, rtol=1e-6, atol=1e-12)


def test_a_micro_batch_without_a_valid_token_has_no_gradient() -> None:
    (mask := MASK.clone())[3] = 0
    found = gradient(torch.zeros_like(MASK), [5, 0, 3, 6, 1, 2, 7, 4], 1, 1, mask)
    assert torch.isfinite(found).all()
    assert not found[3].any()
    assert found[0].any()


def test_it_takes_no_other_aggregation() -> None:
    with pytest.raises(ValueError, match="needs loss_agg_mode=token-mean, not 'vl_norm'"):
        as_coded.dapo_norm_as_coded(MASK, MASK, MASK, MASK, "vl_norm", SimpleNamespace())


def test_a_wrong_name_is_refused_before_ray() -> None:
    for wrong in (
        "actor_rollout_ref.actor.policy_loss.loss_mode=dapo_norm",
        "algorithm.adv_estimator=vl_norm_as_coded",
    ):
        with pytest.raises(UserError, match=wrong.partition("=")[2]):
            validate(compose(CONFIG, [wrong]))
