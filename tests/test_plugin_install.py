"""The plugin gets into verl: in every process, once, into whatever verl there is, and is heard where it does not.

Covered: discovery and switch, load failures, what a release lacks, modules that took verl's functions before, forks
that know modes of their own. Not covered: Ray's workers (test_doctor.py), what the wrappers do (test_plugin_*.py).
"""

import importlib
import os
import subprocess
from pathlib import Path

import pytest

from tests import warm
from tests.engine import older_verl
from vlnorm_verl.paper.overlong import filtering
from vlnorm_verl.plugin import WRAPPERS, install, lacking, names
from vlnorm_verl.plugin.hooks import with_mini_batch

# verl 0.7.1 and 0.8.0 have no platforms.
PLATFORM = {} if older_verl.needed() else {"VERL_PLATFORM": "cpu"}


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return warm.python("-c", code, **(PLATFORM | environment))


IS_ACTIVE = """
import verl
from verl.trainer.ppo import core_algos
print("active" if hasattr(core_algos.agg_loss, "__wrapped__") else "stock")
"""


def test_found_by_import_verl_and_switched_off_by_verls_own_switch() -> None:
    assert python(IS_ACTIVE).stdout.strip() == "active"
    assert python(IS_ACTIVE, VERL_USE_EXTERNAL_PLUGINS="none").stdout.strip() == "stock"
    assert python(IS_ACTIVE, VERL_USE_EXTERNAL_PLUGINS="vlnorm").stdout.strip() == "active"


def test_registering_twice_patches_once_and_loading_it_imports_no_verl() -> None:
    done = python(
        """
import sys
import vlnorm_verl.verl_entry
print("verl" in sys.modules)
import verl
from vlnorm_verl import plugin
plugin.register()
from verl.trainer.ppo import core_algos
print(hasattr(core_algos.agg_loss, "__wrapped__"), hasattr(core_algos.agg_loss.__wrapped__, "__wrapped__"))
""",
        VERL_PLATFORM="",
    )
    assert done.stdout.split() == ["False", "True", "False"], done.stderr


ASK_FOR_VL_NORM = """
from verl.workers.config import FSDPActorConfig
try:
    FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode="vl_norm")
    print("accepted")
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("module", ["vlnorm_verl.plugin", "wrapt"])
def test_load_failure_is_heard_and_stops_a_run_that_asks_for_vl_norm(module: str) -> None:
    done = python(f"import sys; sys.modules[{module!r}] = None\nimport verl\n" + ASK_FOR_VL_NORM)
    assert "WARNING" in done.stderr
    assert "vlnorm-verl could not be loaded" in done.stderr
    assert f"import of {module} halted" in done.stderr  # the reason
    assert done.stdout.startswith("ValueError Invalid loss_agg_mode: vl_norm"), done.stdout + done.stderr


OTHER_NAMES = """
import dataclasses, verl
from vlnorm_verl.plugin import names
names.NAMES = tuple(dataclasses.replace(n, {changes}) if n.name == "agg_loss" else n for n in names.NAMES)
"""


@pytest.mark.parametrize(
    ("changes", "lacks"),
    [
        ("name='renamed_agg_loss'", "core_algos.renamed_agg_loss (an if/elif over verl's modes"),
        ("parameters=('loss_mat', 'weights')", "weights of verl.trainer.ppo.core_algos.agg_loss"),
    ],
)
def test_a_release_without_a_name_that_is_needed_is_heard_and_refused(changes: str, lacks: str) -> None:
    done = python(OTHER_NAMES.format(changes=changes) + ASK_FOR_VL_NORM + IS_ACTIVE)
    assert "WARNING" in done.stderr
    assert lacks in done.stderr
    assert done.stdout.startswith("RuntimeError"), done.stdout
    assert lacks in done.stdout
    assert done.stdout.endswith("stock\n")  # verl's own agg_loss is as it was


def test_a_function_whose_signature_cannot_be_read_does_not_stop_the_import_of_verl() -> None:
    done = python(
        """
import wrapt
wrapt.register_post_import_hook(lambda module: setattr(module, "agg_loss", min), "verl.trainer.ppo.core_algos")
import verl.trainer.ppo.core_algos
print("imported")
"""
    )
    assert done.stdout == "imported\n", done.stderr[-2000:]
    assert "vlnorm-verl cannot extend this release of verl" in done.stderr


def test_what_a_later_verl_passes_on_reaches_it() -> None:
    batch = with_mini_batch(lambda *args, **kwargs: (args, kwargs))
    assert batch("engine", "data", None, "one", more="two") == (("engine", "data", None, "one"), {"more": "two"})
    advantages = filtering(lambda data, *args, **kwargs: (data, args, kwargs))
    assert advantages("data", "one", adv_estimator="gae") == ("data", ("one",), {"adv_estimator": "gae"})


def test_every_name_of_the_table_is_in_the_installed_release() -> None:
    """The trainers' names as well, which are looked at only when a run imports them."""
    for name in names.NAMES:
        assert install.problem(importlib.import_module(name.module), name) is None
    assert lacking() == []
    assert set(WRAPPERS) <= {(name.module, name.name) for name in names.NAMES}


# A trainer that is run as __main__, whose class Ray pickles by value: so verl 0.8.0 runs its V1 trainer.
TRAINER = """
import sys, cloudpickle, torch
from verl.trainer.ppo.core_algos import agg_loss

class Trainer:
    def entropy(self):
        mask = torch.tensor([[1, 0], [1, 1]])
        return agg_loss(loss_mat=mask.double(), loss_mask=mask, loss_agg_mode="vl_norm", loss_scale_factor=1).item()

cloudpickle.dump(Trainer, open(sys.argv[1], "wb"))
"""


def test_a_trainer_that_is_run_as_main_gets_the_entropy_metric_too(tmp_path: Path) -> None:
    file = str(tmp_path / "trainer")
    assert warm.python("-c", TRAINER, file, **PLATFORM).returncode == 0
    done = python(f"import pickle, verl; print(pickle.load(open({file!r}, 'rb'))().entropy())")
    # (1·1 + 1/2·2) / (1 + 1/2)
    assert float(done.stdout) == pytest.approx(4 / 3), done.stderr[-2000:]


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
from vlnorm_verl import parse_mode
from vlnorm_verl.plugin import policy_loss
from vlnorm_verl.plugin.mini_batch import MiniBatch, working_on
for way in early.WAYS:
    actor = FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode="vl_norm",
                            policy_loss=PolicyLossConfig(loss_mode="early_" + way))
    print(way, policy_loss.problem("early_" + way, actor))
    losses, mask = -torch.ones(2, 2), torch.tensor([[1, 1], [1, 0]])
    with working_on(MiniBatch("vl_norm", parse_mode("vl_norm"), torch.tensor(1.5), 1, 8.0)):
        print(round(early.WAYS[way](losses, mask, "vl_norm", {}).item(), 6))
        try:
            early.get_policy_loss_fn("early_never")(log_prob=torch.ones(1, 1, requires_grad=True))
        except ValueError as error:
            print("never calls agg_loss" in str(error))
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
    environment = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    if how == "VERL_USE_EXTERNAL_MODULES":
        environment[how] = "early,vlnorm_verl.verl_entry" if older_verl.needed() else "early"
    else:
        info = tmp_path / "early-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: early\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[verl.plugins]\nearly = early\n")
    done = python(HOLDS_EARLY, **environment)
    # Σ x_i ℓ_i = −(1/8)(2·½ + 1·1)/(½ + 1)
    expected = [line for way in ("name", "default", "partial") for line in (f"{way} None", "-0.166667", "True")]
    assert done.stdout.splitlines() == [*expected, "True"], done.stderr[-2000:]


def test_a_mode_that_a_user_puts_into_verl_is_accepted_as_stock_verl_accepts_it() -> None:
    """After `import verl`, into agg_loss and ActorConfig."""
    done = python(
        """
import verl
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

plugin.checks.check_config(OmegaConf.create({"actor_rollout_ref": {"actor": {"loss_agg_mode": "mine"}}}))
print(FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode="mine").loss_agg_mode)
"""
    )
    assert done.stdout.splitlines() == ["mine"], done.stderr[-2000:]


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
    print(mode, plugin.modes.only_verls(mode), plugin.modes.is_ours(mode))
plugin.checks.check_config(OmegaConf.create({"actor_rollout_ref": {"actor": {"loss_agg_mode": "forks-own"}}}))
"""
    )
    assert done.stdout.splitlines() == [
        "forks-own True False",
        "forks-fussy True False",
        "vl_norm False False",
        "grpo_norm False True",
        "nobodys False False",
    ], done.stderr[-2000:]


def test_own_aggregation_is_usable_by_its_name() -> None:
    """As docs/extending.md has it."""
    page = (warm.REPOSITORY / "docs/extending.md").read_text()
    code = page[page.index("from vlnorm_verl import Aggregation") :].partition("```")[0]
    done = python(
        f"""
import torch, verl
{code}
from verl.workers.config import FSDPActorConfig
from verl.trainer.ppo.ray_trainer import agg_loss
FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode="floor_norm:2")
mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]])
print(agg_loss(loss_mat=mask.double(), loss_mask=mask, loss_agg_mode="floor_norm:2", loss_scale_factor=1).item())
"""
    )
    # (1/2·1 + 1/4·4) / (1/2 + 1/4)
    assert float(done.stdout) == pytest.approx(2.0), done.stderr
