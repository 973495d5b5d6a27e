"""The plugin in verl: found by every process, exact next to verl's own modes, loud when something is wrong.

Covered: discovery and switch, load failures, configuration checks on verl's real config, calls outside of a
mini-batch, verl's own modes bit for bit. Not covered: gradients of our modes (test_engine.py), training (test_e2e.py).
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.engine import older_verl
from vlnorm_verl import plugin

REPOSITORY = Path(__file__).parent.parent
# verl 0.7.1 and 0.8.0 have no platforms.
PLATFORM = {} if older_verl.needed() else {"VERL_PLATFORM": "cpu"}


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, **PLATFORM, **env},
        capture_output=True,
        text=True,
        timeout=180,
    )


# ------------------------------------------------------------------------------------------------------- discovery

IS_ACTIVE = """
import verl
from verl.trainer.ppo import core_algos
print("active" if hasattr(core_algos.agg_loss, "__wrapped__") else "stock")
"""


def test_found_by_import_verl_and_switched_off_by_verls_own_switch() -> None:
    assert python(IS_ACTIVE).stdout.strip() == "active"
    assert python(IS_ACTIVE, VERL_USE_EXTERNAL_PLUGINS="none").stdout.strip() == "stock"
    assert python(IS_ACTIVE, VERL_USE_EXTERNAL_PLUGINS="vlnorm").stdout.strip() == "active"


def test_registering_twice_patches_once() -> None:
    done = python(
        """
import verl
from vlnorm_verl import plugin
plugin.register()
from verl.trainer.ppo import core_algos
print(hasattr(core_algos.agg_loss, "__wrapped__"), hasattr(core_algos.agg_loss.__wrapped__, "__wrapped__"))
"""
    )
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_seen_by_ray_workers() -> None:
    done = python(
        f"""
import ray
ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)

@ray.remote
def probe():
    import contextlib, io
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec({IS_ACTIVE!r}, {{}})
    return out.getvalue().strip()

print(ray.get(probe.remote()))
print(ray.get(probe.options(runtime_env={{"env_vars": {{"VERL_USE_EXTERNAL_PLUGINS": "none"}}}}).remote()))
"""
    )
    assert done.stdout.split() == ["active", "stock"], done.stderr[-2000:]


ASK_FOR_VL_NORM = """
from verl.workers.config import FSDPActorConfig
try:
    FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode="vl_norm")
    print("accepted")
except Exception as error:
    print(type(error).__name__, error)
"""


def test_load_failure_is_heard_and_stops_a_run_that_asks_for_vl_norm() -> None:
    done = python("import sys; sys.modules['vlnorm_verl.plugin'] = None\nimport verl\n" + ASK_FOR_VL_NORM)
    assert "WARNING" in done.stderr
    assert "vlnorm-verl could not be loaded" in done.stderr
    assert "vlnorm_verl.plugin" in done.stderr  # the reason
    assert done.stdout.startswith("ValueError Invalid loss_agg_mode: vl_norm"), done.stdout + done.stderr


RENAME = """
import dataclasses, verl
from vlnorm_verl import plugin
plugin.NAMES = tuple(
    dataclasses.replace(n, {changes}) if n.name == "agg_loss" and n.needed else n for n in plugin.NAMES
)
"""


@pytest.mark.parametrize(
    ("changes", "lacking"),
    [
        ("name='renamed_agg_loss'", "core_algos.renamed_agg_loss (an if/elif over verl's modes"),
        ("parameters=('loss_mat', 'weights')", "weights of verl.trainer.ppo.core_algos.agg_loss"),
    ],
)
def test_a_release_without_a_name_that_is_needed_is_heard_and_refused(changes: str, lacking: str) -> None:
    done = python(RENAME.format(changes=changes) + ASK_FOR_VL_NORM)
    assert "WARNING" in done.stderr
    assert lacking in done.stderr
    assert done.stdout.startswith("RuntimeError"), done.stdout
    assert lacking in done.stdout
    # and verl's own agg_loss is as it was
    assert python(RENAME.format(changes=changes) + IS_ACTIVE).stdout.strip() == "stock"


def test_every_name_of_the_table_is_in_the_installed_release() -> None:
    """The trainers' names as well, which are looked at only when a run imports them."""
    importlib.import_module("verl")
    modules = {name.module for name in plugin.NAMES}
    for module in modules:
        importlib.import_module(module)
    assert plugin.lacking() == []
    assert set(plugin._outcome) == modules


def test_an_unknown_release_is_warned_of(compose: Any, caplog: pytest.LogCaptureFixture) -> None:
    import verl

    validate(compose(*actor(loss_agg_mode="vl_norm")))
    assert "has not been tested with verl" not in caplog.text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verl, "__version__", "0.10.0.dev")
        validate(compose(*actor(loss_agg_mode="vl_norm")))
    tested = ", ".join(plugin.TESTED_RELEASES)
    assert f"has not been tested with verl 0.10.0.dev (tested: {tested})" in caplog.text


def test_a_trainer_that_is_run_as_main_gets_the_entropy_metric_too(tmp_path: Path) -> None:
    """verl 0.8.0 runs its V1 trainer as `python -m verl.trainer.main_ppo_sync`; Ray pickles its class by value."""
    package = tmp_path / "verl_like"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "trainer.py").write_text(
        """
import cloudpickle, dataclasses, pickle, subprocess, sys
import torch
from verl.trainer.ppo.core_algos import agg_loss

class Trainer:
    def entropy(self):
        mask = torch.tensor([[1, 0], [1, 1]])
        return agg_loss(loss_mat=mask.double(), loss_mask=mask, loss_agg_mode="vl_norm", loss_scale_factor=1).item()

code = "import pickle, sys; import verl; print(pickle.load(sys.stdin.buffer)().entropy())"
subprocess.run([sys.executable, "-c", code], input=cloudpickle.dumps(Trainer), check=True)
"""
    )
    done = subprocess.run(
        [sys.executable, "-m", "verl_like.trainer"],
        env={**os.environ, **PLATFORM, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    # (1·1 + 1/2·2) / (1 + 1/2)
    assert float(done.stdout) == pytest.approx(4 / 3), done.stderr[-2000:]


# --------------------------------------------------------------------------------------------------- configuration


@pytest.fixture(scope="module")
def compose() -> Any:
    """verl's own ppo_trainer config with overrides, as its command line would make it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module

    def with_overrides(*overrides: str) -> Any:
        with initialize_config_module("verl.trainer.config", version_base=None):
            return hydra_compose(
                "ppo_trainer",
                [
                    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
                    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
                    "data.max_response_length=77",
                    "algorithm.adv_estimator=grpo",
                    "trainer.n_gpus_per_node=1",
                    "++trainer.use_legacy_worker_impl=disable",  # verl 0.7.1's default is to use them
                    *overrides,
                ],
            )

    return with_overrides


def validate(config: Any, use_critic: bool = False) -> None:
    import verl  # noqa: F401
    from verl.utils.config import validate_config

    validate_config(config, use_reference_policy=False, use_critic=use_critic)


def actor(**settings: str) -> list[str]:
    return [f"actor_rollout_ref.actor.{key}={value}" for key, value in settings.items()]


@pytest.mark.parametrize("mode", ["vl_norm", "vl_norm:0.75", "vl_norm:2", "grpo_norm", "dapo_norm"])
def test_mode_alone_is_enough(compose: Any, mode: str) -> None:
    from verl.utils.config import omega_conf_to_dataclass

    config = compose(*actor(loss_agg_mode=mode))
    validate(config)
    assert config.actor_rollout_ref.actor.loss_scale_factor == 77  # data.max_response_length
    assert config.critic.loss_agg_mode == mode  # verl's interpolation
    assert config.critic.loss_scale_factor == 77
    actor_config = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert (actor_config.loss_agg_mode, actor_config.loss_scale_factor) == (mode, 77)


SEPARATE = "++trainer.v1.trainer_mode=separate_async"
WHOLE_GROUPS = "++trainer.v1.trainer_mode=sync_whole_groups"


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        (["data.train_batch_size=8", *actor(ppo_mini_batch_size="4")], True),
        (["data.train_batch_size=8", *actor(ppo_mini_batch_size="4", shuffle="true")], False),
        (["data.train_batch_size=8", *actor(ppo_mini_batch_size="8")], False),
        (["data.train_batch_size=8", *actor(ppo_mini_batch_size="4"), SEPARATE], False),
        (["data.train_batch_size=8", *actor(ppo_mini_batch_size="4"), WHOLE_GROUPS], False),
        (["data.train_batch_size=0", *actor(ppo_mini_batch_size="4"), "+async_training.require_batches=2"], True),
        (["data.train_batch_size=0", *actor(ppo_mini_batch_size="4"), "+async_training.require_batches=1"], False),
    ],
)
def test_mini_batches_sorted_by_length_are_warned_of(
    compose: Any, caplog: pytest.LogCaptureFixture, overrides: list[str], warned: bool
) -> None:
    plugin.check_config(compose(*actor(loss_agg_mode="vl_norm"), *overrides))
    assert ("actor.shuffle=true" in caplog.text) == (WHOLE_GROUPS[2:] in caplog.text) == warned


def test_verls_own_key_sets_m(compose: Any) -> None:
    config = compose(*actor(loss_agg_mode="vl_norm", loss_scale_factor="3000"))
    validate(config)
    assert config.actor_rollout_ref.actor.loss_scale_factor == 3000


def test_stock_config_is_left_alone(compose: Any) -> None:
    config = compose(*actor(loss_agg_mode="seq-mean-token-sum-norm"))
    validate(config)
    assert config.actor_rollout_ref.actor.loss_scale_factor is None


def test_run_with_a_critic_validates(compose: Any) -> None:
    config = compose(
        *actor(loss_agg_mode="vl_norm"),
        "algorithm.adv_estimator=gae",
        "critic.ppo_micro_batch_size_per_gpu=1",
        f"critic.model.path={REPOSITORY}/vlnorm_verl/tasks/tiny/weights",
    )
    validate(config, use_critic=True)


def test_critic_of_a_release_without_m_is_refused_if_there_is_one(compose: Any) -> None:
    """CriticConfig has loss_scale_factor since verl 0.9.0 (workers/config/critic.py)."""
    from omegaconf import open_dict

    for mode, estimator, refused in (("vl_norm", "gae", True), ("vl_norm", "grpo", False), ("grpo_norm", "gae", False)):
        config = compose(*actor(loss_agg_mode=mode), f"algorithm.adv_estimator={estimator}")
        with open_dict(config):
            config.critic.pop("loss_scale_factor", None)
        with pytest.raises(ValueError, match="critic of verl") if refused else contextlib.nullcontext():
            plugin.check_config(config)
        assert config.actor_rollout_ref.actor.loss_scale_factor == 77


PER_TOKEN: dict[str, Any] = {"override_transformer_config": {"calculate_per_token_loss": True}}


@pytest.mark.parametrize(
    ("role", "release", "engine", "words"),
    [
        ("torchtitan", "0.9.1", {"context_parallel_size": 2}, "context_parallel_size=2"),
        ("torchtitan", "0.9.1", {"data_parallel_replicate_size": 2}, "data_parallel_shard_size > 1"),
        ("torchtitan", "0.9.1", {"data_parallel_replicate_size": 2, "data_parallel_shard_size": 2}, None),
        ("megatron", "0.8.0", {"dynamic_context_parallel": True}, "dynamic_context_parallel=true"),
        ("megatron", "0.9.0", {"dynamic_context_parallel": True}, None),
        # Whether Megatron-Bridge sets it depends on the model: the engine is asked, below.
        ("megatron", "0.8.0", {"context_parallel_size": 2, "vanilla_mbridge": False}, None),
        ("megatron", "0.7.1", PER_TOKEN, "actor.megatron.override_transformer_config.calculate_per_token_loss=true"),
        ("megatron", "0.9.1", PER_TOKEN, None),
        ("megatron", "0.9.1", PER_TOKEN | {"context_parallel_size": 2}, "calculate_per_token_loss=true"),
        ("megatron", "0.9.1", PER_TOKEN | {"context_parallel_size": 2, "dynamic_context_parallel": True}, None),
        ("mindspeed", "0.8.0", PER_TOKEN, "actor.mindspeed.override_transformer_config.calculate_per_token_loss=true"),
        ("fsdp2", "0.7.1", {}, None),
    ],
)
def test_layouts_of_engines_that_cannot_be_exact_are_refused(
    role: str, release: str, engine: dict[str, Any], words: str | None
) -> None:
    """docs/engines.md has the reasons; keys as in verl's trainer/config/engine/*.yaml."""
    import verl
    from omegaconf import OmegaConf

    config = OmegaConf.create({"strategy": role, "loss_agg_mode": "vl_norm", role: engine})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verl, "__version__", release)
        with pytest.raises(ValueError, match=words) if words else contextlib.nullcontext():
            plugin.check_engine(config, "actor")


@pytest.mark.parametrize(
    ("release", "layout", "outcome"),
    [
        ("0.8.0", {"context_parallel_size": 1}, "refused"),
        ("0.9.1", {"context_parallel_size": 1}, "silence"),
        ("0.9.1", {"context_parallel_size": 2}, "warned of"),
        ("0.9.1", {"context_parallel_size": 2, "dynamic_context_parallel": True}, "silence"),
    ],
)
def test_the_engine_is_asked_how_it_reduces_gradients(
    caplog: pytest.LogCaptureFixture, release: str, layout: dict[str, Any], outcome: str
) -> None:
    """Some models' providers in Megatron-Bridge set calculate_per_token_loss whatever the run's config says."""
    import verl

    engine_config = SimpleNamespace(**{"dynamic_context_parallel": False, **layout})
    engine = SimpleNamespace(tf_config=SimpleNamespace(calculate_per_token_loss=True), engine_config=engine_config)
    plugin._warn_of_uncounted_tokens.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verl, "__version__", release)
        refused = outcome == "refused"
        with pytest.raises(RuntimeError, match="vanilla_mbridge=true") if refused else contextlib.nullcontext():
            plugin.check_reduction(engine, "vl_norm")
        engine.tf_config.calculate_per_token_loss = False
        plugin.check_reduction(engine, "vl_norm")
        plugin.check_reduction(SimpleNamespace(tf_config=None), "vl_norm")
    assert ("too large by the factor" in caplog.text) == (outcome == "warned of")


def test_megatron_and_torchtitan_of_verls_own_config_are_checked() -> None:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        titan = ["model_engine=torchtitan", "actor_rollout_ref.actor.torchtitan.context_parallel_size=2"]
        per_token = "megatron.override_transformer_config.calculate_per_token_loss=true"
        for name, override, release, words in (
            ("ppo_megatron_trainer", [f"+actor_rollout_ref.actor.{per_token}"], "0.8.0", per_token),
            ("ppo_trainer", titan, "0.9.1", r"actor_rollout_ref\.actor.*context_parallel_size=2"),
        ):
            if "megatron" not in name and older_verl.needed():
                continue  # no model_engine=torchtitan yet
            mode = ["actor_rollout_ref.actor.loss_agg_mode=vl_norm", "++trainer.use_legacy_worker_impl=disable"]
            config = hydra_compose(name, [*override, *mode])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("verl.__version__", release)
                with pytest.raises(ValueError, match=words):
                    plugin.check_config(config)


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

    share = "its gradient depends on which responses share a micro-batch"
    part = "a part of its gradient does not go through agg_loss"
    return {
        "passes_sizes_on": (passes_sizes_on, None),
        "metric_of_another_mode": (metric_of_another_mode, None),
        "k3_to_old_policy_by_mode": (k3_to_old_policy_by_mode, None),
        "vanilla_inside": (vanilla_inside, None),
        "fixed_mode": (fixed_mode, "it aggregates by 'token-mean' whatever the mode"),
        "own_mean": (own_mean, "it never calls agg_loss"),
        "only_a_metric": (only_a_metric, "it never calls agg_loss"),
        "needs_more": (needs_more, "it raised KeyError on four short responses ('teacher_log_prob')"),
        "narrow_mask": (narrow_mask, "another mask than response_mask"),
        "mean_beside": (mean_beside, part),
        "k2_to_old_policy": (k2_to_old_policy, part),
        "hinge_beyond_the_clip_range": (hinge_beyond_the_clip_range, part),
        "divides_by_micro_batch": (divides_by_micro_batch, share),
        "divides_by_width": (divides_by_width, share),
        "own_m": (own_m, "loss_scale_factor=4, and the mini-batch has 77"),
        "geo_mean_inside": (geo_mean_inside, "the policy loss 'geo_mean' never called agg_loss"),
    }


def test_a_users_policy_loss_is_tried_once_on_the_driver(compose: Any) -> None:
    """Under no_grad too, in which a caller may be; what only workers register is left to their first mini-batch."""
    from verl.trainer.ppo import core_algos
    from verl.utils.config import omega_conf_to_dataclass

    losses = users_losses()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for name, (loss, _) in losses.items():
            patch.setitem(core_algos.POLICY_LOSS_REGISTRY, name, loss)
        for name in (*losses, "known_to_workers_only"):
            config = compose(*actor(loss_agg_mode="vl_norm"), f"actor_rollout_ref.actor.policy_loss.loss_mode={name}")
            refusal = losses.get(name, (None, None))[1]
            if refusal is None:
                plugin.check_config(config)
            else:
                with pytest.raises(ValueError, match=r"Accepted: .*passes_sizes_on, vanilla, vanilla_inside") as caught:
                    plugin.check_config(config)
                assert refusal in str(caught.value), name
                assert f"loss_mode='{name}'" in str(caught.value)
            omega_conf_to_dataclass(config.actor_rollout_ref.actor)  # as every worker does: it is tried no more


@pytest.mark.parametrize("name", ["vanilla", "gspo", "gpg", "cispo", "clip_cov", "kl_cov", "dppo_tv", "dppo_kl"])
def test_verls_own_policy_losses_are_accepted(compose: Any, name: str) -> None:
    plugin.check_config(
        compose(*actor(loss_agg_mode="vl_norm"), f"actor_rollout_ref.actor.policy_loss.loss_mode={name}")
    )


def test_the_policy_loss_of_the_readme_is_accepted() -> None:
    from verl.trainer.ppo import core_algos
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig

    readme = (REPOSITORY / "README.md").read_text()
    code = readme[readme.index('@register_policy_loss("mine")') :].partition("```")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core_algos, "POLICY_LOSS_REGISTRY", dict(core_algos.POLICY_LOSS_REGISTRY))
        exec(code, vars(core_algos) | {"torch": torch})
        policy_loss = PolicyLossConfig(loss_mode="mine")
        config = FSDPActorConfig(
            rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode="vl_norm", policy_loss=policy_loss
        )
        assert plugin.policy_loss_problem("mine", config) is None  # __post_init__ only warns if it cannot be tried


def test_trainer_that_skips_validation_is_checked_by_run_ppo(compose: Any) -> None:
    """fully_async_policy starts by run_ppo alone (experimental/fully_async_policy/fully_async_main.py:238)."""
    import verl  # noqa: F401
    from verl.trainer.main_ppo import run_ppo

    config = compose(*actor(loss_agg_mode="vl_norm"), "ray_kwargs.ray_init.num_cpus=-1")
    with pytest.raises(Exception, match=r"(?i)num_cpus|negative|quantities"):  # Ray refuses to start, after our part
        run_ppo(config, task_runner_class=None)
    assert config.actor_rollout_ref.actor.loss_scale_factor == 77
    with pytest.raises(ValueError, match="Did you mean 'vl_norm'"):
        run_ppo(compose(*actor(loss_agg_mode="vlnorm")), task_runner_class=None)


def test_critic_alone_gets_m_too(compose: Any) -> None:
    config = compose("critic.loss_agg_mode=vl_norm", "algorithm.adv_estimator=gae")
    plugin.check_config(config)
    assert config.critic.loss_scale_factor == 77
    assert config.actor_rollout_ref.actor.loss_scale_factor is None


def test_a_critic_on_a_mode_of_verls_is_left_alone(compose: Any) -> None:
    """verl's critic.loss_scale_factor is an interpolation of the actor's."""
    stock = ["critic.loss_agg_mode=seq-mean-token-sum-norm", "algorithm.adv_estimator=gae"]
    config = compose(*actor(loss_agg_mode="vl_norm"), *stock)
    plugin.check_config(config)
    assert config.actor_rollout_ref.actor.loss_scale_factor == 77
    assert config.critic.loss_scale_factor is None
    config = compose(*actor(loss_agg_mode="vl_norm", loss_scale_factor="9"), *stock)
    plugin.check_config(config)
    assert config.critic.loss_scale_factor == 9  # as without the package


@pytest.mark.parametrize("mode", ["loss", "mode", "a", "", "invalid", "null", "1", "[vl_norm]", "{vl_norm:0.75}"])
def test_a_critics_mode_that_nobody_knows_is_refused_if_there_is_one(compose: Any, mode: str) -> None:
    """Modes whose letters stand in verl's own message too. CriticConfig accepts any string."""
    typo = f"critic.loss_agg_mode={mode or repr(mode)}"
    with pytest.raises(ValueError, match=r"critic\.loss_agg_mode=.* is not known.*Accepted: dapo_norm"):
        plugin.check_config(compose(typo, "algorithm.adv_estimator=gae"))
    plugin.check_config(compose(typo))  # GRPO has no critic


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            actor(loss_agg_mode="vl-norm"),
            ["actor_rollout_ref.actor.loss_agg_mode='vl-norm'", "'vl_norm'", "token-mean"],
        ),
        (actor(loss_agg_mode="'vl_norm:2.1'"), ["actor_rollout_ref.actor.loss_agg_mode", "2.1", "0 ≤ α ≤ 2"]),
        (actor(loss_agg_mode="vl_norm", loss_scale_factor="0"), ["loss_scale_factor=0", "positive"]),
        (actor(loss_agg_mode="vl_norm", loss_scale_factor="-5"), ["loss_scale_factor=-5", "positive"]),
        (actor(loss_agg_mode="vl_norm", loss_scale_factor="'8192'"), ["actor.loss_scale_factor='8192'", "positive"]),
        (actor(loss_agg_mode="vl_norm", loss_scale_factor="8k"), ["actor.loss_scale_factor='8k'", "positive"]),
        (actor(loss_agg_mode="vl_norm", loss_scale_factor="[3]"), ["actor.loss_scale_factor=[3]", "positive"]),
        (actor(loss_agg_mode="vl_norm", loss_scale_factor="true"), ["actor.loss_scale_factor=True", "positive"]),
        (actor(loss_agg_mode="null"), ["actor.loss_agg_mode=None is not known", "vl_norm"]),
        (actor(loss_agg_mode="1"), ["actor.loss_agg_mode=1 is not known", "vl_norm"]),
        (actor(loss_agg_mode="[vl_norm]"), ["actor.loss_agg_mode=['vl_norm'] is not known", "Did you mean 'vl_norm'"]),
        (actor(loss_agg_mode="{vl_norm:0.75}"), ["actor.loss_agg_mode={'vl_norm': 0.75} is not known", "vl_norm"]),
        ([*actor(loss_agg_mode="vl_norm"), "data.max_response_length=null"], ["data.max_response_length=None"]),
        ([*actor(loss_agg_mode="vl_norm"), "data.train_batch_size=null"], ["data.train_batch_size=None"]),
        pytest.param(
            [*actor(loss_agg_mode="vl_norm"), "actor_rollout_ref.actor.policy_loss.loss_mode=geo_mean"],
            ["'geo_mean'", "never calls agg_loss", "Accepted: bypass_mode, cispo, clip_cov,", "vanilla."],
            id="geo_mean",
        ),
        (
            [*actor(loss_agg_mode="vl_norm"), "actor_rollout_ref.actor.policy_loss.loss_mode=sapo"],
            ["'seq-mean-token-mean' whatever the mode", "vanilla"],
        ),
        (
            [*actor(loss_agg_mode="vl_norm"), "++trainer.use_legacy_worker_impl=enable"],
            ["use_legacy_worker_impl", "disable"],
        ),
        (
            [
                *actor(loss_agg_mode="vl_norm"),
                "algorithm.rollout_correction.bypass_mode=true",
                "algorithm.rollout_correction.rollout_rs=token_k1",
            ],
            ["rollout_rs", "null"],
        ),
    ],
)
def test_what_cannot_be_exact_is_refused(compose: Any, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"actor_rollout_ref|algorithm|trainer|critic|data") as caught:
        validate(compose(*overrides))
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_refused_before_ray_starts(tmp_path: Path) -> None:
    """The command line that a user types: one message, and no cluster behind it."""
    done = python(
        f"import runpy, sys; sys.argv[1:] = ['hydra.run.dir={tmp_path}',"
        "'actor_rollout_ref.actor.loss_agg_mode=vl-norm', 'actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1'];"
        "runpy.run_module('verl.trainer.main_ppo', run_name='__main__')"
    )
    assert done.returncode != 0
    assert "Did you mean 'vl_norm'" in done.stderr
    assert "ray init kwargs" not in done.stdout


# --------------------------------------------------------------------------------------------------------- agg_loss


def test_no_silent_local_sum() -> None:
    import verl  # noqa: F401
    from verl.trainer.ppo.core_algos import agg_loss

    losses, mask = torch.ones(1, 2, requires_grad=True), torch.ones(1, 2)
    with pytest.raises(RuntimeError, match="whole mini-batch"):
        agg_loss(losses, mask, "vl_norm", loss_scale_factor=2)
    with pytest.raises(RuntimeError, match="whole mini-batch"):  # a share of a batch that other ranks have too
        agg_loss(losses.detach(), mask, "vl_norm", dp_size=2, loss_scale_factor=2)
    with pytest.raises(ValueError, match="loss_scale_factor=0"):
        agg_loss(losses.detach(), mask, "vl_norm", loss_scale_factor=0)


def in_mini_batch(total: float = 0.5, dp_size: int = 1, scale: float = 2.0) -> Any:
    from vlnorm_verl import parse_mode

    mini_batch = plugin._MiniBatch("vl_norm", parse_mode("vl_norm"), torch.tensor(total), dp_size, scale)
    return plugin._in_mini_batch(mini_batch)


def test_what_a_loss_passes_on_is_the_mini_batchs() -> None:
    """Also under the name that verl's trainers have it by, which is for whole batches outside of a mini-batch."""
    import verl  # noqa: F401
    from verl.trainer.ppo.ray_trainer import agg_loss

    one = torch.ones(1, 2)
    with in_mini_batch(dp_size=2, scale=4.0):
        # x = (1/M) · L^-1 / Σz = 1/4 · 1/2 / 0.5; times the token sum 2, times dp_size 2
        assert agg_loss(one, one, "vl_norm", dp_size=2, loss_scale_factor=4).item() == pytest.approx(1.0)
        assert agg_loss(one, one, "vl_norm").item() == pytest.approx(1.0)  # a loss that hands neither on
        for wrong in ({"dp_size": 1}, {"loss_scale_factor": one.shape[-1]}):
            with pytest.raises(
                RuntimeError, match=rf"{next(iter(wrong))}=[12], and the mini-batch has [24].*global_batch_info"
            ):
                agg_loss(one, one, "vl_norm", **wrong)
    with pytest.raises(RuntimeError, match="whole mini-batch"):  # nothing is left over
        agg_loss(one.clone().requires_grad_(), one, "vl_norm", loss_scale_factor=2)


def test_another_mode_may_be_a_metric_in_a_mini_batch_but_must_not_train() -> None:
    import verl  # noqa: F401
    from verl.trainer.ppo.core_algos import agg_loss

    one = torch.ones(1, 2)
    with in_mini_batch():
        assert agg_loss(one, one, "seq-mean-token-mean") == 1
        assert agg_loss(one.clone().requires_grad_(), one, "seq-mean-token-mean").detach() == 1
        with pytest.raises(ValueError, match="aggregates by 'seq-mean-token-mean' whatever the mode"):
            agg_loss(one.clone().requires_grad_(), one, "seq-mean-token-mean").backward()


def test_stock_modes_compile_to_one_graph_as_without_the_plugin() -> None:
    import verl  # noqa: F401
    from verl.trainer.ppo.core_algos import agg_loss

    losses, mask = torch.rand(2, 3), torch.tensor([[1.0, 1, 0], [1, 1, 1]])
    compiled = torch.compile(lambda x: agg_loss(x, mask, "token-mean", dp_size=1), fullgraph=True, backend="eager")
    assert torch.equal(compiled(losses), agg_loss(losses, mask, "token-mean"))


EARLY = """
import functools
from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn, register_policy_loss
from verl.utils import validate_config

def by_default(losses, mask, mode, sizes, aggregate=agg_loss):
    return aggregate(losses, mask, mode, **sizes)

WAYS = {"name": lambda losses, mask, mode, sizes: agg_loss(losses, mask, mode, **sizes), "default": by_default,
        "partial": lambda losses, mask, mode, sizes: functools.partial(agg_loss, losses)(mask, mode, **sizes)}

for way, aggregate in WAYS.items():
    @register_policy_loss("early_" + way)
    def loss(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights=None,
             aggregate=aggregate):
        losses = -advantages * (log_prob - old_log_prob).exp()
        return aggregate(losses, response_mask, loss_agg_mode, config.global_batch_info), {}

@register_policy_loss("early_never")
def never(log_prob, **_):
    return log_prob.mean(), {}
"""
HOLDS_EARLY = """
import torch, verl, early
from verl.workers.config import FSDPActorConfig, PolicyLossConfig
from vlnorm_verl import parse_mode, plugin
for way in early.WAYS:
    actor = FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode="vl_norm",
                            policy_loss=PolicyLossConfig(loss_mode="early_" + way))
    print(way, plugin.policy_loss_problem("early_" + way, actor))
    one, mask = torch.ones(2, 2), torch.tensor([[1, 1], [1, 0]])
    with plugin._in_mini_batch(plugin._MiniBatch("vl_norm", parse_mode("vl_norm"), torch.tensor(1.5), 1, 8.0)):
        print(round(early.WAYS[way](-one, mask, "vl_norm", {}).item(), 6))
        try:
            early.get_policy_loss_fn("early_never")(log_prob=torch.ones(1, 1, requires_grad=True))
        except RuntimeError as error:
            print("never called agg_loss" in str(error))
try:
    from omegaconf import OmegaConf
    early.validate_config(OmegaConf.create({"actor_rollout_ref": {"actor": {"loss_agg_mode": "vlnorm"}}}), False, False)
except ValueError as error:
    print("vl_norm" in str(error))
"""


@pytest.mark.parametrize("how", ["VERL_USE_EXTERNAL_MODULES", "an entry point that is found earlier"])
def test_whoever_took_verls_functions_before_the_plugin_has_it_too(how: str, tmp_path: Path) -> None:
    """verl imports a user's module before its entry points, and those in the order of the file system."""
    (tmp_path / "early.py").write_text(EARLY)
    env = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    if how == "VERL_USE_EXTERNAL_MODULES":
        env[how] = "early"
    else:
        info = tmp_path / "early-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: early\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[verl.plugins]\nearly = early\n")
    done = python(HOLDS_EARLY, **env)
    # Σ x_i ℓ_i = −(1/8)(2·½ + 1·1)/(½ + 1)
    expected = [line for way in ("name", "default", "partial") for line in (f"{way} None", "-0.166667", "True")]
    assert done.stdout.splitlines() == [*expected, "True"], done.stderr[-2000:]


def test_a_mode_that_a_user_puts_into_verl_is_accepted_as_stock_verl_accepts_it() -> None:
    """After `import verl`, into agg_loss and ActorConfig; and importlib.reload keeps the plugin."""
    done = python(
        """
import importlib, verl
from omegaconf import OmegaConf
from verl.trainer.ppo import core_algos
from verl.workers.config import FSDPActorConfig
from verl.workers.config.actor import ActorConfig
from vlnorm_verl import plugin

aggregate, post_init = core_algos.agg_loss, ActorConfig.__post_init__
def agg_loss(loss_mat, loss_mask, loss_agg_mode, **sizes):
    return loss_mat.sum() if loss_agg_mode == "mine" else aggregate(loss_mat, loss_mask, loss_agg_mode, **sizes)
def __post_init__(self):
    mode = self.loss_agg_mode
    object.__setattr__(self, "loss_agg_mode", "token-mean" if mode == "mine" else mode)
    post_init(self)
    object.__setattr__(self, "loss_agg_mode", mode)
core_algos.agg_loss, ActorConfig.__post_init__ = agg_loss, __post_init__

plugin.check_config(OmegaConf.create({"actor_rollout_ref": {"actor": {"loss_agg_mode": "mine"}}}))
print(FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode="mine").loss_agg_mode)
core_algos.agg_loss = aggregate
importlib.reload(core_algos)
print(plugin.is_verls("vl_norm"), plugin.lacking(), hasattr(core_algos.agg_loss, "__wrapped__"))
"""
    )
    assert done.stdout.splitlines() == ["mine", "False [] True"], done.stderr[-2000:]


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_alpha_0_is_verls_dr_grpo_and_the_entropy_metric_takes_the_whole_batch(lengths: list[int], seed: int) -> None:
    """The driver's call, with verl's own arguments (trainer/ppo/v1/trainer_base.py:1677)."""
    import verl  # noqa: F401
    from verl.trainer.ppo.ray_trainer import agg_loss

    loss = torch.rand(len(lengths), 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(9)[None] < torch.tensor(lengths)[:, None]).long()
    ours = agg_loss(loss_mat=loss, loss_mask=mask, loss_agg_mode="vl_norm:0", loss_scale_factor=9)
    stock = agg_loss(loss_mat=loss, loss_mask=mask, loss_agg_mode="seq-mean-token-sum-norm", loss_scale_factor=9)
    assert ours.item() == pytest.approx(stock.item(), rel=1e-12)


def test_configs_that_ask_for_nothing_of_ours_may_have_any_shape() -> None:
    """verl's validate_config reads no critic where there is none."""
    from omegaconf import OmegaConf

    for config in (
        {"actor_rollout_ref": {"actor": {"loss_agg_mode": "token-mean"}}},
        {"actor_rollout_ref": {"actor": {}}, "critic": {"enable": False}},
        {},
    ):
        for struct in (False, True):
            checked = OmegaConf.create(config)
            OmegaConf.set_struct(checked, struct)
            plugin.check_config(checked)
            assert checked == OmegaConf.create(config)


def test_modes_that_this_verl_knows_and_we_do_not_are_left_to_it() -> None:
    """A fork's or a later release's; here verl's agg_loss is extended before the plugin looks at it."""
    done = python(
        """
import sys, types, wrapt
def extend(module):
    stock = module.agg_loss
    def agg_loss(loss_mat, loss_mask, loss_agg_mode, dp_size=1, batch_num_tokens=None, global_batch_size=None,
                 loss_scale_factor=None):
        if loss_agg_mode in ("forks-own", "vl_norm"):
            return loss_mat.sum()
        assert loss_agg_mode != "forks-fussy", "wants more than these sizes"
        sizes = (dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
        return stock(loss_mat, loss_mask, loss_agg_mode, *sizes)
    module.agg_loss = agg_loss
wrapt.register_post_import_hook(extend, "verl.trainer.ppo.core_algos")
import verl
from vlnorm_verl import plugin
from omegaconf import OmegaConf
for mode in ("forks-own", "forks-fussy", "vl_norm", "grpo_norm", "nobodys"):
    print(mode, plugin.is_verls(mode), plugin.is_ours(mode))
plugin.check_config(OmegaConf.create({"actor_rollout_ref": {"actor": {"loss_agg_mode": "forks-own"}}}))
"""
    )
    assert done.stdout.splitlines() == [
        "forks-own True False",
        "forks-fussy True False",
        "vl_norm True False",
        "grpo_norm False True",
        "nobodys False False",
    ], done.stderr[-2000:]


def test_a_group_of_another_size_than_the_engine_says_is_refused() -> None:
    """verl 0.8.0's Megatron with dynamic context parallelism, torchtitan with context parallelism (docs/engines.md)."""

    class Engine:
        def get_data_parallel_size(self) -> int:
            return 2

        def get_data_parallel_group(self) -> None:
            return None

    with pytest.raises(RuntimeError, match="Engine has 2 data-parallel ranks, and a process group of 1"):
        plugin._sum_over_data_parallel_ranks(Engine(), torch.ones(7, dtype=torch.float64))


def test_a_policy_loss_that_never_aggregates_is_seen_beside_kl_and_entropy_terms() -> None:
    """They call agg_loss too. Such a loss gets here if the driver could not try it."""
    import verl  # noqa: F401
    from verl.trainer.ppo import core_algos
    from verl.workers.utils import losses

    def own(log_prob: torch.Tensor) -> Any:
        return log_prob.mean(), {}

    one = torch.ones(1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(core_algos.POLICY_LOSS_REGISTRY, "users_own", own)
        loss = losses.get_policy_loss_fn("users_own")
        assert loss(one)[0].item() == 1.0  # verl's own modes: nothing is asked of it
        with in_mini_batch():
            core_algos.agg_loss(one.clone().requires_grad_(), one, "vl_norm")  # a KL term of the micro-batch before
            with pytest.raises(RuntimeError, match="the policy loss 'users_own' never called agg_loss"):
                loss(one)


@pytest.mark.parametrize("layout", ["padded", "jagged"])
def test_a_term_over_another_mask_is_seen_in_the_micro_batch(layout: str) -> None:
    """In the policy loss, as masking by the ratio does, or beside it, as an auxiliary loss over tool tokens does."""
    import verl  # noqa: F401
    from verl.trainer.ppo.core_algos import agg_loss

    mask = torch.tensor([[True, True, False], [True, True, True]])
    data = torch.nested.nested_tensor([mask[0, :2], mask[1]], layout=torch.jagged) if layout == "jagged" else mask

    def loss_function(loss_mask: torch.Tensor, data: Any, requires_grad: bool = True) -> torch.Tensor:
        return agg_loss(torch.zeros(loss_mask.shape, requires_grad=requires_grad), loss_mask, "vl_norm")

    with in_mini_batch():
        assert plugin._mini_batch is not None
        loss = plugin._with_lengths(loss_function, plugin._mini_batch)
        batch = {"response_mask": data}
        loss(mask, data=batch)
        loss(~mask, data=batch, requires_grad=False)  # a metric
        for other in (~mask, mask & (torch.arange(3) > 0), mask[:1]):
            with pytest.raises(ValueError, match=r"another mask than response_mask.*losses \* keep"):
                loss(other, data=batch)


def test_own_aggregation_is_usable_by_its_name() -> None:
    done = python(
        """
import torch, verl
from vlnorm_verl import Aggregation, register_aggregation

@register_aggregation("sqrt_norm")
def sqrt_norm() -> Aggregation:
    return Aggregation(u=lambda L: L**-0.5, z=lambda L: L**-0.5, per_token_scale=True)

from verl.workers.config import FSDPActorConfig
from verl.trainer.ppo.ray_trainer import agg_loss
FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode="sqrt_norm")
mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]])
print(agg_loss(loss_mat=mask.double(), loss_mask=mask, loss_agg_mode="sqrt_norm", loss_scale_factor=1).item())
"""
    )
    # (1·1 + 1/2·4) / (1 + 1/2)
    assert float(done.stdout) == pytest.approx(2.0), done.stderr


# ------------------------------------------------------------------------------------------- verl's own modes


def test_stock_modes_are_bit_identical_with_and_without_the_plugin(tmp_path: Path) -> None:
    """Whole gradients of the real engine on two ranks, and metrics, with the package's entry point on and off."""
    results = []
    for switch in ("auto", "none"):
        out = tmp_path / f"{switch}.json"
        command = ["-m", "tests.engine.scenarios", "--ranks", "2", "--dtype", "float32", "--stock", "--out", str(out)]
        done = subprocess.run(
            [sys.executable, *command],
            cwd=REPOSITORY,
            env={**os.environ, "VERL_USE_EXTERNAL_PLUGINS": switch},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads(out.read_text()))
    assert [row["plugin"] for row in results[0]] == [True] * len(results[0])
    assert [row["plugin"] for row in results[1]] == [False] * len(results[1])
    for with_plugin, without in zip(*results, strict=True):
        for key in ("mode", "scenario", "gradient_sha256", "metrics"):
            assert with_plugin[key] == without[key], (with_plugin["mode"], key)
    assert len({row["gradient_sha256"] for row in results[0]}) == len(results[0])  # the modes differ
