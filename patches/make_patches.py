"""Makes the patches of this folder from the table of edits below and the files in new_files/.

    python patches/make_patches.py                    # fetch each release's wheel, write every patch
    python patches/make_patches.py --check            # remake and compare, write nothing; exit status 1 if one differs
    python patches/make_patches.py --source DIR --release 0.9.1    # DIR holds the `verl` package of that release

A patch is `Edit`s (an anchor text of verl, which must occur exactly once in its file, and what stands there instead)
plus new files. Where releases differ, an edit names the releases that it is for. The result depends on nothing but the
release and this folder: no times, no paths of the machine.
"""

from __future__ import annotations

import argparse
import difflib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
RELEASES = ("0.7.1", "0.8.0", "0.9.0", "0.9.1")
NEWEST = RELEASES[-1]
WHEELS = FOLDER.parent / ".cache" / "wheels"


class AnchorError(Exception):
    """An anchor text does not occur exactly once in its file."""


@dataclass(frozen=True)
class Edit:
    """One replacement in one file of verl.

    Args:
        file: path in the folder that holds the `verl` package.
        old: text of verl that must occur exactly once.
        new: what replaces it.
        only: releases that it is for; all of them by default.
    """

    file: str
    old: str
    new: str
    only: tuple[str, ...] = RELEASES

    def apply(self, text: str, release: str) -> str:
        require_once(text, self.old, f"{self.file} of verl {release}")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Cut:
    """Replaces the text from `start` (which occurs exactly once) up to the next `end`, which is kept."""

    file: str
    start: str
    end: str
    new: str
    only: tuple[str, ...] = RELEASES

    def apply(self, text: str, release: str) -> str:
        where = f"{self.file} of verl {release}"
        require_once(text, self.start, where)
        start = text.index(self.start)
        end = text.find(self.end, start)
        if end < 0:
            raise AnchorError(f"{where}: not found after {self.start!r}:\n{self.end}")
        return text[:start] + self.new + text[end:]


def require_once(text: str, anchor: str, where: str) -> None:
    if text.count(anchor) != 1:
        raise AnchorError(f"{where}: expected once, found {text.count(anchor)} times:\n{anchor}")


def after(file: str, anchor: str, new: str, only: tuple[str, ...] = RELEASES) -> Edit:
    return Edit(file, anchor, anchor + new, only)


def before(file: str, anchor: str, new: str, only: tuple[str, ...] = RELEASES) -> Edit:
    return Edit(file, anchor, new + anchor, only)


CORE = "verl/trainer/ppo/core_algos.py"
ACTOR = "verl/workers/config/actor.py"
CRITIC = "verl/workers/config/critic.py"
BASE = "verl/workers/engine/base.py"
LOSSES = "verl/workers/utils/losses.py"
DISTILLATION = "verl/trainer/distillation/losses.py"
CONFIG = "verl/utils/config.py"
MEGATRON = "verl/workers/engine/megatron/transformer_impl.py"
ACTOR_YAML = "verl/trainer/config/actor/actor.yaml"
CRITIC_YAML = "verl/trainer/config/critic/critic.yaml"
GENERATED_YAML = tuple(
    f"verl/trainer/config/_generated_ppo_{name}trainer.yaml" for name in ("", "megatron_", "torchtitan_", "veomni_")
)

OLD_CRITIC = ("0.7.1", "0.8.0")  # the value loss takes no mini-batch's numbers, CriticConfig has no loss_scale_factor
NEW_CRITIC = ("0.9.0", "0.9.1")
WITH_DISTILLATION = ("0.8.0", "0.9.0", "0.9.1")

# ------------------------------------------------------------------------------------------------- pieces of both

AGG_LOSS_SIGNATURE_END = """    loss_scale_factor: Optional[int] = None,
):
    \"\"\"
    Aggregate the loss across global batch"""
AGG_LOSS_DOC_END = """            Set this to a constant value to ensure consistent normalization throughout training.
"""
INVALID_MODE = """    else:
        raise ValueError(f"Invalid loss_agg_mode: {loss_agg_mode}")
"""
VALUE_LOSS_SIGNATURE_NEW = """    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: Optional[int] = None,
    global_batch_size: Optional[int] = None,
    loss_scale_factor: Optional[int] = None,
"""
VALUE_LOSS_DOC_NEW = """ for the "seq-mean-token-sum-norm" mode, forwarded to `agg_loss`. Defaults to None.
"""
VALUE_LOSS_CALL_NEW = """        loss_scale_factor=loss_scale_factor,
    )
    vf_clipfrac = """
ACTOR_SCALE_DOC = (
    "        loss_scale_factor (Optional[int]): Scale factor for 'seq-mean-token-sum-norm' loss aggregation"
)
GLOBAL_BATCH_INFO_COMMENT = """    # global_batch_size: global batch size
    global_batch_info: dict"""
PPO_LOSS_INFO_END = """    config.global_batch_info["loss_scale_factor"] = config.loss_scale_factor
"""
VALUE_LOSS_USE_NEW = """        loss_scale_factor=config.loss_scale_factor,
    )

    metrics = {"""
SFT_LOSS = "def sft_loss("
ENGINE_IMPORTS_OLD = """from verl.utils.device import get_device_name
from verl.utils.tensordict_utils import maybe_fix_3d_position_ids
"""
ENGINE_IMPORTS_NEW = """from verl.utils.device import get_device_name, get_vendor
from verl.utils.tensordict_utils import maybe_fix_3d_position_ids
"""
TRAIN_BATCH = "    def train_batch(self, data: TensorDict, loss_function: Callable) -> Any:\n"
TRAIN_BATCH_START = """        maybe_fix_3d_position_ids(data)

        self.optimizer_zero_grad()
"""


def engine_edits(imports: str, method: str, call: str) -> list[Edit]:
    """The mini-batch sum: imports, a method of BaseEngine, and its call at the start of train_batch."""
    names = "from verl.utils import tensordict_utils as tu\n"
    return [
        Edit(
            BASE,
            ENGINE_IMPORTS_OLD,
            names + ENGINE_IMPORTS_OLD.replace("get_device_name\n", "get_device_id, get_device_name\n" + imports),
            OLD_CRITIC,
        ),
        Edit(
            BASE,
            ENGINE_IMPORTS_NEW,
            names
            + ENGINE_IMPORTS_NEW.replace(
                "get_device_name, get_vendor\n", "get_device_id, get_device_name, get_vendor\n" + imports
            ),
            NEW_CRITIC,
        ),
        before(BASE, TRAIN_BATCH, method),
        Edit(
            BASE,
            TRAIN_BATCH_START,
            TRAIN_BATCH_START.replace("(data)\n", f"(data)\n        {call}\n", 1),
        ),
    ]


# -------------------------------------------------------------------------------------------------------- vl_norm

MODES_IGNORED = {
    "0.7.1": '("geo_mean", "gspo", "sapo")',
    "0.8.0": '("geo_mean", "gspo", "sapo")',
    "0.9.0": '("geo_mean", "gspo", "sapo")',
    "0.9.1": '("geo_mean", "sapo")',
}

VL_NORM_IMPORT = "from verl.utils.loss_agg import parse_vl_norm, vl_norm_loss\n"

VL_NORM_CORE: list[Edit | Cut] = [
    after(CORE, "from verl.utils.import_utils import deprecated\n", VL_NORM_IMPORT),
    Edit(
        CORE,
        AGG_LOSS_SIGNATURE_END,
        AGG_LOSS_SIGNATURE_END.replace("\n):", "\n    batch_weight_sum: Optional[float] = None,\n):"),
    ),
    after(
        CORE,
        AGG_LOSS_DOC_END,
        '            Required for "vl_norm".\n'
        '        batch_weight_sum: sum of L^-alpha over the responses of the global batch, for "vl_norm[:<alpha>]"\n',
    ),
    before(
        CORE,
        INVALID_MODE,
        """    elif (alpha := parse_vl_norm(loss_agg_mode)) is not None:
        if loss_scale_factor is None:
            raise ValueError(f"loss_scale_factor is required for loss_agg_mode={loss_agg_mode}")
        # Without it the given responses are the whole batch, as for the driver's metrics. Those of a loss never are.
        if batch_weight_sum is None and (dp_size > 1 or loss_mat.requires_grad):
            raise ValueError("(global) batch_weight_sum is required for a gradient, and when dp_size > 1")
        loss = vl_norm_loss(loss_mat, loss_mask, alpha, loss_scale_factor, batch_weight_sum) * dp_size
""",
    ),
    # The value loss.
    after(CORE, VALUE_LOSS_SIGNATURE_NEW, "    batch_weight_sum: Optional[float] = None,\n", NEW_CRITIC),
    after(
        CORE,
        VALUE_LOSS_DOC_NEW,
        """        batch_weight_sum (float, optional):
            Sum of L^-alpha over the global batch for "vl_norm", forwarded to `agg_loss`. Defaults to None.
""",
        NEW_CRITIC,
    ),
    Edit(
        CORE,
        VALUE_LOSS_CALL_NEW,
        VALUE_LOSS_CALL_NEW.replace("    )", "        batch_weight_sum=batch_weight_sum,\n    )"),
        NEW_CRITIC,
    ),
    Edit(
        CORE,
        """    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
):
""",
        """    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    **batch_info,
):
""",
        OLD_CRITIC,
    ),
    after(
        CORE,
        """            Clip range for value prediction updates.
        loss_agg_mode (str, optional):
            Aggregation mode for `agg_loss`. Defaults to "token-mean".
""",
        """        batch_info:
            What "vl_norm" needs to know of the global batch, forwarded to `agg_loss`. Empty for other modes.
""",
        OLD_CRITIC,
    ),
    Cut(
        CORE,
        "    vf_loss = 0.5 * agg_loss(loss_mat=clipped_vf_losses, loss_mask=",
        "    vf_clipfrac = ",
        """    vf_loss = 0.5 * agg_loss(
        loss_mat=clipped_vf_losses, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **batch_info
    )
""",
        OLD_CRITIC,
    ),
]

VL_NORM_ENGINE = engine_edits(
    "from verl.utils.loss_agg import length_powers, parse_vl_norm, response_lengths\n",
    '''    def _assign_batch_weight_sum(self, data: TensorDict, loss_function: Callable) -> None:
        """For `loss_agg_mode=vl_norm`: put the sum of L^-alpha over the global mini-batch into `data`.

        `data` is this rank's share of the mini-batch, before it is split into micro-batches. Lengths are taken from
        `response_mask`, which rollout correction rewrites; `loss_mask` keeps the rejected tokens.
        """
        config = getattr(loss_function, "keywords", {}).get("config", None)
        alpha = parse_vl_norm(getattr(config, "loss_agg_mode", None))
        if alpha is None:
            return

        dp_size, dp_group = self.get_data_parallel_size(), self.get_data_parallel_group()
        group_size = 1 if dp_group is None else torch.distributed.get_world_size(dp_group)
        if group_size != dp_size:
            raise RuntimeError(
                f"loss_agg_mode={config.loss_agg_mode} needs a process group of the {dp_size} data parallel ranks, "
                f"but {type(self).__name__} has one of {group_size} ranks in this configuration"
            )
        batch_weight_sum = length_powers(response_lengths(data["response_mask"]).to(get_device_id()), alpha).sum()
        if dp_group is not None:
            torch.distributed.all_reduce(batch_weight_sum, op=torch.distributed.ReduceOp.SUM, group=dp_group)
        tu.assign_non_tensor(data, batch_weight_sum=batch_weight_sum.item())

''',
    "self._assign_batch_weight_sum(data, loss_function)",
)

BATCH_INFO_FUNCTION = '''def vl_norm_batch_info(config: ActorConfig | CriticConfig, data: TensorDict) -> dict:
    """Arguments of `agg_loss` that `loss_agg_mode=vl_norm` needs besides the mode; empty for every other mode.

    The sum is made by `BaseEngine.train_batch`. A micro-batch cannot replace it, so its absence is an error.
    """
    if parse_vl_norm(config.loss_agg_mode) is None:
        return {}
    if "batch_weight_sum" not in data:
        raise ValueError(
            f"loss_agg_mode={config.loss_agg_mode} needs batch_weight_sum, the sum over the whole mini-batch. "
            "BaseEngine.train_batch makes it if the loss function is a functools.partial with the keyword config; "
            "forward_backward_batch alone does not."
        )
    return {
        "dp_size": data["dp_size"],
        "loss_scale_factor": config.loss_scale_factor,
        "batch_weight_sum": data["batch_weight_sum"],
    }


'''

VL_NORM_LOSSES = [
    after(
        LOSSES,
        "from verl.utils.dataset.dataset_utils import DatasetPadMode\n",
        "from verl.utils.loss_agg import parse_vl_norm\n",
    ),
    before(LOSSES, SFT_LOSS, BATCH_INFO_FUNCTION),
    after(LOSSES, PPO_LOSS_INFO_END, "    config.global_batch_info.update(vl_norm_batch_info(config, data))\n"),
    # The value loss.
    Edit(
        LOSSES,
        '    batch_num_tokens = data["batch_num_tokens"]\n    global_batch_size = data["global_batch_size"]\n',
        '    batch_num_tokens = data["batch_num_tokens"]\n    global_batch_size = data["global_batch_size"]\n'
        '    batch_weight_sum = vl_norm_batch_info(config, data).get("batch_weight_sum", None)\n',
        NEW_CRITIC,
    ),
    Edit(
        LOSSES,
        VALUE_LOSS_USE_NEW,
        VALUE_LOSS_USE_NEW.replace("    )", "        batch_weight_sum=batch_weight_sum,\n    )"),
        NEW_CRITIC,
    ),
    after(
        LOSSES,
        '    vpreds = _slice_response_from_unpad_output(model_output["values"], data)  # (bsz, response_length)\n',
        "    batch_info = vl_norm_batch_info(config, data)\n",
        ("0.7.1",),
    ),
    after(
        LOSSES,
        '    vpreds = no_padding_2_padding(model_output["values"], data)  # (bsz, response_length)\n',
        "    batch_info = vl_norm_batch_info(config, data)\n",
        ("0.8.0",),
    ),
    after(
        LOSSES,
        "        cliprange_value=config.cliprange_value,\n        loss_agg_mode=config.loss_agg_mode,\n",
        "        **batch_info,\n",
        OLD_CRITIC,
    ),
    # Contributions of micro-batches to a loss over the mini-batch are added up; a mean over a micro-batch is averaged.
    Edit(
        LOSSES,
        '            "critic/vf_loss": vf_loss.detach().item(),\n',
        '            "critic/vf_loss": Metric(value=vf_loss, aggregation=AggregationType.SUM)\n'
        "            if batch_info\n"
        "            else vf_loss.detach().item(),\n",
        OLD_CRITIC,
    ),
]

VL_NORM_DISTILLATION = [
    Edit(
        DISTILLATION,
        "from verl.workers.utils.losses import ppo_loss\n",
        "from verl.workers.utils.losses import ppo_loss, vl_norm_batch_info\n",
        WITH_DISTILLATION,
    ),
    after(
        DISTILLATION,
        PPO_LOSS_INFO_END,
        "    config.global_batch_info.update(vl_norm_batch_info(config, data))\n",
        NEW_CRITIC,
    ),
    before(
        DISTILLATION,
        "    if loss_config.use_policy_gradient:\n        # Use negative distillation loss as reward",
        "    config.global_batch_info.update(vl_norm_batch_info(config, data))\n\n",
        ("0.8.0",),
    ),
]

ACTOR_MODE_CHECK = """        if self.loss_agg_mode not in valid_loss_agg_modes:
            raise ValueError(f"Invalid loss_agg_mode: {self.loss_agg_mode}")
"""


def vl_norm_actor_check(release: str) -> Edit:
    return Edit(
        ACTOR,
        ACTOR_MODE_CHECK,
        f"""        if parse_vl_norm(self.loss_agg_mode) is not None:
            self._validate_vl_norm()
        elif self.loss_agg_mode not in valid_loss_agg_modes:
            raise ValueError(f"Invalid loss_agg_mode: {{self.loss_agg_mode}}")

    def _validate_vl_norm(self):
        \"\"\"Refuse what does not aggregate by `loss_agg_mode=vl_norm` with the weights of the whole mini-batch.\"\"\"
        validate_vl_norm("actor", self.loss_agg_mode, self.loss_scale_factor)
        loss_mode = self.policy_loss.get("loss_mode", "vanilla")
        if loss_mode in {MODES_IGNORED[release]}:
            raise ValueError(
                f"actor.policy_loss.loss_mode={{loss_mode}} does not aggregate by loss_agg_mode, "
                f"so it cannot be used with loss_agg_mode={{self.loss_agg_mode}}"
            )
        rollout_correction = self.policy_loss.get("rollout_correction", None)
        if loss_mode == "bypass_mode" and rollout_correction is not None and rollout_correction.get("rollout_rs", None):
            raise ValueError(
                "actor.policy_loss.loss_mode=bypass_mode with rollout_rs removes tokens inside each micro-batch, after "
                f"the lengths of the mini-batch are summed, so it cannot be used with {{self.loss_agg_mode}}"
            )
""",
        (release,),
    )


LEGACY_WORKERS_CHECK = """    legacy = config.trainer.get("use_legacy_worker_impl", "auto")
    if legacy != "disable":
        raise ValueError(
            f"loss_agg_mode={mode} needs trainer.use_legacy_worker_impl=disable, got {legacy}: "
            "the legacy workers do not sum over the mini-batch"
        )
"""


def vl_norm_config_check(release: str) -> Edit:
    return before(
        CONFIG,
        "def validate_config(\n",
        f'''def _validate_vl_norm_config(config: DictConfig) -> None:
    """Refuse what makes `loss_agg_mode=vl_norm` inexact and what the actor's own config does not show."""
    mode = config.actor_rollout_ref.actor.loss_agg_mode
    if parse_vl_norm(mode) is None:
        return
{LEGACY_WORKERS_CHECK if release == "0.7.1" else ""}\
    rollout_correction = config.algorithm.get("rollout_correction", None) or {{}}
    if rollout_correction.get("bypass_mode", False) and rollout_correction.get("rollout_rs", None):
        raise ValueError(
            "algorithm.rollout_correction.rollout_rs with bypass_mode=True is left out by the trainers, "
            f"so it cannot be used with loss_agg_mode={{mode}}. Use bypass_mode=False"
        )


''',
        (release,),
    )


LOSS_AGG_CONFIG_IMPORT = "from verl.utils.loss_agg import parse_vl_norm, validate_vl_norm\n"

VL_NORM_CONFIG = [
    after(
        ACTOR,
        "from verl.trainer.config import CheckpointConfig, RolloutCorrectionConfig\n",
        LOSS_AGG_CONFIG_IMPORT,
    ),
    before(
        ACTOR,
        ACTOR_SCALE_DOC,
        "            Also 'vl_norm' (alpha = 1) and 'vl_norm:<alpha>', see verl.utils.loss_agg.\n",
    ),
    after(
        ACTOR,
        "            If None, uses response_length. Set to a constant to ensure consistent normalization.\n",
        "            Required for 'vl_norm'.\n",
    ),
    Edit(
        ACTOR,
        GLOBAL_BATCH_INFO_COMMENT,
        GLOBAL_BATCH_INFO_COMMENT.replace(
            "batch size\n",
            "batch size\n    # batch_weight_sum: sum of L^-alpha over the global batch, only for vl_norm\n",
        ),
    ),
    *(vl_norm_actor_check(release) for release in RELEASES),
    # The critic inherits the actor's mode by interpolation in its yaml.
    after(
        CRITIC,
        "from verl.trainer.config import BaseModelConfig, CheckpointConfig\n",
        "from verl.utils.loss_agg import validate_vl_norm\n",
    ),
    Edit(
        CRITIC,
        '        """Validate critic configuration parameters."""\n        assert self.strategy != MISSING\n',
        '        """Validate critic configuration parameters."""\n        assert self.strategy != MISSING\n'
        '        validate_vl_norm("critic", self.loss_agg_mode, self.loss_scale_factor)\n',
    ),
    after(
        CRITIC,
        "        loss_agg_mode (str): Loss aggregation mode.\n",
        "        loss_scale_factor (Optional[int]): Scale factor for 'vl_norm', which requires it.\n",
        OLD_CRITIC,
    ),
    after(
        CRITIC,
        '    loss_agg_mode: str = "token-mean"\n',
        "    loss_scale_factor: Optional[int] = None\n",
        OLD_CRITIC,
    ),
    # What only the whole configuration shows.
    after(
        CONFIG,
        "from omegaconf import DictConfig, ListConfig, OmegaConf\n",
        "\nfrom verl.utils.loss_agg import parse_vl_norm\n",
    ),
    *(vl_norm_config_check(release) for release in RELEASES),
    before(
        CONFIG,
        "    # Actor validation done in ActorConfig.__post_init__ and validate()\n",
        "    _validate_vl_norm_config(config)\n\n",
    ),
    # The value that reaches the critic of 0.7.1 and 0.8.0, as verl has it from 0.9.0 on.
    after(
        CRITIC_YAML,
        "loss_agg_mode: ${oc.select:actor_rollout_ref.actor.loss_agg_mode,token-mean}\n",
        '\n# Scale factor for "vl_norm" loss aggregation mode. Not used by other modes.\n'
        "loss_scale_factor: ${oc.select:actor_rollout_ref.actor.loss_scale_factor,null}\n",
        OLD_CRITIC,
    ),
    *(
        after(
            file,
            "  loss_agg_mode: ${oc.select:actor_rollout_ref.actor.loss_agg_mode,token-mean}\n",
            "  loss_scale_factor: ${oc.select:actor_rollout_ref.actor.loss_scale_factor,null}\n",
            OLD_CRITIC,
        )
        for file in GENERATED_YAML
    ),
    after(
        ACTOR_YAML,
        '"seq-mean-token-mean", or "seq-mean-token-sum-norm"\n',
        '# or "vl_norm" (alpha = 1) or "vl_norm:<alpha>" with 0 <= alpha <= 2, VL Norm (arXiv 2509.07558)\n',
    ),
    after(
        ACTOR_YAML,
        "# If null, uses response_length. Set to a constant to ensure consistent normalization.\n",
        "# Required for \"vl_norm\", e.g. '${data.max_response_length}'.\n",
    ),
    # Only 0.9.0 has this check: by it, per-sequence weights are not safe under static context parallelism.
    Edit(
        MEGATRON,
        '                if _agg_mode == "seq-mean-token-mean" and not self.engine_config.dynamic_context_parallel:\n'
        "                    raise ValueError(\n"
        "                        \"loss_agg_mode='seq-mean-token-mean' is incompatible with \"\n",
        '                per_sequence = _agg_mode == "seq-mean-token-mean" or parse_vl_norm(_agg_mode) is not None\n'
        "                if per_sequence and not self.engine_config.dynamic_context_parallel:\n"
        "                    raise ValueError(\n"
        "                        f\"loss_agg_mode='{_agg_mode}' is incompatible with \"\n",
        ("0.9.0",),
    ),
    before(
        MEGATRON,
        "from verl.utils.megatron.pipeline_parallel import make_batch_generator\n",
        "from verl.utils.loss_agg import parse_vl_norm\n",
        ("0.9.0",),
    ),
]

VL_NORM = [*VL_NORM_CORE, *VL_NORM_ENGINE, *VL_NORM_LOSSES, *VL_NORM_DISTILLATION, *VL_NORM_CONFIG]

# ---------------------------------------------------------------------------------------------- register_loss_agg

REGISTRY: list[Edit | Cut] = [
    after(
        CORE,
        "from verl.utils.import_utils import deprecated\n",
        "from verl.utils.loss_agg import get_loss_agg, sum_length_stat\n",
    ),
    Edit(
        CORE,
        AGG_LOSS_SIGNATURE_END,
        AGG_LOSS_SIGNATURE_END.replace("\n):", "\n    batch_stat_sum: Optional[float] = None,\n):"),
    ),
    Edit(
        CORE,
        "        loss_agg_mode: method to aggregate the loss matrix into a scalar\n",
        "        loss_agg_mode: method to aggregate the loss matrix into a scalar, see verl.utils.loss_agg\n",
    ),
    after(
        CORE,
        AGG_LOSS_DOC_END,
        "        batch_stat_sum: sum of the mode's length_stat over the global batch, for modes that declare one\n",
    ),
    Cut(
        CORE,
        '    if loss_agg_mode == "token-mean":\n        if batch_num_tokens is None:\n',
        '@deprecated("verl.trainer.ppo.core_algos.compute_policy_loss_vanilla")\n',
        """    loss_agg = get_loss_agg(loss_agg_mode)
    if loss_agg.length_stat is not None and batch_stat_sum is None:
        # The given responses are then the whole batch, as for the driver's metrics. Those of a loss never are.
        if dp_size > 1 or loss_mat.requires_grad:
            raise ValueError("(global) batch_stat_sum is required for a gradient, and when dp_size > 1")
        batch_stat_sum = sum_length_stat(loss_mask, loss_agg.length_stat)
    return loss_agg.fn(
        loss_mat,
        loss_mask,
        dp_size=dp_size,
        batch_num_tokens=batch_num_tokens,
        global_batch_size=global_batch_size,
        loss_scale_factor=loss_scale_factor,
        batch_stat_sum=batch_stat_sum,
    )


""",
    ),
    after(CORE, VALUE_LOSS_SIGNATURE_NEW, "    batch_stat_sum: Optional[float] = None,\n"),
    after(
        CORE,
        VALUE_LOSS_DOC_NEW,
        """        batch_stat_sum (float, optional):
            Sum of the mode's length_stat over the global batch, forwarded to `agg_loss`. Defaults to None.
""",
    ),
    Edit(
        CORE,
        VALUE_LOSS_CALL_NEW,
        VALUE_LOSS_CALL_NEW.replace("    )", "        batch_stat_sum=batch_stat_sum,\n    )"),
    ),
    *engine_edits(
        "from verl.utils.loss_agg import LOSS_AGG_REGISTRY, sum_length_stat\n",
        '''    def _assign_batch_stat_sum(self, data: TensorDict, loss_function: Callable) -> None:
        """For a `loss_agg_mode` with a length_stat: put its sum over the global mini-batch into `data`.

        `data` is this rank's share of the mini-batch, before it is split into micro-batches. Lengths are taken from
        `response_mask`, which rollout correction rewrites; `loss_mask` keeps the rejected tokens.
        """
        config = getattr(loss_function, "keywords", {}).get("config", None)
        loss_agg = LOSS_AGG_REGISTRY.get(getattr(config, "loss_agg_mode", None), None)
        if loss_agg is None or loss_agg.length_stat is None:
            return

        dp_size, dp_group = self.get_data_parallel_size(), self.get_data_parallel_group()
        group_size = 1 if dp_group is None else torch.distributed.get_world_size(dp_group)
        if group_size != dp_size:
            raise RuntimeError(
                f"loss_agg_mode={config.loss_agg_mode} needs a process group of the {dp_size} data parallel ranks, "
                f"but {type(self).__name__} has one of {group_size} ranks in this configuration"
            )
        batch_stat_sum = sum_length_stat(data["response_mask"], loss_agg.length_stat, device=get_device_id())
        if dp_group is not None:
            torch.distributed.all_reduce(batch_stat_sum, op=torch.distributed.ReduceOp.SUM, group=dp_group)
        tu.assign_non_tensor(data, batch_stat_sum=batch_stat_sum.item())

''',
        "self._assign_batch_stat_sum(data, loss_function)",
    ),
    after(
        LOSSES,
        "from verl.utils.dataset.dataset_utils import DatasetPadMode\n",
        "from verl.utils.loss_agg import LOSS_AGG_REGISTRY\n",
    ),
    before(
        LOSSES,
        SFT_LOSS,
        '''def length_stat_batch_info(loss_agg_mode: str, data: TensorDict) -> dict:
    """Arguments of `agg_loss` for a mode with a length_stat; empty for every other mode.

    The sum is made by `BaseEngine.train_batch`. A micro-batch cannot replace it, so its absence is an error.
    """
    loss_agg = LOSS_AGG_REGISTRY.get(loss_agg_mode, None)  # a plugin may have modes of its own
    if loss_agg is None or loss_agg.length_stat is None:
        return {}
    if "batch_stat_sum" not in data:
        raise ValueError(
            f"loss_agg_mode={loss_agg_mode} needs batch_stat_sum, a sum over the whole mini-batch. "
            "BaseEngine.train_batch makes it if the loss function is a functools.partial with the keyword config; "
            "forward_backward_batch alone does not."
        )
    return {"batch_stat_sum": data["batch_stat_sum"]}


''',
    ),
    after(
        LOSSES,
        PPO_LOSS_INFO_END,
        "    config.global_batch_info.update(length_stat_batch_info(config.loss_agg_mode, data))\n",
    ),
    Edit(
        LOSSES,
        '    batch_num_tokens = data["batch_num_tokens"]\n    global_batch_size = data["global_batch_size"]\n',
        '    batch_num_tokens = data["batch_num_tokens"]\n    global_batch_size = data["global_batch_size"]\n'
        "    batch_info = length_stat_batch_info(config.loss_agg_mode, data)\n",
    ),
    Edit(LOSSES, VALUE_LOSS_USE_NEW, VALUE_LOSS_USE_NEW.replace("    )", "        **batch_info,\n    )")),
    Edit(
        DISTILLATION,
        "from verl.workers.utils.losses import ppo_loss\n",
        "from verl.workers.utils.losses import length_stat_batch_info, ppo_loss\n",
    ),
    after(
        DISTILLATION,
        PPO_LOSS_INFO_END,
        "    config.global_batch_info.update(length_stat_batch_info(config.loss_agg_mode, data))\n",
    ),
    after(
        ACTOR,
        "from verl.trainer.config import CheckpointConfig, RolloutCorrectionConfig\n",
        "from verl.utils.loss_agg import get_loss_agg\n",
    ),
    before(
        ACTOR,
        ACTOR_SCALE_DOC,
        "            Also those registered by verl.utils.loss_agg.register_loss_agg.\n",
    ),
    Edit(
        ACTOR,
        GLOBAL_BATCH_INFO_COMMENT,
        GLOBAL_BATCH_INFO_COMMENT.replace(
            "batch size\n",
            "batch size\n    # batch_stat_sum: sum of the length_stat over the global batch, only for modes with one\n",
        ),
    ),
    Cut(
        ACTOR,
        "        valid_loss_agg_modes = [\n",
        "    def validate(self, n_gpus: int, train_batch_size: int, model_config: dict = None):\n",
        "        get_loss_agg(self.loss_agg_mode)  # raises ValueError if it is not registered\n\n",
    ),
    after(
        ACTOR_YAML,
        '"seq-mean-token-mean", or "seq-mean-token-sum-norm"\n',
        "# or a mode registered by verl.utils.loss_agg.register_loss_agg\n",
    ),
]

# ------------------------------------------------------------------------------------------------- making of them


def patches() -> Iterator[tuple[str, str, Iterable[Edit | Cut], str]]:
    """Name of the patch file, its release, its edits and its folder of new files."""
    for release in RELEASES:
        yield f"vl_norm-{release}.patch", release, VL_NORM, "vl_norm"
    yield f"register_loss_agg-{NEWEST}.patch", NEWEST, REGISTRY, "register_loss_agg"


def apply_edits(source: Path, edits: Iterable[Edit | Cut], release: str) -> dict[str, tuple[str, str]]:
    """Text before and after of every edited file.

    Raises:
        AnchorError: an anchor does not occur exactly once; the message has file and anchor.
    """
    texts: dict[str, tuple[str, str]] = {}
    for edit in edits:
        if release not in edit.only:
            continue
        if edit.file not in texts:
            text = (source / edit.file).read_text(encoding="utf-8")
            texts[edit.file] = (text, text)
        original, text = texts[edit.file]
        texts[edit.file] = (original, edit.apply(text, release))
    return texts


def new_files(folder: str) -> dict[str, tuple[str, str]]:
    root = FOLDER / "new_files" / folder
    files = sorted(path for path in root.rglob("*.py") if path.is_file())
    return {path.relative_to(root).as_posix(): ("", path.read_text(encoding="utf-8")) for path in files}


def unified_diff(texts: dict[str, tuple[str, str]]) -> str:
    """Files in order of their names, with a/ and b/ in front, applied by `patch -p1` or `git apply`."""
    parts = []
    for file in sorted(texts):
        old, new = texts[file]
        if not old:
            parts.append(f"diff --git a/{file} b/{file}\nnew file mode 100644\n")
        else:
            parts.append(f"diff --git a/{file} b/{file}\n")
        name = f"a/{file}" if old else "/dev/null"
        lines = difflib.unified_diff(old.splitlines(keepends=True), new.splitlines(keepends=True), name, f"b/{file}")
        parts += [line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines]
    return "".join(parts)


def make(name: str, source: Path) -> str:
    """Text of one patch against the `verl` package in the folder `source`."""
    for patch, release, edits, folder in patches():
        if patch == name:
            return unified_diff(apply_edits(source, edits, release) | new_files(folder))
    raise ValueError(f"no patch {name!r}; there are {', '.join(patch for patch, *_ in patches())}")


def fetch(release: str, folder: Path) -> Path:
    """Unpack the release's wheel into `folder`; the wheel is kept in .cache/wheels. Returns `folder`."""
    wheels = sorted(WHEELS.glob(f"verl-{release}-*.whl"))
    if not wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(WHEELS)]
        subprocess.run([*command, f"verl=={release}"], check=True)
        wheels = sorted(WHEELS.glob(f"verl-{release}-*.whl"))
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the files that are there, write nothing")
    parser.add_argument("--release", choices=RELEASES, action="append", help="only this one; may be given again")
    parser.add_argument("--source", type=Path, help="folder with the `verl` package; needs one --release")
    args = parser.parse_args()
    if args.source and len(args.release or ()) != 1:
        parser.error("--source holds one release of verl: name it by --release")

    different = []
    with tempfile.TemporaryDirectory() as scratch:
        sources: dict[str, Path] = {}
        for name, release, *_ in patches():
            if args.release and release not in args.release:
                continue
            if release not in sources:
                sources[release] = args.source or fetch(release, Path(scratch) / release)
            text, target = make(name, sources[release]), FOLDER / name
            if not args.check:
                target.write_text(text, encoding="utf-8")
            elif not target.is_file() or target.read_text(encoding="utf-8") != text:
                different.append(name)
    for name in different:
        print(f"{name} is not what make_patches.py makes; run it without --check", file=sys.stderr)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
