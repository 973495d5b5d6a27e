"""Policy losses that ignore the mode are refused, on the driver or in the micro-batch; the others are accepted.

The engine's gradients are those of test_features.py.
"""

import dataclasses
import pickle
from importlib.metadata import version
from typing import Any

import pytest
import torch
from packaging.version import Version

from tests import warm
from tests.verl_config import actor, compose
from vlnorm_verl import parse_mode
from vlnorm_verl.plugin import policy_loss
from vlnorm_verl.plugin.checks import check_config
from vlnorm_verl.plugin.mini_batch import IgnoresMode, MiniBatch, working_on


def token_losses(old_log_prob: Any, log_prob: Any, advantages: Any, **_: Any) -> torch.Tensor:
    return -advantages * torch.exp(log_prob - old_log_prob)


def averaged(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As verl's masked_mean: of the micro-batch."""
    return (values * mask).sum() / mask.sum()


def users_losses() -> dict[str, tuple[Any, str | None]]:
    """Policy losses as users write them, each with what the refusal says; None: it is accepted."""
    from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn, kl_penalty_forward

    def by_mode(losses: torch.Tensor, batch: dict[str, Any], **sizes: Any) -> torch.Tensor:
        return agg_loss(losses, batch["response_mask"], batch["loss_agg_mode"], **sizes)

    def passes_sizes_on(**batch: Any) -> Any:
        return by_mode(token_losses(**batch), batch, **batch["config"].global_batch_info), {}

    def fixed_mode(**batch: Any) -> Any:
        return agg_loss(token_losses(**batch), batch["response_mask"], "token-mean"), {}

    def own_mean(*, log_prob: Any, **_: Any) -> Any:
        return log_prob.mean(), {}

    def needs_more(**batch: Any) -> Any:
        return batch["teacher_log_prob"].mean(), {}

    def metric_of_another_mode(**batch: Any) -> Any:
        losses = token_losses(**batch)
        metrics = {"before": agg_loss(losses.detach(), batch["response_mask"], "token-mean").item()}
        metrics["after"] = agg_loss(losses, batch["response_mask"], "seq-mean-token-mean").detach().item()
        return by_mode(losses, batch), metrics

    def only_a_metric(**batch: Any) -> Any:
        return batch["log_prob"].mean(), {"mean": by_mode(batch["log_prob"].detach(), batch).item()}

    def mean_beside(**batch: Any) -> Any:
        return averaged(batch["log_prob"], batch["response_mask"]) + by_mode(batch["log_prob"] ** 2, batch), {}

    def narrow_mask(**batch: Any) -> Any:
        return by_mode(
            batch["log_prob"], batch | {"response_mask": batch["response_mask"] & (batch["advantages"] > 0)}
        ), {}

    def k2_to_old_policy(**batch: Any) -> Any:  # 0, with gradient 0, where the policy has not moved
        k2 = averaged((batch["log_prob"] - batch["old_log_prob"]) ** 2 / 2, batch["response_mask"])
        return by_mode(token_losses(**batch), batch) + k2, {}

    def k3_to_old_policy_by_mode(**batch: Any) -> Any:
        k3 = kl_penalty_forward(batch["log_prob"], batch["old_log_prob"], "low_var_kl")
        return by_mode(token_losses(**batch) + 0.1 * k3, batch), {}

    def hinge_beyond_the_clip_range(**batch: Any) -> Any:
        hinge = torch.relu((batch["log_prob"] - batch["old_log_prob"]).abs() - 0.3)
        return by_mode(token_losses(**batch), batch) + averaged(hinge, batch["response_mask"]), {}

    def divides_by_micro_batch(**batch: Any) -> Any:
        return by_mode(token_losses(**batch) / len(batch["log_prob"]), batch), {}

    def divides_by_width(**batch: Any) -> Any:
        return by_mode(token_losses(**batch) / batch["log_prob"].shape[-1], batch), {}

    def own_m(**batch: Any) -> Any:
        return by_mode(token_losses(**batch), batch, loss_scale_factor=batch["response_mask"].shape[-1]), {}

    def vanilla_inside(**batch: Any) -> Any:
        return get_policy_loss_fn("vanilla")(**batch)

    def geo_mean_inside(**batch: Any) -> Any:
        return get_policy_loss_fn("geo_mean")(**batch)

    part = "a part of its gradient does not go through agg_loss"
    refusals: dict[str | None, tuple[Any, ...]] = {
        None: (passes_sizes_on, metric_of_another_mode, k3_to_old_policy_by_mode, vanilla_inside),
        "the policy loss 'fixed_mode' calls agg_loss with 'token-mean' whatever the mode": (fixed_mode,),
        "never calls agg_loss": (own_mean, only_a_metric),
        "it raised KeyError on four short responses ('teacher_log_prob'). One that needs a GPU": (needs_more,),
        "another mask than response_mask": (narrow_mask,),
        part: (mean_beside, k2_to_old_policy, hinge_beyond_the_clip_range),
        "its gradient depends on which responses share a micro-batch": (divides_by_micro_batch, divides_by_width),
        "loss_scale_factor=4, and the mini-batch has 7": (own_m,),
        "the policy loss 'geo_mean' never calls agg_loss": (geo_mean_inside,),
    }
    return {loss.__name__: (loss, refusal) for refusal, losses in refusals.items() for loss in losses}


def test_a_users_policy_loss_is_tried() -> None:
    """Under no_grad too, in which a caller may be."""
    from verl.trainer.ppo import core_algos

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for name, (loss, refusal) in users_losses().items():
            patch.setitem(core_algos.POLICY_LOSS_REGISTRY, name, loss)
            problem = policy_loss.problem(name, actor_config(name))
            assert (problem is None) if refusal is None else (problem and refusal in problem), (name, problem)


@pytest.mark.parametrize("of", ["token", "sequence"])
def test_importance_weights_with_two_bounds_are_accepted(of: str) -> None:
    """IcePop's. A response whose weights were all 0 in the trial would be verl's own error."""
    assert (
        policy_loss.problem("bypass_mode", actor_config("bypass_mode", rollout_is=of, rollout_is_threshold="0.8_1.25"))
        is None
    )


def test_what_a_refusal_of_rollout_rs_names_as_accepted_is_accepted() -> None:
    section, algorithm = "actor_rollout_ref.actor.policy_loss", "algorithm.rollout_correction"
    by_the_loss = [f"{section}.loss_mode=bypass_mode", f"+{section}.rollout_correction.rollout_rs=token_k2"]
    by_the_trainer = [f"{algorithm}.bypass_mode=true", f"{algorithm}.rollout_rs=token_k2"]
    for refused, words, remedies in (
        (
            by_the_loss,
            r"rollout_rs='token_k2' with policy_loss\.loss_mode=bypass_mode .*Accepted: rollout_rs=null; or another "
            r"loss_mode with algorithm\.rollout_correction\.rollout_rs and .*bypass_mode=false, ",
            (
                [f"++{section}.rollout_correction.rollout_rs=null"],
                [f"{section}.loss_mode=vanilla", f"{algorithm}.rollout_rs=token_k2", f"{algorithm}.bypass_mode=false"],
            ),
        ),
        (
            by_the_trainer,
            r"rollout_rs='token_k2' with bypass_mode=true .*Accepted: rollout_rs=null, or bypass_mode=false",
            ([f"{algorithm}.rollout_rs=null"], [f"{algorithm}.bypass_mode=false"]),
        ),
    ):
        asked = [*actor(loss_agg_mode="vl_norm"), *refused]
        with pytest.raises(ValueError, match=words):
            check_config(compose(*asked))
        for remedy in remedies:
            check_config(compose(*asked, *remedy))


def test_the_error_of_a_worker_arrives_as_it_is() -> None:
    """Ray pickles it."""
    error = IgnoresMode("vl_norm", "it does not", "Do it.")
    arrived = pickle.loads(pickle.dumps(error))
    assert (type(arrived), str(arrived), arrived.problem) == (IgnoresMode, str(error), "it does not")
    assert str(error).endswith("='vl_norm', but it does not. Do it.")


def test_the_driver_names_the_policy_losses_that_will_do_and_leaves_unknown_ones_to_the_workers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from verl.trainer.ppo import core_algos

    losses = users_losses()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("passes_sizes_on", "own_mean"):
            patch.setitem(core_algos.POLICY_LOSS_REGISTRY, name, losses[name][0])
        for name in ("passes_sizes_on", "known_to_workers_only"):
            check_config(
                compose(*actor(loss_agg_mode="vl_norm"), f"actor_rollout_ref.actor.policy_loss.loss_mode={name}")
            )
        assert "loss_mode='known_to_workers_only' is not registered in this process" in caplog.text
        assert "loss_mode='passes_sizes_on'" not in caplog.text
        config = compose(*actor(loss_agg_mode="vl_norm"), "actor_rollout_ref.actor.policy_loss.loss_mode=own_mean")
        said = r"loss_mode='own_mean'.*never calls agg_loss.*Accepted: (?!.*(own|geo)_mean).*passes_sizes_on, .*vanilla"
        with pytest.raises(ValueError, match=said):
            check_config(config)


def test_a_config_is_made_without_trying_its_policy_loss() -> None:
    """Every worker makes one; the driver has tried it."""
    from verl.trainer.ppo import core_algos

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(core_algos.POLICY_LOSS_REGISTRY, "own_mean", users_losses()["own_mean"][0])
        actor_config("own_mean")


def actor_config(policy_loss_name: str, **correction: str) -> Any:
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig

    known = {field.name for field in dataclasses.fields(PolicyLossConfig)}  # they differ from release to release
    wanted = {"loss_mode": policy_loss_name, "dro_beta": 1.0}
    wanted |= {"rollout_correction": {"loss_type": "reinforce"} | correction}
    # So that they choose among four responses too.
    wanted |= {"clip_cov_ratio": 0.5, "clip_cov_lb": -0.5, "clip_cov_ub": 0.5, "kl_cov_ratio": 0.5}
    settings = PolicyLossConfig(**{name: value for name, value in wanted.items() if name in known})
    return FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode="vl_norm", policy_loss=settings)


def test_verls_own_policy_losses_are_accepted_but_those_that_ignore_the_mode() -> None:
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    config = actor_config("vanilla")
    stock = {name for name, loss in POLICY_LOSS_REGISTRY.items() if loss.__module__.startswith("verl.")}
    ignore = {"geo_mean", "sapo"} | ({"gspo"} if Version(version("verl")) < Version("0.9.1") else set())
    assert len(stock) > 9
    assert {name for name in stock if policy_loss.problem(name, config)} == ignore


def test_the_policy_loss_of_the_docs_is_accepted() -> None:
    from verl.trainer.ppo import core_algos

    page = (warm.REPOSITORY / "docs/extending.md").read_text()
    code = page[page.index('@register_policy_loss("mine")') :].partition("```")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core_algos, "POLICY_LOSS_REGISTRY", dict(core_algos.POLICY_LOSS_REGISTRY))
        exec(code, vars(core_algos) | {"torch": torch})
        assert policy_loss.problem("mine", actor_config("mine")) is None


# ------------------------------------------------------------------------------------------------ in the micro-batch


def mini_batch() -> MiniBatch:
    return MiniBatch("vl_norm", parse_mode("vl_norm"), torch.tensor(0.5), dp_size=1, scale=2.0)


def test_a_policy_loss_that_never_aggregates_is_seen_beside_kl_and_entropy_terms() -> None:
    """They call agg_loss too. Such a loss gets here if the driver could not try it."""
    from verl.trainer.ppo import core_algos
    from verl.workers.utils import losses

    def own(log_prob: torch.Tensor) -> Any:
        return log_prob.mean(), {}

    log_prob = torch.ones(1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(core_algos.POLICY_LOSS_REGISTRY, "users_own", own)
        loss = losses.get_policy_loss_fn("users_own")
        assert loss(log_prob)[0].item() == 1.0  # verl's own modes: nothing is asked of it
        assert losses.get_policy_loss_fn(name="users_own")(log_prob)[0].item() == 1.0
        with working_on(mini_batch()):
            # a KL term of the micro-batch before
            core_algos.agg_loss(log_prob.clone().requires_grad_(), torch.ones(1, 2), "vl_norm")
            with torch.no_grad():
                loss(log_prob)  # a metric
            with pytest.raises(ValueError, match="the policy loss 'users_own' never calls agg_loss"):
                loss(log_prob)


def test_a_loss_function_that_never_aggregates_is_refused_and_one_with_a_policy_loss_beside_it_is_not() -> None:
    """A metric of another policy loss, without a gradient, takes nothing back."""
    from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn

    mask = torch.ones(1, 2)

    def aggregates(data: Any) -> torch.Tensor:
        loss = agg_loss(torch.ones(1, 2, requires_grad=True), mask, "vl_norm")
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setitem(get_policy_loss_fn.__globals__["POLICY_LOSS_REGISTRY"], "metric", lambda x: x.mean())
            get_policy_loss_fn("metric")(mask)
        return loss

    batch = mini_batch()
    with working_on(batch):
        batch.watch(aggregates)(data={"response_mask": mask})
        with pytest.raises(ValueError, match="the loss function never calls agg_loss"):
            batch.watch(lambda data: torch.ones(1))(data={"response_mask": mask})
        batch.watch(lambda data: torch.zeros(1))(data={"response_mask": 0 * mask})  # verl's padding alone


@pytest.mark.parametrize("layout", ["padded", "jagged"])
def test_a_term_over_another_mask_is_seen_in_the_micro_batch(layout: str) -> None:
    """In the policy loss, as masking by the ratio does, or beside it, as an auxiliary loss over tool tokens does."""
    from verl.trainer.ppo.core_algos import agg_loss

    mask = torch.tensor([[True, True, False], [True, True, True]])
    data = torch.nested.nested_tensor([mask[0, :2], mask[1]], layout=torch.jagged) if layout == "jagged" else mask

    def loss_function(other: torch.Tensor, data: Any, requires_grad: bool = True) -> torch.Tensor:
        agg_loss(torch.zeros(mask.shape, requires_grad=True), mask, "vl_norm")
        return agg_loss(torch.zeros(other.shape, requires_grad=requires_grad), other, "vl_norm")

    batch = mini_batch()
    with working_on(batch):
        loss = batch.watch(loss_function)
        loss(mask, data={"response_mask": data})
        loss(~mask, data={"response_mask": data}, requires_grad=False)  # a metric
        for other in (~mask, mask & (torch.arange(3) > 0), mask[:1]):
            with pytest.raises(ValueError, match=r"another mask than response_mask.*losses \* keep.*without agg_loss"):
                loss(other, data={"response_mask": data})


def test_another_mode_may_be_a_metric_in_a_mini_batch_but_must_not_train() -> None:
    from verl.trainer.ppo.core_algos import agg_loss

    mask = torch.ones(1, 2)
    losses = torch.ones(1, 2, requires_grad=True)
    with working_on(mini_batch()):
        assert agg_loss(losses.detach(), mask, "seq-mean-token-mean") == 1
        assert agg_loss(losses, mask, "seq-mean-token-mean").detach() == 1
        with pytest.raises(ValueError, match="calls agg_loss with 'seq-mean-token-mean' whatever the mode"):
            agg_loss(losses, mask, "seq-mean-token-mean").backward()


def test_sizes_that_a_loss_passes_on_must_be_the_mini_batchs() -> None:
    from verl.trainer.ppo.core_algos import agg_loss

    losses, mask = torch.ones(1, 2), torch.ones(1, 2)
    batch = MiniBatch("vl_norm", parse_mode("vl_norm"), torch.tensor(0.5), dp_size=2, scale=4.0)
    with working_on(batch):
        # x = (1/M) · L^-1 / Σ L_j^-1 = 1/4 · 1/2 / 0.5; times the token sum 2, times dp_size 2
        assert agg_loss(losses, mask, "vl_norm", dp_size=2, loss_scale_factor=4).item() == pytest.approx(1.0)
        assert agg_loss(losses, mask, "vl_norm").item() == pytest.approx(1.0)  # a loss that hands neither on
        for name, wrong, right in (("dp_size", 1, 2), ("loss_scale_factor", 2, 4)):
            with pytest.raises(ValueError, match=rf"{name}={wrong}, and the mini-batch has {right}.*global_batch_info"):
                agg_loss(losses, mask, "vl_norm", **{name: wrong})
