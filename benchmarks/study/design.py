"""The runs of the CPU study: methods, blocks, parts, order, and what each run is given (why: docs/results/study.md).

Everything that a run's result depends on is a constant here or a value of recipes/config. A block is a seed: the same
prompts in the same order, from the same warm start. Blocks take the three warm starts in turn. Within a block the order
of the runs is drawn by `random.Random(f"{part}-{block}")`, so that a slow change of the machine favours no method.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from vlnorm_verl.methods import split

LENGTH = 384  # tokens, the longest response; by the pilots
JOBS = 1  # runs at a time, which share the cores; by the pilots
# A warm start's number is its seed; the package ships number 1. Number 2 has not learned the task (LEAST).
BLOCKS, WARM_STARTS, STEPS = 12, (1, 4, 3), 60
LEAST = 0.25  # right responses of a warm start at temperature 1; below, no method has anything to begin with
RATE, EPS = 2e-4, 1e-8
FACTORIAL = ("grpo_norm", "dapo_norm", "dr_grpo_norm", "vl_norm:1")
METHODS = (*FACTORIAL, "vl_norm:0.75")
FLOOR = "floor_norm:32"  # a loss_agg_mode of benchmarks/study/floor.py
PARTS = {
    "pilots": "the longest response; one run at a time or two",
    "main": "12 blocks of the five methods",
    "rates": "half and twice the learning rate, the four methods of the 2 × 2 design",
    "eps": "VL Norm with a larger ε of Adam",
    "long": "150 steps",
    "floor": "1/max(L, 32) instead of VL Norm's 1/L, exploratory",
}
HELD_OUT = 512  # problems; the first 128 are the quickstart's


@dataclass(frozen=True)
class Run:
    """length: tokens. jobs: runs at a time. problems: of the validation at the end. The block is the seed."""

    part: str
    method: str
    block: int
    steps: int = STEPS
    length: int = LENGTH
    rate: float = RATE
    eps: float = EPS
    jobs: int = JOBS
    problems: int = HELD_OUT

    @property
    def name(self) -> str:
        own = [str(self.length)] if self.part == "pilots" else []
        own += [f"{value:g}" for value, usual in ((self.rate, RATE), (self.eps, EPS)) if value != usual]
        return "-".join([self.part, f"{self.block:02d}", self.method.replace(":", "-"), *own])

    @property
    def warm_start(self) -> int:
        return WARM_STARTS[self.block % len(WARM_STARTS)]

    def overrides(self, folder: Path, data: Path, model: Path, held_out: Path) -> list[str]:
        """What `vlnorm-verl launch` is given: the quickstart's recipe, validated once at the end, no checkpoint."""
        method, alpha = split("vl_norm:1" if self.method == FLOOR else self.method)
        mode = [f"actor_rollout_ref.actor.loss_agg_mode='{FLOOR}'"] if self.method == FLOOR else []
        return [
            *("family=quickstart", "task=countdown", "length=8192", "model=tiny", f"method={method}"),
            *([] if alpha is None else [f"recipe.alpha={alpha}"]),
            *mode,
            *(f"recipe.steps={self.steps}", f"recipe.seed={self.block}", f"recipe.tiny_length='{self.length}'"),
            *(f"recipe.folder={folder}", f"recipe.data={data}", f"data.val_files={held_out}"),
            f"actor_rollout_ref.model.path={model}",
            f"actor_rollout_ref.actor.optim.lr={self.rate}",
            f"actor_rollout_ref.actor.optim.override_optimizer_config={{eps: {self.eps}}}",
            *("trainer.val_before_train=false", f"trainer.test_freq={self.steps}", "trainer.save_freq=-1"),
        ]


def runs() -> list[Run]:
    """All of them, in their order."""
    vl, first = "vl_norm:1", range(4)
    pilot = range(102, 111, 3)  # seeds that no block has, all from the shipped warm start
    found = [Run("pilots", vl, pilot[0], length=length, jobs=1) for length in (256, 384)]
    found += [Run("pilots", vl, seed, steps=20, length=256, jobs=2) for seed in pilot[1:]]
    found += [run for block in range(BLOCKS) for run in shuffled([Run("main", method, block) for method in METHODS])]
    for block in first[:2]:
        found += shuffled([Run("rates", m, block, rate=rate) for rate in (RATE / 2, RATE * 2) for m in FACTORIAL])
    found += [Run("eps", vl, block, eps=6e-6) for block in first]
    found += shuffled([Run("long", method, first[0], steps=150) for method in METHODS])
    return found + [Run("floor", FLOOR, block) for block in first]


def shuffled(block: list[Run]) -> list[Run]:
    return random.Random(f"{block[0].part}-{block[0].block}").sample(block, len(block))
