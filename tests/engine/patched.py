"""What is asked of a patched verl, in one process; tests/test_patches.py reads the answers.

    PYTHONPATH=TREE VERL_USE_EXTERNAL_PLUGINS=none python -m tests.engine.patched FILE PART…

writes FILE as JSON, {part: answer}. One process, since importing verl takes longer than most parts. A PART is

    exact:RANKS           tests/engine/scenarios.py --native on so many gloo ranks
    stock:CORE_ALGOS      verl's own modes against those of that file, the release's
    configuration:LINES   validate_config's verdict on each line of overrides, ";" between lines
    tests:FILE            pytest's exit status and the end of what it says
    without_sum           what agg_loss says to a gradient without the mini-batch's sum
"""

import contextlib
import importlib.util
import io
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.engine import scenarios
from tests.engine.ranks import import_verl


def exact(ranks: str) -> list[dict[str, Any]]:
    with tempfile.NamedTemporaryFile() as out:
        # The plugin's modes are none of verl's: a module beside the tree registers what the registry lacks.
        load = ["--load", "registered_vl_norm"] if importlib.util.find_spec("registered_vl_norm") else []
        sys.argv[1:] = ["--native", "--ranks", ranks, "--dtype", "float64", *load, "--out", out.name]
        scenarios.main()
        return json.loads(Path(out.name).read_text())


def stock(core_algos: str) -> dict[str, bool]:
    """Whether loss and gradient of verl's own modes are the release's, bit for bit."""
    from verl.trainer.ppo.core_algos import agg_loss

    spec = importlib.util.spec_from_file_location("stock", core_algos)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert agg_loss.__code__ != module.agg_loss.__code__
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(17) < torch.tensor([3, 0, 17, 5, 1, 9])[:, None]
    sizes = {"batch_num_tokens": 99, "global_batch_size": 13}
    infos = ({}, sizes, sizes | {"dp_size": 3, "loss_scale_factor": 48})
    types = itertools.product((torch.float32, torch.bfloat16), (torch.bool, torch.int64))
    same = {}
    for (dtype, mask_type), mode, info in itertools.product(types, scenarios.STOCK_MODES, infos):
        loss_mat = torch.randn(6, 17, generator=generator).to(dtype)
        results = []
        for function in (agg_loss, module.agg_loss):
            leaf = loss_mat.clone().requires_grad_()
            loss = function(leaf, mask.to(mask_type), mode, **info)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        pairs = list(zip(*results, strict=True))
        same[f"{mode} {dtype} {mask_type} {info}"] = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    return same


def configuration(lines: str) -> list[str]:
    """What verl's validate_config says of each line of overrides, on verl's own yaml."""
    import hydra
    import verl
    from verl.utils.config import validate_config

    common = ["trainer.n_gpus_per_node=1", "data.train_batch_size=4", "actor_rollout_ref.actor.ppo_mini_batch_size=4"]
    common.append("actor_rollout_ref.actor.use_dynamic_bsz=true")
    verdicts = []
    for line in lines.split(";"):
        with hydra.initialize_config_dir(f"{Path(verl.__file__).parent}/trainer/config", version_base=None):
            config = hydra.compose("ppo_trainer", [*common, *line.split()])
        try:
            validate_config(config, use_reference_policy=False, use_critic=False)
            critic = config.critic
            verdicts.append(f"accepted, critic {critic.get('loss_agg_mode')} {critic.get('loss_scale_factor')}")
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            verdicts.append(" ".join(f"refused, {cause}".split()))
    return verdicts


def without_sum(_: str) -> str:
    from verl.trainer.ppo.core_algos import agg_loss

    ones = torch.ones(1, 2)
    try:
        return f"accepted: {agg_loss(ones.clone().requires_grad_(), ones, 'vl_norm', loss_scale_factor=2)}"
    except ValueError as error:
        return str(error)


def tests(file: str) -> tuple[int, str]:
    import pytest

    out = io.StringIO()
    root = file.partition("/tests/")[0]
    with contextlib.redirect_stdout(out):
        status = pytest.main(["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", root, file])
    return int(status), out.getvalue()[-4000:]


def main() -> None:
    out, *parts = sys.argv[1:]
    import_verl("cpu")
    functions = {f.__name__: f for f in (exact, stock, configuration, tests, without_sum)}
    answers = {}
    for part in parts:
        name, _, argument = part.partition(":")
        answers[f"{name}:{argument}" if name == "exact" else name] = functions[name](argument)
    Path(out).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
