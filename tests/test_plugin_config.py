"""The run's configuration with the plugin: what cannot be exact is refused before Ray starts, and M is filled.

On verl's real config. Not covered: policy losses (test_plugin_losses.py), training (test_e2e.py).
"""

import contextlib
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests import warm
from tests.engine import older_verl
from tests.verl_config import actor, compose
from vlnorm_verl import Aggregation, registry
from vlnorm_verl.plugin import checks, engines, hooks
from vlnorm_verl.plugin.checks import check_config
from vlnorm_verl.plugin.names import TESTED_RELEASES


@pytest.fixture(autouse=True)
def nothing_said() -> None:
    checks.say.cache_clear()


def validate(config: Any, use_critic: bool = False) -> None:
    import verl  # noqa: F401
    from verl.utils.config import validate_config

    validate_config(config, use_reference_policy=False, use_critic=use_critic)


@pytest.mark.parametrize("mode", ["vl_norm", "vl_norm:0.75", "vl_norm:2", "grpo_norm", "dapo_norm"])
def test_mode_alone_is_enough(mode: str) -> None:
    from verl.utils.config import omega_conf_to_dataclass

    config = compose(*actor(loss_agg_mode=mode))
    validate(config)
    assert config.actor_rollout_ref.actor.loss_scale_factor == 77  # data.max_response_length
    assert config.critic.loss_agg_mode == mode  # verl's interpolation
    assert config.critic.loss_scale_factor == 77
    actor_config = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert (actor_config.loss_agg_mode, actor_config.loss_scale_factor) == (mode, 77)


def test_an_unknown_release_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    import verl

    validate(compose(*actor(loss_agg_mode="vl_norm")))
    assert "has not been tested with verl" not in caplog.text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verl, "__version__", "0.10.0.dev")
        validate(compose(*actor(loss_agg_mode="vl_norm")))
    tested = ", ".join(TESTED_RELEASES)
    assert f"has not been tested with verl 0.10.0.dev (tested: {tested})" in caplog.text


SEPARATE = "++trainer.v1.trainer_mode=separate_async"
WHOLE_GROUPS = "++trainer.v1.trainer_mode=sync_whole_groups"


MTP = "++actor_rollout_ref.model.mtp"


@pytest.mark.parametrize(
    ("mode", "trained", "warned"), [("vl_norm", True, True), ("vl_norm", False, False), ("dapo_norm", True, False)]
)
def test_a_loss_beside_the_aggregation_is_warned_of(
    caplog: pytest.LogCaptureFixture, mode: str, trained: bool, warned: bool
) -> None:
    """Where the policy loss is not as large as token-mean's."""
    check_config(compose(*actor(loss_agg_mode=mode), f"{MTP}.enable=true", f"{MTP}.enable_train={trained}"))
    assert ("mtp_loss_scaling_factor" in caplog.text) == warned


@pytest.mark.parametrize(
    ("override", "coefficient"),
    [
        ({"moe_router_load_balancing_type": "aux_loss"}, "moe_aux_loss_coeff"),
        ({"moe_router_load_balancing_type": "none"}, None),
        ({"moe_z_loss_coeff": 0.001}, "moe_z_loss_coeff"),
        ({}, None),
    ],
)
def test_auxiliary_losses_of_experts_are_warned_of(
    caplog: pytest.LogCaptureFixture, override: dict[str, Any], coefficient: str | None
) -> None:
    checks.warn_of_losses_beside(compose(), OmegaConf.create({"megatron": {"override_transformer_config": override}}))
    assert ("multiplies is a mean over each micro-batch" in caplog.text) == (coefficient is not None)
    assert (coefficient or "") in caplog.text


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        (["data.train_batch_size=8", *actor(ppo_mini_batch_size="4")], True),
        (["data.train_batch_size=8", *actor(ppo_mini_batch_size="4", shuffle="true")], False),
        (["data.train_batch_size=8", *actor(ppo_mini_batch_size="8")], False),
        (["data.train_batch_size=8", *actor(ppo_mini_batch_size="4"), SEPARATE], False),
        (["data.train_batch_size=8", *actor(ppo_mini_batch_size="4"), WHOLE_GROUPS], False),
    ],
)
def test_mini_batches_sorted_by_length_are_warned_of(
    caplog: pytest.LogCaptureFixture, overrides: list[str], warned: bool
) -> None:
    for _ in range(2):  # verl's main_ppo calls validate_config and run_ppo
        check_config(compose(*actor(loss_agg_mode="vl_norm"), *overrides))
    assert caplog.text.count("actor.shuffle=true") == caplog.text.count(WHOLE_GROUPS[2:]) == warned


def test_a_critics_own_mini_batches_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    overrides = ["data.train_batch_size=8", *actor(loss_agg_mode="vl_norm", ppo_mini_batch_size="8")]
    check_config(compose(*overrides, "algorithm.adv_estimator=gae", "critic.ppo_mini_batch_size=4"))
    assert "critic.shuffle=true" in caplog.text
    assert "actor.shuffle=true" not in caplog.text


V0, BEFORE_0_9 = "++trainer.use_v1=false", "++trainer.use_v1=null"  # the second: as where verl has no such key


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        (["data.train_batch_size=12", V0], True),
        (["data.train_batch_size=8", V0], False),  # each half has short and long responses
        (["data.train_batch_size=12", V0, "trainer.balance_batch=false"], False),
        (["data.train_batch_size=12", BEFORE_0_9], True),
        (["data.train_batch_size=8", BEFORE_0_9], False),
        (["data.train_batch_size=12", V0, SEPARATE], True),
        (["data.train_batch_size=0", "+async_training.require_batches=3"], True),
        (["data.train_batch_size=0", "+async_training.require_batches=2"], False),
    ],
)
def test_v0s_order_is_warned_of_from_three_mini_batches_on(
    caplog: pytest.LogCaptureFixture, overrides: list[str], warned: bool
) -> None:
    check_config(compose(*actor(loss_agg_mode="vl_norm", ppo_mini_batch_size="4"), *overrides))
    assert ("actor.shuffle=true" in caplog.text) == warned
    assert WHOLE_GROUPS[2:] not in caplog.text


def test_whole_groups_are_refused_by_a_v0_trainer_of_ones_own_main_program() -> None:
    """Whose trainer.use_v1 nobody reads."""
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

    with pytest.raises(ValueError, match="sync_whole_groups: this run's trainer is not one of V1's"):
        RayPPOTrainer(compose(WHOLE_GROUPS), None, {}, None)


OWN_MODES = {
    "of_the_batch": Aggregation(lambda n: 1 / n, lambda n: n.max() * torch.ones_like(n), False),
    "of_the_mean": Aggregation(lambda n: n.mean() / n, lambda n: n, False),
    "negative": Aggregation(lambda n: 3 - n, lambda n: n, False),
    "infinite": Aggregation(lambda n: 1 / torch.log(n), lambda n: n, False),
    "zero": Aggregation(lambda n: n, lambda n: n - 1, False),
}


def test_an_aggregation_may_have_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    constant = Aggregation(lambda n: torch.tensor(1.0), lambda n: n, False)
    monkeypatch.setitem(registry._REGISTRY, "mine", lambda: constant)
    check_config(compose(*actor(loss_agg_mode="mine")))


@pytest.mark.parametrize("name", OWN_MODES)
def test_an_aggregation_that_is_no_function_of_each_length_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._REGISTRY, name, lambda: OWN_MODES[name])
    with pytest.raises(ValueError, match=rf"loss_agg_mode={name!r}: (numerator|summand) must give each length"):
        check_config(compose(*actor(loss_agg_mode=name)))


@pytest.mark.parametrize("trainer", [V0, BEFORE_0_9, "+async_training.require_batches=2", "+rollout.n_gpus_per_node=1"])
def test_whole_groups_with_a_trainer_that_ignores_them_is_refused(trainer: str) -> None:
    for mode in ("vl_norm", "token-mean"):
        with pytest.raises(ValueError, match=r"sync_whole_groups.*verl ignores the key.*Accepted: trainer.use_v1=true"):
            check_config(compose(*actor(loss_agg_mode=mode), WHOLE_GROUPS, trainer))


def test_verls_own_key_sets_m() -> None:
    config = compose(*actor(loss_agg_mode="vl_norm", loss_scale_factor="3000"))
    validate(config)
    assert config.actor_rollout_ref.actor.loss_scale_factor == 3000


def test_stock_config_is_left_alone() -> None:
    config = compose(*actor(loss_agg_mode="seq-mean-token-sum-norm"))
    validate(config)
    assert config.actor_rollout_ref.actor.loss_scale_factor is None


def test_run_with_a_critic_validates() -> None:
    config = compose(
        *actor(loss_agg_mode="vl_norm"),
        "algorithm.adv_estimator=gae",
        "critic.ppo_micro_batch_size_per_gpu=1",
        f"critic.model.path={warm.REPOSITORY}/vlnorm_verl/tasks/tiny/weights",
    )
    validate(config, use_critic=True)


def test_critic_of_a_release_without_m_is_refused_if_there_is_one() -> None:
    """CriticConfig has loss_scale_factor since verl 0.9.0 (workers/config/critic.py)."""
    from omegaconf import open_dict

    for mode, estimator, refused in (("vl_norm", "gae", True), ("vl_norm", "grpo", False), ("grpo_norm", "gae", False)):
        config = compose(*actor(loss_agg_mode=mode), f"algorithm.adv_estimator={estimator}")
        with open_dict(config):
            config.critic.pop("loss_scale_factor", None)
        with pytest.raises(ValueError, match="critic of verl") if refused else contextlib.nullcontext():
            check_config(config)
        assert config.actor_rollout_ref.actor.loss_scale_factor == 77


def test_trainer_that_skips_validation_is_checked_by_run_ppo() -> None:
    """fully_async_policy starts by run_ppo alone (experimental/fully_async_policy/fully_async_main.py:238)."""
    import verl  # noqa: F401
    from verl.trainer.main_ppo import run_ppo

    config = compose(*actor(loss_agg_mode="vl_norm"), "ray_kwargs.ray_init.num_cpus=-1")
    with pytest.raises(Exception, match=r"(?i)num_cpus|negative|quantities"):  # Ray refuses to start, after our part
        run_ppo(config, task_runner_class=None)
    assert config.actor_rollout_ref.actor.loss_scale_factor == 77
    with pytest.raises(ValueError, match="Did you mean 'vl_norm'"):
        run_ppo(compose(*actor(loss_agg_mode="vlnorm")), task_runner_class=None)


def test_what_a_message_offers_is_in_the_installed_verl() -> None:
    from verl.trainer.ppo import core_algos

    with pytest.raises(ValueError, match="Accepted: ") as raised:
        check_config(compose(*actor(loss_agg_mode="tokensum")))
    offered = str(raised.value).partition("Accepted: ")[2].partition(";")[0].split(", ")
    assert "token-mean" in offered
    ones = torch.ones(1, 2)
    for mode in {*offered} - {*registry.available()}:
        core_algos.agg_loss(ones, ones, mode, global_batch_size=1, loss_scale_factor=2)


def test_critic_alone_gets_m_too() -> None:
    config = compose("critic.loss_agg_mode=vl_norm", "algorithm.adv_estimator=gae")
    check_config(config)
    assert config.critic.loss_scale_factor == 77
    assert config.actor_rollout_ref.actor.loss_scale_factor is None


def test_a_critic_on_a_mode_of_verls_is_left_alone() -> None:
    """verl's critic.loss_scale_factor is an interpolation of the actor's."""
    stock = ["critic.loss_agg_mode=seq-mean-token-sum-norm", "algorithm.adv_estimator=gae"]
    config = compose(*actor(loss_agg_mode="vl_norm"), *stock)
    check_config(config)
    assert config.actor_rollout_ref.actor.loss_scale_factor == 77
    assert config.critic.loss_scale_factor is None
    config = compose(*actor(loss_agg_mode="vl_norm", loss_scale_factor="9"), *stock)
    check_config(config)
    assert config.critic.loss_scale_factor == 9  # as without the package


@pytest.mark.parametrize("mode", ["loss", "", "[vl_norm]"])
def test_a_critics_mode_that_nobody_knows_is_refused_if_there_is_one(mode: str) -> None:
    """Modes whose letters stand in verl's own message too. CriticConfig accepts any string."""
    typo = f"critic.loss_agg_mode={mode or repr(mode)}"
    with pytest.raises(ValueError, match=r"critic\.loss_agg_mode=.* is not known.*Accepted: dapo_norm"):
        check_config(compose(typo, "algorithm.adv_estimator=gae"))
    check_config(compose(typo))  # GRPO has no critic


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
        (actor(loss_agg_mode="vl_norm", loss_scale_factor="[3]"), ["actor.loss_scale_factor=[3]", "positive"]),
        (actor(loss_agg_mode="vl_norm", loss_scale_factor="true"), ["actor.loss_scale_factor=True", "positive"]),
        (actor(loss_agg_mode="null"), ["actor.loss_agg_mode=None is not known", "vl_norm"]),
        (actor(loss_agg_mode="1"), ["actor.loss_agg_mode=1 is not known", "vl_norm"]),
        (actor(loss_agg_mode="[vl_norm]"), ["actor.loss_agg_mode=['vl_norm'] is not known", "Did you mean 'vl_norm'"]),
        (actor(loss_agg_mode="{vl_norm:0.75}"), ["actor.loss_agg_mode={'vl_norm': 0.75} is not known", "vl_norm"]),
        ([*actor(loss_agg_mode="vl_norm"), "data.max_response_length=null"], ["data.max_response_length=None"]),
        ([*actor(loss_agg_mode="vl_norm"), "data.train_batch_size=null"], ["data.train_batch_size=None"]),
        (
            [*actor(loss_agg_mode="vl_norm"), "++trainer.use_legacy_worker_impl=enable"],
            ["use_legacy_worker_impl", "disable"],
        ),
    ],
)
def test_what_cannot_be_exact_is_refused(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"actor_rollout_ref|trainer|data") as caught:
        validate(compose(*overrides))
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_refused_before_ray_starts(tmp_path: Path) -> None:
    """The command line that a user types: one message, and no cluster behind it."""
    overrides = (f"hydra.run.dir={tmp_path}", *actor(loss_agg_mode="vl-norm", ppo_micro_batch_size_per_gpu="1"))
    done = warm.python("-m", "verl.trainer.main_ppo", *overrides)
    assert done.returncode != 0
    assert "Did you mean 'vl_norm'" in done.stderr
    assert "ray init kwargs" not in done.stdout


def test_configs_that_ask_for_nothing_of_ours_may_have_any_shape() -> None:
    """verl's validate_config reads no critic where there is none."""
    for config in (
        {"actor_rollout_ref": {"actor": {"loss_agg_mode": "token-mean"}}},
        {"actor_rollout_ref": {"actor": {}}, "critic": {"enable": False}},
        {},
    ):
        for struct in (False, True):
            checked = OmegaConf.create(config)
            OmegaConf.set_struct(checked, struct)
            check_config(checked)
            assert checked == OmegaConf.create(config)


# -------------------------------------------------------------------------------------------------- layouts of engines

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

    config = OmegaConf.create({"strategy": role, "loss_agg_mode": "vl_norm", role: engine})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verl, "__version__", release)
        with pytest.raises(ValueError, match=words) if words else contextlib.nullcontext():
            engines.check_layout(config, "actor")


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

    engine_config = SimpleNamespace(**{"strategy": "megatron", "dynamic_context_parallel": False, **layout})
    engine = SimpleNamespace(tf_config=SimpleNamespace(calculate_per_token_loss=True), engine_config=engine_config)
    engines.warn_of_uncounted_tokens.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verl, "__version__", release)
        refused = outcome == "refused"
        with pytest.raises(RuntimeError, match="vanilla_mbridge=true") if refused else contextlib.nullcontext():
            engines.check_engine(engine, "vl_norm")
        if refused:  # before anything else of a mini-batch
            loss = functools.partial(print, config=SimpleNamespace(loss_agg_mode="vl_norm"))
            with pytest.raises(RuntimeError, match="vanilla_mbridge=true"):
                hooks.with_mini_batch(print)(engine, {}, loss)
        engine.tf_config.calculate_per_token_loss = False
        engines.check_engine(engine, "vl_norm")
        engines.check_engine(SimpleNamespace(tf_config=None, engine_config=engine_config), "vl_norm")
    assert ("too large by the factor" in caplog.text) == (outcome == "warned of")


@pytest.mark.parametrize(
    ("strategy", "ranks", "fsdp_size", "refused"),
    [
        ("fsdp", 2, 1, True),
        ("fsdp2", 2, 1, False),
        ("fsdp", 1, 1, False),
        ("fsdp", 2, -1, False),
        ("fsdp", 4, 2, False),
    ],
)
def test_fsdp1_that_synchronises_no_gradients_is_refused(
    strategy: str, ranks: int, fsdp_size: int, refused: bool
) -> None:
    from verl.workers.engine.fsdp.utils import create_device_mesh

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        mesh = create_device_mesh(ranks, fsdp_size)
        engine = SimpleNamespace(engine_config=SimpleNamespace(strategy=strategy), device_mesh=mesh)
        with pytest.raises(RuntimeError, match=r"fsdp_size=1 .* the 2 ranks") if refused else contextlib.nullcontext():
            engines.check_engine(engine, "vl_norm")
    finally:
        torch.distributed.destroy_process_group()


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
                    check_config(config)


def test_a_group_of_another_size_than_the_engine_says_is_refused() -> None:
    """verl 0.8.0's Megatron with dynamic context parallelism, torchtitan with context parallelism (docs/engines.md)."""

    class Engine:
        def get_data_parallel_size(self) -> int:
            return 2

        def get_data_parallel_group(self) -> None:
            return None

    with pytest.raises(RuntimeError, match="Engine has 2 data-parallel ranks, and a process group of 1"):
        hooks.sum_over_data_parallel_ranks(Engine(), torch.ones(7, dtype=torch.float64))
