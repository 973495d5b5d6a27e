"""What a person sees of a run on the terminal: a line a step, and a table at the end."""

from __future__ import annotations

import os
import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from vlnorm_verl.runs.process import Record
from vlnorm_verl.runs.records import VALIDATION_METRIC

REWARD, LENGTH = "critic/score/mean", "response_length/mean"
SHOWN = (  # of a training step
    ("reward {}", REWARD, ".3f"),
    ("length {}", LENGTH, "5.1f"),
    ("H {}", "actor/vl_norm/length_harmonic_mean", ".1f"),
    ("√(A/H) {}", "actor/vl_norm/variance_ratio", ".2f"),
    ("grad {}", "actor/grad_norm", ".3f"),
    ("{} s", "timing_s/step", ".1f"),
)


class Terminal(Console):
    """One for hours, also without a person at it."""

    @property
    def is_terminal(self) -> bool:
        """With FORCE_COLOR alone a log would be filled with the spinner, twelve times a second."""
        return super().is_terminal and self.file.isatty()

    def on_broken_pipe(self) -> None:
        """The run goes on: `| tee run.log`, and the terminal was closed. Rich would end it."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def terminal(**options: Any) -> Console:
    """A console that prints text as it is: not wrapped, no markup."""
    return Terminal(markup=False, highlight=False, soft_wrap=True, **options)


def validation_accuracies(data: dict[str, float | None]) -> dict[tuple[str, str], float | None]:
    """{(validation set, n): Avg@n, which is verl's mean@n}, as far as this record has them."""
    found = ((VALIDATION_METRIC.fullmatch(key), value) for key, value in data.items())
    return {(match["set"], match["n"]): value for match, value in found if match}


def text(value: float | None, form: str = ".3f") -> str:
    """A dash for what was not measured or is no finite number, which verl logs as null."""
    return "–" if value is None else format(value, form)


def progress_line(record: Record, steps: int) -> str | None:
    """What a person wants to see of one step, as far as verl has logged it."""
    data, parts = record["data"], []
    if REWARD in data:  # else it is of a validation alone
        parts = [name.format(text(data[key], form)) for name, key, form in SHOWN if key in data]
    if accuracies := validation_accuracies(data):
        # One set needs no name; all have the same n, rollout.val_kwargs.n.
        named = [f"{f'{name} ' if len(accuracies) > 1 else ''}{text(value)}" for (name, _), value in accuracies.items()]
        parts.append(f"validation Avg@{next(iter(accuracies))[1]} {', '.join(named)}")
    return f"step {record['step']:3d}/{steps}  " + "  ".join(parts) if parts else None


def summarize(records: list[Record]) -> dict[str, Any]:
    """A run in numbers: {what: (in the beginning, at the end)}, None where it was not measured, and seconds a step.

    Avg@n of each validation set: of the first and the last validation. Reward and length: means over the first and the
    last 10 steps, without those that are no finite number.
    """
    steps = [record["data"] for record in records if REWARD in record["data"]]
    validations = [accuracies for record in records if (accuracies := validation_accuracies(record["data"]))]
    summary: dict[str, Any] = {"steps": len(steps), "accuracy": {}}
    for name in dict.fromkeys(name for accuracies in validations for name in accuracies):
        values = [accuracies[name] for accuracies in validations if name in accuracies]
        summary["accuracy"][name] = (values[0], values[-1] if len(values) > 1 else None)
    for what, key in (("reward", REWARD), ("length", LENGTH)):
        parts = [[data[key] for data in part if data[key] is not None] for part in (steps[:10], steps[-10:])]
        summary[what] = tuple(statistics.fmean(part) if part else None for part in parts)
    summary["seconds_per_step"] = statistics.median(data["timing_s/step"] for data in steps) if steps else None
    return summary


def summary_table(summary: dict[str, Any], title: str, seconds: float) -> Table:
    """`summarize` as a table. seconds: of the present start, all of it."""
    table = Table("", "before", "after", title=f"{title}, {summary['steps']} steps")
    for (name, n), (first, last) in summary["accuracy"].items():
        table.add_row(f"Avg@{n}, {name}", text(first), text(last))
    for what, name, form in (("reward", "training reward", ".3f"), ("length", "response length", ".1f")):
        first, last = summary[what]
        table.add_row(f"{name} (first, last 10 steps)", text(first, form), text(last, form))
    table.add_row("seconds: total, a step", text(seconds, ".0f"), text(summary["seconds_per_step"], ".1f"))
    return table
