"""verl's trainers with vl_norm: two logged steps of each on the CPU stack (Ray, FSDP2, vLLM, the tiny CountDown).

V1 sync_whole_groups on one rank is in test_e2e.py. Here: V1 colocate_async, separate_async, and sync_whole_groups on
two; V0, one_step_off_policy, fully_async_policy; V1 sync with LoRA, and with the rollout's own log-probabilities.
What each step logs of its mini-batches is compared with the lengths of the responses that were trained on, as written
down by verl or by the reward function.
Also: a setting that cannot be trained ends the experimental ones before Ray starts. V0 and V1 share their beginning
(test_plugin_config.py).

Not covered: a critic with one_step_off_policy or fully_async_policy. verl 0.9.1 has none there: both call
`critic_wg.init_model()` (one_step_off_policy/ray_trainer.py:154, fully_async_trainer.py:477), which its TrainingWorker
(workers/engine_workers.py:77) does not have.

All are slow: a run takes about 60 to 90 s and 5 to 10 GB on two cores.
"""

import itertools
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import warm
from tests.processes import processes_of
from vlnorm_verl.cpu import cpu_environment
from vlnorm_verl.files import locked
from vlnorm_verl.runs.process import TrainingFailed, last_lines, train
from vlnorm_verl.tasks.tiny import WEIGHTS
from vlnorm_verl.tasks.tiny.data import rows, write_parquet
from vlnorm_verl.tasks.tiny.model import VOCABULARY

pytestmark = pytest.mark.slow

CONFIG_FOLDER = Path(__file__).parent.parent / "vlnorm_verl" / "cpu" / "config"
PROMPTS, RESPONSES = 16, 8  # of a step, and of a prompt
LONGEST = 256  # tokens of a response
SYNCED = 1e-4  # largest difference of token probabilities of rollout and actor; 0.2 with weights of one step before
Data = dict[str, float]  # the metrics of one step


# ------------------------------------------------------------------------------------- what the responses' lengths say


def dumped(out: Path, step: float) -> list[tuple[str, int]]:
    """(prompt, length in tokens) of the responses that verl dumped for a step.

    One token a character, and the end of sequence where the text is not cut.
    """
    rows = map(json.loads, (out / "responses" / f"{step:.0f}.jsonl").read_text().splitlines())
    return [(row["input"], min(len(row["output"].removesuffix(".")) + 1, LONGEST)) for row in rows]


def lengths(out: Path, step: float) -> list[int]:
    return [length for _, length in dumped(out, step)]


def of_the_step(out: Path, data: Data) -> Iterable[float]:
    """One mini-batch a step: the harmonic mean of all its responses."""
    return [statistics.harmonic_mean(lengths(out, data["training/global_step"]))]


def of_the_notes(out: Path, data: Data) -> Iterable[float]:
    """The same by the reward function's notes, where verl's dumps fail. A batch is complete before the next begins."""
    size = PROMPTS * RESPONSES
    begin = (int(data["training/global_step"]) - 1) * size
    notes = [int(line) for line in (out / "lengths.txt").read_text().split()]
    return [statistics.harmonic_mean(notes[begin : begin + size])]


def of_two_halves(out: Path, data: Data) -> Iterable[float]:
    """Two mini-batches of half of the prompts each, averaged; the dump does not say which half a prompt was in."""
    inverse: dict[str, float] = defaultdict(float)
    rows = dumped(out, data["training/global_step"])
    for prompt, length in rows:
        inverse[prompt] += 1 / length
    assert len(inverse) == PROMPTS, "two equal prompts: draw other data"
    whole, half = sum(inverse.values()), len(rows) / 2
    for some in itertools.combinations(inverse.values(), PROMPTS // 2):
        yield (half / sum(some) + half / (whole - sum(some))) / 2


def of_the_steps_since_the_last_record(out: Path, data: Data) -> Iterable[float]:
    """fully_async_policy: one mini-batch a step; logged are step 1, then steps 2 and 3, at the syncs of steps 2 and 4.

    verl logs before it adds the metrics of the step itself (fully_async_trainer.py:603), and never logs the last one.
    """
    last = int(data["training/global_step"])
    steps = {1: [1], 3: [2, 3]}[last]
    return [statistics.fmean(statistics.harmonic_mean(lengths(out, step)) for step in steps)]


# -------------------------------------------------------------------------------------------------- how each is started


@dataclass(frozen=True)
class Trainer:
    """One way to train.

    expected: harmonic mean lengths that the record of a step may show. synced: records whose old log-probabilities
    belong to the weights that the rollout had.
    """

    module: str
    config: str
    overrides: tuple[str, ...]
    expected: Callable[[Path, Data], Iterable[float]] = of_the_step
    synced: tuple[int, ...] = (1, 2)
    logs_entropy: bool = True


def mini_batch(prompts: int) -> str:
    return f"actor_rollout_ref.actor.ppo_mini_batch_size={prompts}"


# Rollout and training apart, with weights over gloo.
APART = (
    "actor_rollout_ref.rollout.checkpoint_engine.backend=gloo",
    "actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=vlnorm_verl.cpu.checkpoint_engine",
    "ray_kwargs.ray_init.num_gpus=2",
    "ray_kwargs.ray_init.num_cpus=32",
)
# The quickstart's values, over the configuration of any trainer.
COMMON = (
    f"data.train_batch_size={PROMPTS}",
    "data.max_prompt_length=16",
    f"data.max_response_length={LONGEST}",
    "algorithm.adv_estimator=grpo",
    "actor_rollout_ref.actor.shuffle=true",
    "actor_rollout_ref.actor.loss_agg_mode=vl_norm",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=32",
    "actor_rollout_ref.actor.optim.lr=2.0e-4",
    f"actor_rollout_ref.rollout.n={RESPONSES}",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=64",
    "reward.custom_reward_function.name=compute_score",
    "trainer.logger=[file]",
    "trainer.total_epochs=1000",
)
EXPERIMENTAL = (
    "+config@_global_=stack",
    "algorithm.rollout_correction.bypass_mode=false",  # true, their default, computes no entropy
    "actor_rollout_ref.hybrid_engine=false",
    "rollout.nnodes=1",
    "rollout.n_gpus_per_node=1",
    *APART,
)
MAIN = ("verl.trainer.main_ppo", "cpu")
TRAINERS = {
    "v1-colocate_async": Trainer(*MAIN, (mini_batch(PROMPTS), "trainer.v1.trainer_mode=colocate_async"), synced=(1,)),
    "v1-separate_async": Trainer(
        *MAIN,
        (
            mini_batch(PROMPTS // 2),
            "trainer.v1.trainer_mode=separate_async",
            "trainer.v1.separate_async.parameter_sync_step=2",
            "actor_rollout_ref.rollout.nnodes=1",
            "actor_rollout_ref.rollout.n_gpus_per_node=1",
            *APART,
        ),
        expected=of_two_halves,
        synced=(1,),
    ),
    "v1-sync_whole_groups": Trainer(
        *MAIN,
        (
            mini_batch(PROMPTS // 2),
            "trainer.v1.trainer_mode=sync_whole_groups",
            "actor_rollout_ref.actor.shuffle=false",
            "trainer.n_gpus_per_node=2",
        ),
        expected=of_two_halves,
    ),
    "v0": Trainer(*MAIN, (mini_batch(PROMPTS), "trainer.use_v1=false")),
    "one_step_off_policy": Trainer(
        "verl.experimental.one_step_off_policy.main_ppo",
        "one_step_off_ppo_trainer",
        (
            *EXPERIMENTAL,
            mini_batch(PROMPTS),
            # verl 0.9.1 cannot dump here: no `_dump_executor` (one_step_off_policy/ray_trainer.py:49)
            "trainer.rollout_data_dir=null",
        ),
        expected=of_the_notes,
        synced=(1,),
    ),
    "fully_async_policy": Trainer(
        "verl.experimental.fully_async_policy.fully_async_main",
        "fully_async_ppo_trainer",
        (
            *EXPERIMENTAL,
            mini_batch(PROMPTS // 2),
            "data.train_batch_size=0",
            "data.gen_batch_size=1",
            "async_training.require_batches=1",
            "async_training.trigger_parameter_sync_step=2",
            f"rollout.total_rollout_steps={4 * PROMPTS // 2}",
        ),
        expected=of_the_steps_since_the_last_record,
        synced=(1,),
    ),
    "v1-sync-lora": Trainer(
        *MAIN, (mini_batch(PROMPTS), "actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.model.lora_alpha=8")
    ),
    "v1-sync-bypass": Trainer(
        *MAIN,
        (mini_batch(PROMPTS), "algorithm.rollout_correction.bypass_mode=true"),
        synced=(),  # nothing to compare: the rollout's log-probabilities are the old ones
        logs_entropy=False,
    ),
}

REWARD = """
from vlnorm_verl.tasks.tiny import countdown


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    with open({notes!r}, "a") as notes:
        notes.write(f"{{min(len(solution_str.removesuffix('.')) + 1, {longest})}}\\n")
    return countdown.compute_score(data_source, solution_str, ground_truth, extra_info, **kwargs)
"""


def command(trainer: Trainer, out: Path, *overrides: str) -> list[str]:
    own = [f"--config-path={CONFIG_FOLDER}"] if trainer.config == "cpu" else []
    return [
        sys.executable,
        "-m",
        trainer.module,
        *own,
        f"--config-name={trainer.config}",
        "hydra.searchpath=[pkg://verl.trainer.config,pkg://vlnorm_verl.cpu]",
        f"hydra.run.dir={out}",
        *COMMON,
        f"actor_rollout_ref.model.path={WEIGHTS}",
        f"data.train_files={out}/data/train.parquet",
        f"data.val_files={out}/data/test.parquet",
        f"reward.custom_reward_function.path={out}/reward.py",
        "data.val_max_samples=4",
        f"trainer.rollout_data_dir={out}/responses",
        "trainer.resume_mode=disable",
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "trainer.total_training_steps=2",
        *trainer.overrides,
        *overrides,
    ]


def run(trainer: Trainer, out: Path) -> list[Data]:
    """The metrics of a run that must end well, of the steps that trained."""
    (out / "data").mkdir()
    write_parquet(rows(4096, 0, "train"), out / "data" / "train.parquet")
    write_parquet(rows(128, 0, "test"), out / "data" / "test.parquet")
    (out / "reward.py").write_text(REWARD.format(notes=str(out / "lengths.txt"), longest=LONGEST))
    metrics, log = out / "metrics.jsonl", out / "train.log"
    try:
        with (
            locked(out) as lock,
            closing(train(command(trainer, out), cpu_environment(), metrics, log, lock)) as stream,
        ):
            records = [record["data"] for record in stream]
    except TrainingFailed as error:
        pytest.fail(f"{error}\n{''.join(last_lines(log, 60))}")
    assert not processes_of(out)
    return [data for data in records if "actor/grad_norm" in data]


# ---------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("name", TRAINERS)
def test_two_steps(name: str, tmp_path: Path) -> None:
    trainer = TRAINERS[name]
    records = run(trainer, tmp_path)
    assert len(records) == 2
    for number, data in enumerate(records, start=1):
        logged = data["actor/vl_norm/length_harmonic_mean"]
        # To the rounding of float64: a mean over another set of responses, or of micro-batches' own, lies beside it.
        assert any(math.isclose(logged, value, rel_tol=1e-12) for value in trainer.expected(tmp_path, data)), logged
        assert data["actor/vl_norm/length_mean"] == pytest.approx(data["response_length/mean"], rel=1e-6)
        # Σ x_i L_i = H/M over all mini-batches, near the mean of their H over M. The actor's M is
        # data.max_response_length, though loss_scale_factor was left null.
        token_weight = data["actor/vl_norm/weighted_tokens"] / data["actor/vl_norm/divisor"]
        assert token_weight == pytest.approx(logged / LONGEST, rel=0.3)
        assert 0 < data["actor/grad_norm"] < math.inf
        if trainer.logs_entropy:  # by the driver, over the whole rollout batch; nats a token
            assert 0 < data["actor/entropy"] / token_weight < math.log(len(VOCABULARY))
        if number in trainer.synced:
            assert data["training/rollout_probs_diff_max"] < SYNCED


@pytest.mark.parametrize("name", ["one_step_off_policy", "fully_async_policy"])
def test_refused_before_ray_starts(name: str, tmp_path: Path) -> None:
    _, *arguments = command(TRAINERS[name], tmp_path, "actor_rollout_ref.actor.loss_agg_mode=vlnorm")
    done = warm.python(*arguments, **cpu_environment())
    assert done.returncode != 0
    assert "Did you mean 'vl_norm'" in done.stderr
    assert "ray init kwargs" not in done.stdout  # verl prints them right before ray.init (trainer/main_ppo.py:73)
    assert "Started a local Ray instance" not in done.stderr
