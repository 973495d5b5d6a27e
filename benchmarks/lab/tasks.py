"""Tasks that pretrained models of 0.1 to 0.5 B parameters solve now and then: prompts, rewards and their data files.

    python benchmarks/lab/tasks.py multiplication --out multiplication.parquet
    vlnorm-verl lab run MODEL --task custom --data multiplication.parquet --reward benchmarks/lab/tasks.py \\
        --out runs/lab/multiplication

| task           | prompt                                                   | reward 1 if                             |
|----------------|----------------------------------------------------------|-----------------------------------------|
| multiplication | "What is 7 times 48? Put the final answer in \\boxed{}." | the last box has the product            |
| list           | "List exactly 4 fruits, one per line."                   | so many lines: reward depends on length |
| addition       | "What is 3 + 8?"                                         | the last number of the reply is the sum |

Covered: the files have verl's schema, so that verl can train on them too. Not covered: held-out problems; a model's
accuracy on these says nothing about benchmarks of that name.
"""

import itertools
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from vlnorm_verl.files import whole
from vlnorm_verl.tasks.base import row, write_parquet
from vlnorm_verl.tasks.math import extract_boxed

Items = Iterable[tuple[str, str]]  # prompt, ground truth


# ------------------------------------------------------------------------------------------------------ multiplication


def multiplications() -> Items:
    for a, b in itertools.product(range(3, 10), range(12, 100)):
        yield f"What is {a} times {b}? Put the final answer in \\boxed{{}}.", str(a * b)


def boxed(response: str, truth: str) -> bool:
    return (extract_boxed(response) or "").replace(",", "") == truth


# ------------------------------------------------------------------------------------------------------ list, addition

KINDS = (
    *("animals", "birds", "fish", "insects", "trees", "flowers", "fruits", "vegetables", "countries", "cities"),
    *("rivers", "colors", "sports", "tools", "planets", "metals", "foods", "drinks", "jobs", "languages", "toys"),
    *("games", "clothes", "shapes"),
)


def lists() -> Items:
    for kind, count in itertools.product(KINDS, range(3, 8)):
        yield f"List exactly {count} {kind}, one per line.", str(count)


def counted(response: str, truth: str) -> bool:
    return sum(bool(line.strip()) for line in response.splitlines()) == int(truth)


def additions() -> Items:
    for a, b in itertools.product(range(1, 13), repeat=2):
        yield f"What is {a} + {b}?", str(a + b)


def last_number(response: str, truth: str) -> bool:
    found = re.findall(r"-?\d[\d,]*", response)
    return bool(found) and found[-1].replace(",", "") == truth


# --------------------------------------------------------------------------------------------------------------- files

TASKS: dict[str, tuple[Callable[[], Items], Callable[[str, str], bool]]] = {
    "multiplication": (multiplications, boxed),
    "list": (lists, counted),
    "addition": (additions, last_number),
}


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """In the signature of verl's custom reward; `data_source` is the task."""
    return float(TASKS[data_source][1](solution_str, ground_truth))


def main(
    task: Annotated[str, typer.Argument(help=", ".join(TASKS))],
    out: Annotated[Path, typer.Option(dir_okay=False, help="Parquet file to write.")],
) -> None:
    """Write all problems of a task, shuffled, the same ones each time."""
    if task not in TASKS:
        raise typer.BadParameter(f"{task!r} is not known; accepted: {', '.join(TASKS)}")
    items = list(TASKS[task][0]())
    random.Random(0).shuffle(items)
    rows = [row(task, prompt, truth, "train", index, "generated") for index, (prompt, truth) in enumerate(items)]
    with whole(out) as temporary:
        write_parquet(rows, temporary)
    print(f"{out}: {len(rows)} problems")


if __name__ == "__main__":
    typer.run(main)
