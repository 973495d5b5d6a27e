"""What the configurations of runs differ in, beside what a table already says of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from vlnorm_verl.report.groups import Comparison, by_setting, runs_of
from vlnorm_verl.report.identity import Identity, file_names
from vlnorm_verl.report.table import Table

# What makes a run the one it is (method, seed, names, folders, the machine) differs in every run.
EXPECTED = re.compile(
    r"recipe\..*|ray_kwargs\..*|trainer\.logger|actor_rollout_ref\.actor\.loss_agg_mode"
    r"|.*\b(experiment_name|project_name)"
    r"|.*(\b|_)seed|.*(_dir|(save|resume_from)_path|folder|file|address|port|proxy|_wandb.*)",
)
# Files that say what is trained. They may lie elsewhere in each run, so their last folder and name are compared.
FILES = re.compile(r".*(_files|\b(tool_config|function_tool|agent_loop_config)_path)")
SECRET = re.compile(r".*(api_?key|access_?key|secret|password|token)", re.IGNORECASE)
LONGEST, MOST = 80, 200  # characters of a value; rows


def flat(node: Any, prefix: str = "") -> dict[str, str]:
    """{dotted key: value as text} of a configuration; of FILES as `file_names` has them."""
    if not isinstance(node, dict):
        return {prefix: (FILES.fullmatch(prefix) and file_names(node)) or str(node)}
    return {key: value for name in node for key, value in flat(node[name], f"{prefix}.{name}".strip(".")).items()}


def differing_keys(runs: Sequence[Identity]) -> list[str]:
    """Keys that do not have one value in all of the runs that have a configuration.

    Without those of secrets, those that say which run it is, and those of a critic that no run has.
    """
    every = [flat(run.config) for run in runs if run.config]
    critic = any(map(_has_critic, every))
    keys = dict.fromkeys(key for config in every for key in config if _compared(key))
    return [
        key
        for key in keys
        if len({config.get(key) for config in every}) > 1 and (critic or not key.startswith("critic."))
    ]


def _compared(key: str) -> bool:
    return not SECRET.fullmatch(key) and bool(FILES.fullmatch(key) or not EXPECTED.fullmatch(key))


def _has_critic(config: dict[str, str]) -> bool:
    """As verl's need_critic (trainer/ppo/utils.py) decides it."""
    enable = config.get("critic.enable", "None")
    return enable == "True" or (enable == "None" and config.get("algorithm.adv_estimator") == "gae")


def differing(compared: Comparison) -> Table | None:
    """One row a key in which runs of one setting differ: each value with the methods, or seeds of one, that have it."""
    rows: list[list[Any]] = []
    for setting, groups in by_setting(compared.groups).items():
        configs = [
            (group.label, run.seed, flat(run.config)) for group, runs in groups.items() for run in runs if run.config
        ]
        for key in differing_keys(runs_of(groups)):
            having: dict[str, dict[str, list[int]]] = {}
            for label, seed, config in configs:
                having.setdefault(config.get(key, "not there"), {}).setdefault(label, []).append(seed)
            said = "; ".join(_said(value, seeds, configs) for value, seeds in having.items())
            rows.append([compared.titles[setting], key, said])
    if not rows:
        return None
    more = [f"{len(rows) - MOST} more keys differ."] if len(rows) > MOST else []
    columns = ["setting", "key", "values"]
    return Table("settings", "What else the runs differ in", columns, rows[:MOST], more, grouped=True)


def _said(value: str, having: dict[str, list[int]], configs: list[tuple[str, int, dict[str, str]]]) -> str:
    """ "1e-06: GRPO Norm, VL Norm (α = 1) seed 2"."""
    words = []
    for label, seeds in having.items():
        whole = len(seeds) == sum(other == label for other, _, _ in configs)
        words.append(label if whole else f"{label} seed {', '.join(map(str, sorted(seeds)))}")
    shown = value if len(value) <= LONGEST else f"{value[: LONGEST - 1]}…"
    return f"{shown}: {', '.join(words)}"
