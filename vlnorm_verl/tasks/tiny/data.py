"""Writes the tiny CountDown task as parquet files in verl's schema.

    python -m vlnorm_verl.tasks.tiny.data --out data/tiny     # train.parquet and test.parquet

Covered: different problems in each file, no problem of test.parquet in train.parquet in any order of its numbers,
the same bytes of content for the same seed and sizes, and files that appear complete or not at all. Not covered:
any other task.

Columns: ``data_source``, ``prompt`` (one user message), ``ability``, ``reward_model`` (``style`` and
``ground_truth``, a JSON string that ``countdown.compute_score`` reads) and ``extra_info`` (``split``, ``index``).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer

from vlnorm_verl.tasks.tiny.countdown import DATA_SOURCE, Split, distinct_problems, ground_truth, render_prompt


def rows(count: int, seed: int, split: Split) -> list[dict[str, Any]]:
    return [
        {
            "data_source": DATA_SOURCE,
            "prompt": [{"role": "user", "content": render_prompt(problem)}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": ground_truth(problem)},
            "extra_info": {"split": split, "index": index},
        }
        for index, problem in enumerate(distinct_problems(count, seed, split))
    ]


def write_parquet(table: list[dict[str, Any]], path: Path) -> None:
    """Complete or not at all: written beside the target and moved over it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(pa.Table.from_pylist(table), temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main(
    out: Annotated[Path, typer.Option(file_okay=False, help="Directory for train.parquet and test.parquet.")],
    train_size: Annotated[int, typer.Option(min=1, help="Prompts to train on.")] = 4096,
    test_size: Annotated[int, typer.Option(min=1, help="Held-out prompts.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of both files.")] = 0,
) -> None:
    """Write the tiny CountDown task for verl. Expressions are read from left to right: 2+3*4 is 20."""
    sizes: dict[Split, int] = {"train": train_size, "test": test_size}
    tables: dict[Split, list[dict[str, Any]]] = {}
    for split, size in sizes.items():
        try:
            tables[split] = rows(size, seed, split)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint=f"--{split}-size") from error
    out.mkdir(parents=True, exist_ok=True)
    for split, table in tables.items():
        path = out / f"{split}.parquet"
        write_parquet(table, path)
        typer.echo(f"{path}: {len(table)} prompts")


if __name__ == "__main__":
    typer.run(main)
