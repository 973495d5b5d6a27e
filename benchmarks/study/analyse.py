"""The analysis of the CPU study, written before its runs: the results in docs/results/study.md, and its figure.

    python -m benchmarks.study.analyse                         from docs/results/study
    python -m benchmarks.study.analyse --records DIR --page FILE

The main part is shown when all of its runs are finished, so that no test is made before the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from benchmarks.study import effects
from benchmarks.study.design import FACTORIAL, FLOOR, HELD_OUT, METHODS, PARTS, STEPS, WARM_STARTS, runs
from benchmarks.study.effects import DAPO, DR_GRPO, GRPO, VL, Blocks, bootstrap
from benchmarks.study.record import RECORDS, read_records
from vlnorm_verl import files
from vlnorm_verl.methods import BLUE, color_of, label_of, method_of
from vlnorm_verl.report.estimates import Estimate, Scores, difference, mean, over_seeds
from vlnorm_verl.report.measures import trailing_mean
from vlnorm_verl.report.style import Figure, render, use_style
from vlnorm_verl.report.table import Cell, Table
from vlnorm_verl.report.writers import to_markdown

PAGE = RECORDS.with_suffix(".md")
BEGIN, END = "<!-- begin: written by analyse.py -->\n", "<!-- end: written by analyse.py -->\n"
LAST = 10  # steps
REPLACEMENT = 4  # the warm start that was taken after a look at the accuracies of number 2's runs
LEVELS = "{}: each warm start is moved, by its mean over all methods, to the mean of all, since they differ in level."
HELD_OUT_INTERVAL = "Held-out Avg@8: over blocks and problems together; all else over blocks"
Records = Sequence[dict[str, Any]]  # of one method in the order of their blocks, where it matters


def values(records: Records, column: str, first: int = 0, last: int | None = STEPS) -> np.ndarray:
    """Mean of a column over steps of each run [B]; by default over steps 1 to 60, of accuracy the primary endpoint."""
    return np.array([np.mean(record["columns"][column][first:last]) for record in records])


def end(records: Records, column: str) -> float:
    return float(values(records, column, -LAST, None).mean())


def held_out(records: Records) -> Scores:
    rates = np.array([[int(digit) / 8 for digit in record["held_out"]] for record in records])
    names = tuple(map(str, range(HELD_OUT)))
    return Scores(rates, names, (HELD_OUT,), tuple(record["block"] for record in records))


def over_blocks(effect: np.ndarray) -> Estimate:
    return over_seeds(effect.tolist())


def main_part(records: Records) -> dict[str, Records]:
    of_main = sorted((r for r in records if r["part"] == "main"), key=lambda r: r["block"])
    return {method: [r for r in of_main if r["method"] == method] for method in METHODS}


def starts(main: dict[str, Records]) -> np.ndarray:
    return np.array([record["warm_start"] for record in main[VL]])


def accuracies(main: dict[str, Records]) -> Blocks:
    return {method: values(of, "accuracy") for method, of in main.items()}


def p_of(test: effects.Test) -> str:
    return "–" if test.p is None else "< 0.0001" if test.p < 1e-4 else f"{test.p:.4f}"


def tests(y: Blocks) -> Table:
    rows = list[list[Cell]]()
    for test in effects.tests_in_order({method: y[method] for method in FACTORIAL}):
        rows.append([test.question, over_blocks(test.effect), bootstrap(test.effect), p_of(test), test.verdict])
    foot = [
        "Each is made only if the one before is established, and says something of these three warm starts. Student's "
        "t over blocks; bootstrap: expanded percentiles over blocks. All intervals are of 95%; the third test is that "
        f"the interval of 90% is within ±{effects.MARGIN}, which does not mean 0."
    ]
    return Table("tests", "The tests", ["question", "effect", "bootstrap", "p", "verdict"], rows, foot, digits=4)


def methods(main: dict[str, Records], y: Blocks) -> Table:
    rest = effects.without_levels(y, starts(main))
    fast = effects.speed_ups({m: np.array([r["columns"]["accuracy"] for r in of]) for m, of in main.items()})
    rows: list[list[Cell]] = []
    for method, of in main.items():
        iqm = bootstrap(rest[method], statistic=effects.interquartile_mean)
        lengths: list[Cell] = [end(of, column) for column in ("length_mean", "length_harmonic", "cut")]
        scale: Cell = None
        if length := {GRPO: "length_harmonic", DAPO: "length_mean"}.get(method):
            scale = float(values(of, length, 0, LAST).mean()) / end(of, length)
        row: list[Cell] = [label_of(method), over_blocks(rest[method]), float(rest[method].std(ddof=1)), iqm]
        rows.append([*row, float(held_out(of).values.mean()), *lengths, scale, *fast[method]])
    columns = ["method", "accuracy, steps 1–60", "sd", "interquartile mean", "held-out Avg@8", "A", "H", "cut"]
    columns += ["Σx, last to first", f"DAPO's steps to {effects.TARGET} over its own", "the same, fitted"]
    columns += ["fitted, plateau of its own"]
    foot = [
        LEVELS.format("Accuracy, sd and interquartile mean"),
        f"A, H: means over steps of the arithmetic and the harmonic mean length; they and the share cut are of the "
        f"last {LAST} steps. Σx is 1/H for {label_of(GRPO)}, 1/A for {label_of(DAPO)} and constant for the others; "
        f"last to first: of {LAST} steps each.",
        "Steps: on the mean over blocks of each block's running maximum, which makes differences smaller (a true "
        "factor of 2 reads about 1.5). Fitted: DAPO's τ over this one's, of a + b (1 − exp(−step/τ)) with common a "
        "and b; with a plateau of its own each method has another b. Bootstrap over blocks.",
    ]
    return Table("methods", "The methods", columns, rows, foot, digits_of={"A": 0, "H": 0, columns[8]: 2, "sd": 4})


def pairs(main: dict[str, Records], y: Blocks) -> Table:
    rows: list[list[Cell]] = []
    rest = effects.without_levels(y, starts(main))
    for a, b in combinations(reversed(y), 2):
        better = bootstrap(rest[a], rest[b], statistic=effects.probability_of_improvement)
        row: list[Cell] = [f"{label_of(a)} − {label_of(b)}", over_blocks(y[a] - y[b]), bootstrap(y[a] - y[b]), better]
        rows.append([*row, difference(held_out(main[a]), held_out(main[b]))])
    columns = ["difference", "accuracy, steps 1–60", "bootstrap", "probability of improvement", "held-out Avg@8"]
    foot = [
        f"Descriptive: not corrected for their number. {HELD_OUT_INTERVAL}, of these three warm starts.",
        LEVELS.format("Probability of improvement")
        + " Each run of one method is compared with each of the other; no interval where all comparisons agree.",
    ]
    return Table("pairs", "All pairs", columns, rows, foot, digits=4)


def warm_starts(main: dict[str, Records], y: Blocks) -> Table:
    start = starts(main)
    found = {"weighting effect": effects.weighting_effect(y), "scale effect": effects.scale_effect(y)}
    found |= {"interaction": effects.interaction(y), f"{label_of(VL)} − {label_of(DAPO)}": y[VL] - y[DAPO]}
    chosen = {"all": start > 0, f"without number {REPLACEMENT}": start != REPLACEMENT}
    chosen |= {f"number {w}": start == w for w in WARM_STARTS}
    rows: list[list[Cell]] = [[n, *(over_blocks(v[some]) for some in chosen.values())] for n, v in found.items()]
    # Without intervals: two of the columns mix levels.
    rows.append([f"accuracy of {label_of(DAPO)}", *(float(y[DAPO][some].mean()) for some in chosen.values())])
    without = effects.tests_in_order({method: y[method][start != REPLACEMENT] for method in FACTORIAL})
    made = "; ".join(f"{test.question}: {test.verdict} (p: {p_of(test)})" for test in without)
    foot = [
        f"The tests in order without number {REPLACEMENT}: {made}.",
        f"Descriptive. Interaction: ({label_of(VL)} − {label_of(GRPO)}) − ({label_of(DR_GRPO)} − {label_of(DAPO)}); if "
        "it is not 0, the scale effect is a mean of two different ones, which are among all pairs.",
        "Correlation of two methods over all blocks, by the levels of the warm starts: "
        f"{effects.correlation(y, 0 * start):.2f}; over blocks of one warm start, each method's own level removed: "
        f"{effects.correlation(y, start):.2f}. Equal variances of the methods (Brown and Forsythe, each warm start "
        f"moved to the mean of all): p = {effects.p_equal_spread(y, start):.2f}. Standard deviation of a run around "
        "its method and block: {0.value:.4f} [{0.low:.4f}, {0.high:.4f}].".format(effects.residual_spread(y)),
    ]
    return Table("warm", "By warm start", ["", *chosen], rows, foot, digits=4)


def side_runs(records: Records, main: dict[str, Records]) -> Table:
    """Each setting of the other parts, beside main's runs of the same method and blocks; the floor beside VL Norm's."""
    rows: list[list[Cell]] = []
    settings = dict[tuple[Any, ...], list[dict[str, Any]]]()
    for record in sorted((r for r in records if r["part"] != "main"), key=lambda r: [*PARTS].index(r["part"])):
        keys = ("part", "method", "length", "rate", "eps", "steps", "jobs")
        settings.setdefault(tuple(record[key] for key in keys), []).append(record)
    for (part, method, length, rate, eps, steps, jobs), of in settings.items():
        usual = {record["block"]: record for record in main.get(method, main[VL])}
        gaps = [values([r, usual[r["block"]]], "accuracy") for r in of if part != "pilots" and r["block"] in usual]
        setting: list[Cell] = [part, label_of(method), str(length), f"{rate:g}", f"{eps:g}", f"{steps} × {len(of)}"]
        gap = over_seeds([float(a - b) for a, b in gaps]) if gaps else None
        reached: list[Cell] = [float(values(of, "accuracy").mean()), gap, end(of, "accuracy"), mean(held_out(of))]
        reached += [end(of, "length_mean"), end(of, "cut")]
        first = float(np.mean([sum(r["columns"]["seconds"][:20]) for r in of]))
        rows.append([*setting, *(reached if jobs == 1 else [None] * len(reached)), jobs, first])
    columns = ["part", "method", "longest", "lr", "ε", "steps × runs", "accuracy, up to step 60", "minus main's"]
    columns += [f"last {LAST} steps", "held-out Avg@8", "A", "cut", "at a time", "seconds, steps 1–20"]
    foot = [
        f"Minus main's: of the same blocks and the same method; of {FLOOR} minus {label_of(VL)}. {HELD_OUT_INTERVAL}. "
        "Of one seed: over problems alone. Two runs at a time are for their seconds only."
    ]
    return Table("side", "The other runs", columns, rows, foot, digits_of={"A": 0, columns[-1]: 0})


def conditions(records: Records, replaced: Records) -> Table:
    """replaced: those with an accuracy that may be shown."""
    hours = sum(r["seconds"] / r["jobs"] for r in records) / 3600
    others = [r["others_cores"] for r in records if r["others_cores"] is not None]
    load = f"mean {np.mean(others):.2f}, largest {max(others):.2f}; " if others else ""
    rows: list[list[Cell]] = [["hours", f"{hours:.1f}, from {min(r['began'] for r in records)}"]]
    for key in ("commit", "machine", "versions"):
        rows.append([key, "; ".join(sorted({record[key] for record in records}))])
    rows.append(["cores that other programs took", f"{load}measured in {len(others)} of {len(records)} runs"])
    now = {record["name"]: record for record in records}
    again = list[str]()
    for old in replaced:
        if new := now.get(old["name"]):
            before, after = values([old, new], "accuracy")
            other = f" from warm start {old['warm_start']}" if old["warm_start"] != new["warm_start"] else ""
            again.append(f"{old['name']} (accuracy {before:.4f} before{other}, {after:.4f} now)")
    return Table("conditions", "Conditions", ["", ""], [*rows, ["repeated", ", ".join(again) or "none"]])


def draw(main: dict[str, Records], y: Blocks) -> Figure:
    """Effects with their intervals, and the curves of the five methods."""
    shown = {"weighting effect": effects.weighting_effect(y), "scale effect": effects.scale_effect(y)}
    shown |= {f"{label_of(VL)}\n− {label_of(m)}": y[VL] - y[m] for m in METHODS if m != VL}
    steps = np.arange(1, STEPS + 1)
    with use_style():
        import matplotlib.pyplot as plt

        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=(1, 1.2))
        left.fill_betweenx([0.5, 1.5], -effects.MARGIN, effects.MARGIN, color="#EEEEEE")  # at the scale effect
        for place, effect in enumerate(shown.values()):
            estimate = over_blocks(effect)
            left.plot(effect, np.full(len(effect), place), "|", color="#BBBBBB")
            left.plot([estimate.low, estimate.value, estimate.high], [place] * 3, "o-", color=BLUE, markevery=[1])
        left.set(yticks=range(len(shown)), yticklabels=shown, xlabel="difference of mean accuracy, steps 1–60")
        left.invert_yaxis()
        for method, of in main.items():
            curve = trailing_mean(steps, np.mean([r["columns"]["accuracy"] for r in of], axis=0), 5)
            line = ":" if method == "vl_norm:0.75" else method_of(method).line
            right.plot(steps[4:], curve[4:], color=color_of(method), linestyle=line, label=label_of(method))
        right.set(xlabel="step", ylabel="training accuracy, mean of 5 steps")
        right.legend()
    return render(figure, "study", "CPU study", "")


def main(
    records: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Folder of the finished runs.")] = RECORDS,
    page: Annotated[Path, typer.Option(exists=True, help="The page whose results are written.")] = PAGE,
) -> None:
    """Write the results of the study."""
    found, replaced = read_records(records), read_records(records / "replaced")
    names = {part: {(run.name, run.steps, run.warm_start) for run in runs() if run.part == part} for part in PARTS}
    known = {(record["name"], record["steps"], record["warm_start"]) for record in found}
    of_main = main_part(found)
    counts = ", ".join(f"{part} {len(of & known)} of {len(of)}" for part, of in names.items())
    text, tables = f"Finished runs: {counts}.\n", list[Table]()
    if names["main"] <= known:
        y = accuracies(of_main)
        text += "\n![Effects with 95% intervals; accuracy over the steps](study.png)\n"
        files.write(page.with_suffix(".png"), draw(of_main, y).png)
        tables += [tests(y), methods(of_main, y), pairs(of_main, y), warm_starts(of_main, y)]
    else:
        of_main, replaced = {method: [] for method in METHODS}, [r for r in replaced if r["part"] != "main"]
    if known:
        tables += [side_runs(found, of_main), conditions(found, replaced)]
    text = "\n".join([text, *map(to_markdown, tables)])
    before, _, rest = page.read_text().partition(BEGIN)
    files.write(page, f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
    Console(markup=False, highlight=False, soft_wrap=True).print(text)


if __name__ == "__main__":
    typer.run(main)
