"""Runs of verl made for the report's tests, and what the report makes of them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from omegaconf import OmegaConf
from rich.console import Console

from vlnorm_verl.report import build, tables, verdict
from vlnorm_verl.report.find import find
from vlnorm_verl.report.groups import Comparison
from vlnorm_verl.report.read import read_runs
from vlnorm_verl.report.run import Run

SAMPLES = Path(__file__).parent / "report_samples"
KEY = "val-core/set/acc/mean@8"


def record(step: int, **metrics: Any) -> str:
    return json.dumps({"step": step, "data": {key.replace("__", "/"): value for key, value in metrics.items()}}) + "\n"


def accuracy(value: float, name: str = "set", n: int = 8) -> dict[str, float]:
    return {f"val-core/{name}/acc/mean@{n}": value}


def dump_line(problem: str, right: float, **fields: Any) -> str:
    entry = {"input": problem, "output": "text", "gts": "1", "score": right, "step": 0, "acc": right, **fields}
    return json.dumps(entry, ensure_ascii=False) + "\n"


def write_run(
    root: Path,
    method: str = "vl_norm:1.0",
    seed: int = 0,
    curve: dict[int, float] | None = None,
    dumps: dict[int, dict[str, list[int]]] | None = None,
    planned: int = 1000,
    recipe: dict[str, Any] | None = None,
    name: str = "set",
) -> Path:
    """A run as the launcher leaves it. curve: step -> accuracy. dumps: step -> problem -> its responses' scores."""
    folder = root / f"{method.replace(':', '-')}-{seed}"
    folder.mkdir(parents=True)
    curve = curve or {step: float(np.mean([r for p in found.values() for r in p])) for step, found in dumps.items()}
    choices = {"family": "aggregation", "task": "countdown", "model": "3b", "length": "3072"}
    mode = {"grpo_norm": "seq-mean-token-mean", "dapo_norm": "token-mean", "dapo": "token-mean"}.get(method, method)
    config = {
        "recipe": {**choices, "method": method.partition(":")[0], "alpha": 1.0, "seed": seed, **(recipe or {})},
        "actor_rollout_ref": {"actor": {"loss_agg_mode": mode}},
        "trainer": {"total_training_steps": planned},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [record(step, **accuracy(value, name)) for step, value in curve.items()]
    (folder / "metrics-000.jsonl").write_text("".join(lines))
    for step, problems in (dumps or {}).items():
        (folder / "validation").mkdir(exist_ok=True)
        text = "".join(dump_line(problem, right) for problem, found in problems.items() for right in found)
        (folder / "validation" / f"{step}.jsonl").write_text(text)
    return folder


def configure(folder: Path, **keys: Any) -> Path:
    """The run with these keys in its configuration, too; in their names "__" is "."."""
    config = OmegaConf.load(folder / "config.yaml")
    for key, value in keys.items():
        OmegaConf.update(config, key.replace("__", "."), value, force_add=True)
    OmegaConf.save(config, folder / "config.yaml")
    return folder


def random_dump(seed: int, rate: float, problems: int = 40) -> dict[str, list[int]]:
    generator = np.random.default_rng(seed)
    return {f"p{i}": generator.binomial(1, rate, 8).tolist() for i in range(problems)}


def line(step: int, offset: float = 0.0, **more: Any) -> str:
    """A training step of verl, validated every tenth step: accuracy 0.3 + step / 200 + offset."""
    data = {"training/global_step": step, "actor/grad_norm": 0.5}
    if step % 10 == 0:
        data |= accuracy(round(0.3 + step / 200 + offset, 4))
    return json.dumps({"step": step, "data": {**data, **more}}) + "\n"


def text(*spans: tuple[int, int, float]) -> str:
    """The lines of starts from a first to a last step."""
    return "".join(line(step, offset) for first, last, offset in spans for step in range(first, last + 1))


def put(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def read(*arguments: Any, **options: Any) -> list[Run]:
    return read_runs(find([str(argument) for argument in arguments]), **options)


def read_one(folder: Path | str, **options: Any) -> Run:
    (run,) = read(folder, **options)
    return run


def said(runs: list[Run]) -> list[tuple[str, int]]:
    return [(run.method_key, run.seed) for run in runs]


def made(runs: list[Run], name: str, smooth: int | None = None) -> list[dict[str, Any]]:
    """The rows of a table by their columns; those of results with what details and sets say of the same rows."""
    rows: dict[Any, dict[str, Any]] = {}
    for table in tables.tables(Comparison(runs), smooth):
        if table.name in ((name, "details", "sets") if name == "results" else (name,)):
            for number, row in enumerate(table.rows):
                key = (row[0], row[1]) if name == "results" else number
                rows.setdefault(key, {}).update(zip(table.columns, row, strict=True))
    return list(rows.values())


def foot(runs: list[Run]) -> str:
    """The sentences below all tables."""
    return " ".join(sentence for table in tables.tables(Comparison(runs)) for sentence in table.foot)


def looked_at(runs: list[Run]) -> dict[str, list[str]]:
    return verdict.look_at(Comparison(runs))


def report(*arguments: Any, out: Path, **options: Any) -> list[str]:
    """Write a report of the arguments; what it says."""
    return build.build(build.Request(tuple(map(str, arguments)), out, **options), Console(file=io.StringIO()))


def table_of(out: Path, name: str) -> list[dict[str, Any]]:
    """Rows of a written table by its columns."""
    with open(out / "tables" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))
