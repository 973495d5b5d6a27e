"""The policy losses and features that features.py runs, each with what must become of it."""

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch
from packaging.version import Version


@dataclass
class Case:
    """One way to run a policy loss or a feature."""

    name: str
    loss: str = "vanilla"
    options: dict[str, Any] = field(default_factory=dict)  # of PolicyLossConfig
    correction: dict[str, Any] = field(default_factory=dict)  # of RolloutCorrectionConfig
    distillation: dict[str, Any] = field(default_factory=dict)  # of DistillationLossConfig
    micro: int | None = 2  # responses a micro-batch on one rank; None: dynamic
    tokens: int | None = None  # tokens a micro-batch on one rank, if dynamic
    entropy_coeff: float = 0.0
    kl_coef: float = 0.0
    clip: float | None = None  # clip_ratio_low and _high, if not those of scenarios.py
    masks: str = "full"
    worker: str = "actor"
    is_weights: bool = False
    refusal: str = ""  # of what must not be trained: what the message says
    exact_since: str = ""  # verl's release before which it is refused
    since: str = ""  # verl's release that brought it
    rounding: float = 0.0  # of what verl computes in float32, whatever the model's type

    def expected(self) -> str:
        release = Version(importlib.import_module("verl").__version__)
        if self.since and release < Version(self.since):
            return "absent"
        exact = not self.refusal or (self.exact_since and release >= Version(self.exact_since))
        return "exact" if exact else "refused"


def cases(ranks: int) -> list[Case]:
    """The rows; with 4 ranks the Ulysses ones only."""
    terms: dict[str, Any] = {"entropy_coeff": 0.1, "kl_coef": 0.2}
    ulysses = [
        Case("Ulysses", worker="ulysses"),
        Case("Ulysses, dynamic, entropy, KL", worker="ulysses", micro=None, tokens=40, **terms),
        Case("Ulysses, tool masks", worker="ulysses", masks="tools"),
    ]
    if ranks == 4:
        return ulysses
    reinforce = {"loss_type": "reinforce", "rollout_is": "token", "rollout_is_threshold": 1.2}
    # Their mean over the micro-batches that the ranks work on at the same time is 1: a response's own here.
    normalized = Case(
        "bypass_mode, reinforce, normalized IS weights",
        "bypass_mode",
        correction=reinforce | {"rollout_is_batch_normalize": True},
        micro=1,
    )
    never, other = "never calls agg_loss", "whatever the mode"
    return [
        Case("vanilla"),
        Case("gspo", "gspo", refusal=other, exact_since="0.9.1"),
        Case("gpg", "gpg"),
        Case("clip_cov", "clip_cov", {"clip_cov_ratio": 0.3, "clip_cov_lb": -0.5, "clip_cov_ub": 0.5}, micro=1),
        Case("kl_cov", "kl_cov", {"kl_cov_ratio": 0.3, "ppo_kl_coef": 0.5}, micro=1),
        Case("sapo", "sapo", refusal=other),
        Case("cispo", "cispo"),
        Case("geo_mean", "geo_mean", refusal=never),
        # These two clip by a divergence of probabilities, which a tiny vocabulary keeps small.
        Case("dppo_tv", "dppo_tv", clip=0.005),
        Case("dppo_kl", "dppo_kl", clip=0.002),
        Case("dro", "dro", {"dro_beta": 0.3}, since="0.9.0"),
        Case("bypass_mode, ppo_clip", "bypass_mode", correction={"loss_type": "ppo_clip", "rollout_is": None}),
        Case("bypass_mode, ppo_clip, IS weights", "bypass_mode", correction=reinforce | {"loss_type": "ppo_clip"}),
        Case("bypass_mode, reinforce", "bypass_mode", correction=reinforce | {"rollout_is": None}),
        Case("bypass_mode, reinforce, IS weights", "bypass_mode", correction=reinforce),
        Case(
            "bypass_mode, reinforce, IS weights of sequences",
            "bypass_mode",
            correction=reinforce | {"rollout_is": "sequence"},
        ),
        Case(
            "bypass_mode, reinforce, IS weights with two bounds",
            "bypass_mode",
            correction=reinforce | {"rollout_is_threshold": "0.5_2.0"},
            since="0.8.0",
        ),
        Case("bypass_mode, rejected tokens", "bypass_mode", correction=reinforce, masks="rejected tokens"),
        Case(
            "bypass_mode with rollout_rs",
            "bypass_mode",
            correction=reinforce | {"rollout_rs": "token_k2", "rollout_rs_threshold": 0.02},
            refusal="inside each micro-batch",
        ),
        Case("vanilla, rollout IS weights in the data", is_weights=True),
        Case("gspo, rollout IS weights in the data", "gspo", is_weights=True, refusal=other, exact_since="0.9.1"),
        Case("registered by a user, passes the batch's sizes on", "tests_splats"),
        Case("registered by a user, passes nothing on", "tests_forgets"),
        # Entropy and KL terms aggregate by the mode, whatever the policy loss does.
        Case("registered by a user, averages by itself", "tests_averages", refusal=never, **terms),
        Case("registered by a user, calls agg_loss with another mode", "tests_hard_codes", refusal=other),
        Case("dynamic batch", "gpg", micro=None, tokens=60),
        Case("KL loss", "cispo", kl_coef=0.2),
        Case("entropy bonus", "cispo", entropy_coeff=0.1),
        Case("multi-turn tool masks", masks="tools"),
        Case("multi-turn tool masks, dynamic, entropy, KL", "cispo", micro=None, tokens=60, masks="tools", **terms),
        Case("rollout_rs without bypass_mode", micro=4, masks="rejected"),
        Case("upsampled padding rows", masks="padding rows", since="0.8.0", **terms),
        Case("upsampled padding rows, dynamic", micro=None, tokens=140, masks="padding rows", since="0.8.0"),
        Case("critic", worker="critic"),
        Case("critic, dynamic, tool masks", worker="critic", micro=None, tokens=60, masks="tools"),
        Case("LoRA", worker="lora"),
        Case("LoRA, dynamic, entropy, KL", worker="lora", micro=None, tokens=60, **terms),
        Case("use_remove_padding", worker="packed", **terms),
        Case(
            "distillation, k1 as the advantage",
            distillation={"loss_mode": "k1", "use_task_rewards": False},
            since="0.8.0",
        ),
        Case(
            "distillation, k3 beside the task's reward",
            distillation={"loss_mode": "k3", "use_policy_gradient": False},
            micro=None,
            tokens=60,
            since="0.8.0",
        ),
        *(
            Case(
                f"distillation, forward_kl_topk{', use_remove_padding' if worker == 'packed' else ''}",
                distillation={"loss_mode": "forward_kl_topk", "topk": 3, "use_policy_gradient": False},
                worker=worker,
                since="0.9.1",
                rounding=1e-6,
            )
            for worker in ("actor", "packed")
        ),
        *(ulysses if ranks > 1 else [normalized]),
    ]


def register_user_losses() -> None:
    """Policy losses as a user would write them: two that aggregate by the mode, two that do not."""
    from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss

    def token_losses(old_log_prob: torch.Tensor, log_prob: torch.Tensor, advantages: torch.Tensor, **_: Any) -> Any:
        return -advantages * torch.tanh(log_prob - old_log_prob)

    # verl calls a policy loss by keywords.
    @register_policy_loss("tests_splats")
    def splats(*, response_mask: torch.Tensor, loss_agg_mode: str, config: Any, **batch: Any) -> Any:
        return agg_loss(token_losses(**batch), response_mask, loss_agg_mode, **config.global_batch_info), {}

    @register_policy_loss("tests_forgets")
    def forgets(*, response_mask: torch.Tensor, loss_agg_mode: str, **batch: Any) -> Any:
        return agg_loss(loss_mat=token_losses(**batch), loss_mask=response_mask, loss_agg_mode=loss_agg_mode), {}

    @register_policy_loss("tests_averages")
    def averages(*, response_mask: torch.Tensor, **batch: Any) -> Any:
        return (token_losses(**batch) * response_mask).sum() / response_mask.sum(), {}

    @register_policy_loss("tests_hard_codes")
    def hard_codes(*, response_mask: torch.Tensor, config: Any, **batch: Any) -> Any:
        return agg_loss(token_losses(**batch), response_mask, "token-mean", **config.global_batch_info), {}
