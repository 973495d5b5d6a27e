"""The code of docs/method-comparison.md and the aggregation of docs/extending.md, as they stand there.

Not covered: training with either.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vlnorm_verl import parse_mode, registry
from vlnorm_verl.aggregation import aggregate, mini_batch_sum, response_lengths, response_weights

DOCS = Path(__file__).parent.parent / "docs"
M = 40.0


def code(page: str) -> str:
    """The first Python block of a page."""
    block = re.search(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    assert block
    return block[1]


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pages' code defines; nothing stays registered."""
    from verl.trainer.ppo import core_algos

    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.setattr(core_algos, "ADV_ESTIMATOR_REGISTRY", dict(core_algos.ADV_ESTIMATOR_REGISTRY))
    defined: dict[str, Any] = {}
    for name in ("extending.md", "method-comparison.md"):
        exec(code(name), defined)
    return defined


def weights(mode: str, lengths: torch.Tensor) -> torch.Tensor:
    aggregation = parse_mode(mode)
    return response_weights(aggregation, lengths, mini_batch_sum(aggregation, lengths), M)


def test_the_floor_of_the_study_is_that_of_the_page() -> None:
    assert code("extending.md") in (DOCS.parent / "benchmarks" / "study" / "floor.py").read_text(encoding="utf-8")


@pytest.mark.usefixtures("pages")
def test_the_floor_is_vl_norm_above_it_and_dr_grpo_norm_below() -> None:
    long, short = torch.tensor([32, 50, 700]), torch.tensor([1, 8, 31, 32])
    assert torch.equal(weights("floor_norm", long), weights("vl_norm:1", long))
    assert torch.allclose(weights("floor_norm", short), weights("dr_grpo_norm", short), rtol=1e-12)
    both = weights("floor_norm:10", torch.tensor([2, 10, 20]))
    assert torch.allclose(both * M, torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64))
    with pytest.raises(ValueError, match="floor = -1 is out of range"):
        parse_mode("floor_norm:-1")


@pytest.mark.usefixtures("pages")
@pytest.mark.parametrize("by_std", [True, False])
def test_balanced_aggregation_is_that_of_its_definition(by_std: bool) -> None:
    """On policy: the gradient of the aggregated loss, with the groups dealt out to two mini-batches in any order."""
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, get_adv_estimator_fn

    generator = torch.Generator().manual_seed(0)
    prompts, n, width = 4, 6, 20
    lengths = torch.randint(1, width + 1, (prompts * n,), generator=generator)
    mask = (torch.arange(width) < lengths[:, None]).double()
    rewards = torch.zeros(prompts * n, width)
    rewards[:, 0] = torch.tensor([0, 1, 0, 0, 1, 1] * 2 + [1] * 6 + [1, 0, 0, 0, 0, 0], dtype=torch.float32)
    index = np.repeat([f"prompt-{p}" for p in range(prompts)], n)
    mask[:2], mask[-1] = 0, 0  # rejected, or padding
    config = SimpleNamespace(norm_adv_by_std_in_grpo=by_std)
    scaled, _ = get_adv_estimator_fn("balanced_grpo")(rewards, mask, index, config=config)
    advantages, _ = compute_grpo_outcome_advantage(rewards, mask, index, norm_adv_by_std_in_grpo=by_std)
    assert scaled.isfinite().all()

    values = torch.randn(prompts * n, width, generator=generator, dtype=torch.float64)  # a token's ∇ log π
    expected, valid = torch.zeros((), dtype=torch.float64), mask.any(-1).sum()
    for prompt in np.unique(index):
        for sign in (1.0, -1.0):
            at = torch.tensor(index == prompt) & (advantages[:, 0].sign() == sign)
            if at.any():
                tokens = mask[at].bool()
                expected = expected + at.sum() / valid * (advantages[at].double() * values[at])[tokens].mean()

    mode = parse_mode("dr_grpo_norm")
    total = mini_batch_sum(mode, response_lengths(mask))
    order = torch.randperm(prompts * n, generator=generator)
    actual = sum(aggregate((scaled * values)[part], mask[part], mode, total, 1.0) for part in order.split(7))
    assert torch.allclose(torch.as_tensor(actual), expected, rtol=1e-5)


def test_luspo_is_gspo_added_up() -> None:
    """Its definition, (1/N) Σ L_i min(s_i A_i, clip(s_i) A_i), has the gradient of gspo summed over tokens."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import FSDPActorConfig

    config = FSDPActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=0.05, clip_ratio_high=0.05
    )
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([3, 20, 7, 12, 1, 16])
    mask = (torch.arange(20) < lengths[:, None]).double()
    old = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    log_prob = (old + 0.2 * torch.randn(6, 20, generator=generator, dtype=torch.float64)).requires_grad_()
    advantages = torch.tensor([1.0, -0.5, 0.7, -1.2, 0.3, 0.9], dtype=torch.float64)[:, None] * mask
    theirs, _ = get_policy_loss_fn("gspo")(
        old, log_prob, advantages, mask, "seq-mean-token-sum", config, rollout_is_weights=None
    )
    ratio = (((log_prob - old) * mask).sum(-1) / lengths).exp()
    clipped = torch.minimum(ratio * advantages[:, 0], ratio.clamp(0.95, 1.05) * advantages[:, 0])
    own = -(lengths * clipped).mean()
    assert 0 < (clipped != ratio * advantages[:, 0]).sum() < 6  # some are clipped and some are not
    gradients = [torch.autograd.grad(loss, log_prob)[0] for loss in (theirs, own)]
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-12)
