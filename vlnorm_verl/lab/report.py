"""What the lab found, as tables, figures, a page and sentences: `vlnorm-verl lab report`.

    lab.html                  everything on one page, without a network
    tables/, figures/         Markdown, CSV, JSON, LaTeX; PNG and SVG

Covered: several models (checkpoints of one run) and several choices of parameters side by side. Not covered: what the
numbers are (analysis.py) and how files look (vlnorm_verl/report/writers.py, style.py, page.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from vlnorm_verl.files import UserError
from vlnorm_verl.lab import store
from vlnorm_verl.lab.analysis import COMPARED, LOST, PAIRS, THIRDS, Analysis, Tradeoff, analyse
from vlnorm_verl.methods import label_of
from vlnorm_verl.report.estimates import Estimate
from vlnorm_verl.report.page import write_page
from vlnorm_verl.report.style import Figure, write_figures
from vlnorm_verl.report.table import Cell, Table
from vlnorm_verl.report.writers import print_table, write_tables

GRADIENTS = "gradients"  # the folder in a lab's folder that has one folder for each choice of parameters
SHOWN_ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


def build(
    folders: Sequence[str], out: Path, mini_batch: int, seed: int, console: Console | None = None
) -> list[Analysis]:
    """Analyse the folders of `vlnorm-verl lab run`, and write and print what was found.

    Args:
        folders: paths, or NAME=PATH to show a folder by another name than its own.
        out: where to write.
        mini_batch: responses of the optimizer mini-batch for which an α is wanted.
        seed: of the mini-batches that are drawn and of the bootstrap.

    Raises:
        UserError: a folder without gradients, two of one name, or too few responses to say anything.
    """
    from vlnorm_verl.lab.figures import figures

    console = console or Console()
    if mini_batch < 1:
        raise UserError(f"--mini-batch {mini_batch}: must be 1 or more responses")
    found = []
    with console.status("inner products and resampling …") as status:
        for name, folder in named(folders).items():
            for gradients in choices(folder):
                if missing := store.missing_gradients(folder, f"{GRADIENTS}/{gradients}"):
                    console.print(
                        f"{name}: {gradients} left out, {missing} prompts have no gradients yet", markup=False
                    )
                    continue
                status.update(f"{name}: gradients of {gradients} …")
                found.append(analyse(store.load(folder, f"{GRADIENTS}/{gradients}"), name, gradients, mini_batch, seed))
    if not found:
        raise UserError("no complete gradients; `vlnorm-verl lab run` goes on where it stopped")
    made = tables(found)
    drawn = figures(found)
    verdicts = [verdict(one) for one in of_most_parameters(found)]
    write_tables(made, out / "tables")
    write_figures(drawn, out / "figures")
    by_name = {figure.name: figure for figure in drawn}
    parts: list[Table | Figure | str] = []
    for heading, names in SECTIONS.items():
        inside = [figure for name, figure in by_name.items() if name.startswith(tuple(names))]
        tables_inside = [table for table in made if table.name in names]
        if inside or tables_inside:
            parts += [heading, *inside, *tables_inside]
    write_page(out / "lab.html", "The gradient lab", [*verdicts, *map(described, found)], parts)
    print_table(made[0], console)
    for text in verdicts:
        console.print(text, markup=False, highlight=False)
    console.print(f"{out / 'lab.html'}", markup=False, highlight=False)
    return found


# Names of tables and beginnings of names of figures by the page's headings.
SECTIONS = {
    "In short": ["overview", "summary"],
    "How variance grows with length": ["slopes", "deviations"],
    "Aggregations: noise and bias, predicted and measured": ["methods"],
    "Which α": ["alpha"],
    "What “unbiased” assumes": ["thirds"],
    "The mean gradient as lengths grow": ["growth"],
}


def named(folders: Sequence[str]) -> dict[str, Path]:
    """{name: folder}.

    Raises:
        UserError: a folder that is not there, or a name that stands for two.
    """
    result: dict[str, Path] = {}
    for text in folders:
        name, equals, path = text.partition("=")
        folder = Path(path if equals else text)
        name = name if equals else folder.name
        if not (folder / store.ROLLOUTS).exists():
            raise UserError(f"{folder} is no folder of `vlnorm-verl lab run`: it has no {store.ROLLOUTS}")
        if name in result:
            raise UserError(
                f"{name!r} names both {result[name]} and {folder}: give one another name with NAME={folder}"
            )
        result[name] = folder
    return result


def choices(folder: Path) -> list[str]:
    """The choices of parameters whose gradients are in a lab's folder."""
    found = sorted(path.parent.name for path in (folder / GRADIENTS).glob(f"*/{store.SETTINGS}"))
    if not found:
        raise UserError(f"{folder} has no gradients; `vlnorm-verl lab run` computes them, and goes on where it stopped")
    return found


def of_most_parameters(found: Sequence[Analysis]) -> list[Analysis]:
    """Of each model, what the most parameters say: the update is of all of them."""
    best: dict[str, Analysis] = {}
    for one in found:
        if one.name not in best or one.entries > best[one.name].entries:
            best[one.name] = one
    return list(best.values())


# ---------------------------------------------------------------------------------------------------------- sentences


def described(one: Analysis) -> str:
    """What was sampled and computed."""
    sketch = f", projected to {one.columns:,}" if one.columns < one.entries else ""
    return (
        f"{one.name}, {one.gradients} ({one.entries:,} parameters{sketch}): {one.deep[0]} prompts with {one.deep[1]} "
        f"responses each and {one.prompts} with {len(one.lengths) // one.prompts}, of which {one.speaking} have "
        f"rewards that differ; task {one.settings['task']}, "
        f"temperature {one.settings['temperature']:g}, seed {one.settings['seed']}. Responses of the pool: mean reward "
        f"{one.reward:.3f}, length {one.lengths.mean():.0f} on average (harmonic {harmonic(one):.0f}), "
        f"{one.lengths.min()} to {one.lengths.max()} tokens, {one.truncated:.1%} cut."
    )


def harmonic(one: Analysis) -> float:
    return float(len(one.lengths) / (1 / one.lengths).sum())


def interval(one: Estimate, digits: int = 2) -> str:
    if not math.isfinite(one.value):
        return f"unknown ({one.note})" if one.note else "unknown"
    if not math.isfinite(one.low):
        return f"{one.value:.{digits}f} (no interval: {one.note})" if one.note else f"{one.value:.{digits}f}"
    return f"{one.value:.{digits}f} [{one.low:.{digits}f}, {one.high:.{digits}f}]"


def verdict(one: Analysis) -> str:
    """Which α to use for this model and task, and how sure that is."""
    wanted = one.tradeoffs[-1]
    begin = f"{one.name} ({one.gradients}): "
    if one.slope and math.isfinite(one.slope.mean.value):
        begin += (
            f"the variance of a response's gradient grows as L^β with β = {interval(one.slope.interval)}. "
            f"If E[g | L] were the same for every length, α = β would have the least variance. "
        )
    if not math.isfinite(wanted.best):
        return (
            begin + "Which α has the least error cannot be said: the mean gradient is lost in noise. Of "
            f"{one.prompts} prompts of the pool {one.speaking} have rewards that differ; more --pool-prompts of that "
            "kind would find it."
        )
    at = wanted.alphas.index(wanted.best)
    sentence = (
        f"For mini-batches of {wanted.responses} responses the mean squared error is least at α = {wanted.best:g}: "
        f"bias² {interval(wanted.bias[at])} and variance {interval(wanted.variance[at])} of the squared norm of the "
        f"mean gradient. Alignment, which no common factor changes, is largest at α = {wanted.best_aligned:g}. "
    )
    return begin + sentence + advice(wanted)


def advice(wanted: Tradeoff) -> str:
    """One recommendation: the paper's α where the data allow it, since it is the tested one; none if α = 0 is as "
    "good."""
    low, high = wanted.among
    if low == 0:
        return (
            f"No recommendation: from α = 0 to {high:g} the data do not tell the errors apart, so they do not show "
            "that any α beats Dr. GRPO Norm (α = 0) here; more --pool-prompts would tell more."
        )
    if low == high:
        return f"Recommended: α = {wanted.best:g}; every other α on the grid has a larger error."
    found = f"From α = {low:g} to {high:g} the data do not tell the errors apart. "
    usual = [alpha for alpha in (1.0, 0.75) if low <= alpha <= high]
    if usual:
        chosen = min(usual, key=lambda alpha: abs(alpha - wanted.best))
        return found + f"Recommended: α = {chosen:g}, the paper's value nearest to the best among those."
    return found + f"Recommended: α = {wanted.best:g}; the paper's 0.75 and 1 have a larger error here."


# ------------------------------------------------------------------------------------------------------------- tables


def tables(found: Sequence[Analysis]) -> list[Table]:
    """All tables; one without a row is left out."""
    made = [summary(found), slopes(found), methods(found), alpha(found), thirds(found), growth(found)]
    return [table for table in made if table.rows]


def summary(found: Sequence[Analysis]) -> Table:
    rows: list[list[Cell]] = []
    for one in found:
        for trade in one.tradeoffs:
            known = math.isfinite(trade.best)
            at = trade.alphas.index(trade.best) if known else 0
            rows.append(
                [
                    one.name,
                    one.gradients,
                    one.slope.interval if one.slope else None,
                    trade.responses,
                    f"{trade.best:g} ({trade.among[0]:g} to {trade.among[1]:g})" if known else LOST,
                    f"{trade.best_aligned:g}" if known else LOST,
                    trade.bias[at] if known else None,
                    trade.variance[at] if known else None,
                ]
            )
    return Table(
        "summary",
        "Which α should I use?",
        ["model", "gradients", "β", "mini-batch", "best α", "by alignment", "bias²", "variance"],
        rows,
        [
            "β: exponent of the variance with real advantages, all selected parameters. Best α: of least mean squared "
            "error for mini-batches of so many responses, and those that the data do not tell from it; by alignment: "
            "see the table on α. bias², variance: there, in units of the squared norm of the mean gradient; absent if "
            "that is lost in noise."
        ],
        digits=2,
    )


def slopes(found: Sequence[Analysis]) -> Table:
    rows: list[list[Cell]] = [
        [
            one.name,
            one.gradients,
            slope.part,
            "score only (A = 1)" if slope.score_only else "advantages",
            slope.log_log,
            slope.mean,
            slope.over_prompts,
            len(slope.points),
        ]
        for one in found
        for slope in one.slopes
    ]
    return Table(
        "slopes",
        "How ‖g_i − E g_i‖² grows with L_i: exponent β",
        ["model", "gradients", "part", "g_i", "β, log–log", "β, of the mean", "β, over prompts", "prompts"],
        rows,
        [
            "E g_i of a prompt is the mean of its other responses (leave one out). Log–log: least squares of the "
            "logarithms, as the paper's Figure 4 shows them. Of the mean: E d = c L^β, a constant for each prompt, "
            "corrected for the noise of E g_i; this one tells how variances add up, and α = β has the least variance.",
            "Intervals 95%: bootstrap over the responses of these prompts; over prompts: mean of the single prompts' "
            "β, t interval, for the mean β of the task's prompts (a single other prompt varies more).",
            "β is of this checkpoint: it moves during training.",
        ],
        digits=2,
    )


def methods(found: Sequence[Analysis]) -> Table:
    rows: list[list[Cell]] = [
        [
            one.name,
            one.gradients,
            label_of(method.mode),
            method.sum_x,
            method.scale,
            method.cosine,
            method.noise_predicted,
            method.noise_by_beta,
            method.noise,
            method.cv_predicted,
            method.cv,
            method.variance,
            (method.sum_x - 1) ** 2,
            method.bias,
        ]
        for one in found
        for method in one.methods
    ]
    return Table(
        "methods",
        "Noise and bias of the aggregated gradient, predicted and measured",
        [
            "model",
            "gradients",
            "aggregation",
            "M Σx",
            "along Dr. GRPO's E G",
            "cosine to Dr. GRPO's",
            "noise, predicted",
            "noise, predicted by β",
            "noise, measured",
            "CV, predicted",
            "CV, measured",
            "variance",
            "bias², predicted",
            "bias², measured",
        ],
        rows,
        [
            f"Mini-batches of {' or '.join(sorted({str(one.drawn) for one in found}))} responses drawn from the pool, "
            "with real advantages. G = Σ x_i g_i. M Σx: what the model says of ‖E G‖ over Dr. GRPO's; beside it the "
            "component of E G along Dr. GRPO's, in units of its length, measured.",
            "Noise: standard deviation of G for a given Σx, over that of VL Norm with α = 1. Predicted: closed forms "
            "with variance ∝ L (paper) or ∝ L^β (β of the mean, all selected parameters); they take the lengths as "
            "given, so the variance of Σx itself, which GRPO Norm and DAPO Norm have, is not in them.",
            "CV: √(E‖G − E G‖²)/‖E G‖. ‖E G‖ from products of mini-batches that share no prompt. Variance E‖G − E G‖² "
            "and bias² ‖E G − E G(Dr. GRPO)‖² in units of ‖E G(Dr. GRPO)‖²; predicted: (M Σx − 1)². For GRPO Norm and "
            "DAPO Norm it is mostly another scale, which a learning rate can make up for.",
            "Intervals 95%: jackknife over blocks of prompts.",
        ],
    )


def alpha(found: Sequence[Analysis]) -> Table:
    rows: list[list[Cell]] = []
    for one in found:
        for trade in one.tradeoffs:
            for value in SHOWN_ALPHAS:
                at = trade.alphas.index(value)
                mark = "best" if value == trade.best else ""
                if not mark and trade.among[0] <= value <= trade.among[1]:
                    mark = "not told from the best"
                rows.append(
                    [
                        one.name,
                        one.gradients,
                        trade.responses,
                        value,
                        trade.scale[at],
                        trade.cosine[at],
                        trade.bias[at],
                        trade.variance[at],
                        trade.error[at],
                        trade.alignment[at],
                        mark,
                    ]
                )
    return Table(
        "alpha",
        "Which α: bias, variance and mean squared error of VL Norm(α)",
        [
            "model",
            "gradients",
            "mini-batch",
            "α",
            "along α = 0",
            "cosine to α = 0",
            "bias²",
            "variance",
            "error",
            "alignment",
            "",
        ],
        rows,
        [
            "In units of ‖E G‖² of Dr. GRPO Norm (α = 0), which is the mean gradient whatever E[g | L] is. error = "
            "bias² + variance. Both are measured on mini-batches drawn from the pool; for another size the variance "
            "is scaled as 1/size, and the bias is taken as it is (VL Norm normalises within a mini-batch, so that of "
            "larger ones is somewhat larger). Along, cosine: of E G and E G(α = 0).",
            "Alignment: E G·E G(α = 0) / √(E‖G‖² ‖E G(α = 0)‖²), at most 1. A factor common to all updates does not "
            "change it, so it is the one to read where updates are normalised; Adam's scaling of each coordinate is "
            "not in any of these numbers.",
            "The grid of α is finer than the table (0.125). Intervals 95%: jackknife over blocks of prompts.",
        ],
    )


def thirds(found: Sequence[Analysis]) -> Table:
    rows: list[list[Cell]] = []
    for one in found:
        for third in one.thirds:
            for a, b in PAIRS:
                rows.append(
                    [
                        one.name,
                        one.gradients,
                        third.where,
                        f"{THIRDS[a]} – {THIRDS[b]}",
                        f"{third.length[a]:.0f} – {third.length[b]:.0f}",
                        third.norm[a],
                        third.norm[b],
                        third.cosine[a, b],
                        third.plain[a, b],
                        f"{third.plain[a, a]:.2f}, {third.plain[b, b]:.2f}",
                        third.difference[a, b],
                    ]
                )
    return Table(
        "thirds",
        "What “unbiased” assumes: E[g | L] by thirds of the lengths",
        [
            "model",
            "gradients",
            "lengths' thirds",
            "compared",
            "mean length",
            "‖E g‖ of the shorter",
            "of the longer",
            "cosine",
            "plain cosine",
            "its floor",
            "difference²",
        ],
        rows,
        [
            "The theory takes E[g | L] as the same for all lengths: equal norms, cosine 1, difference² 0.",
            "Norms and cosine without the noise's share (products of different prompts, or of different responses); a "
            "cosine above 1 is noise. Plain cosine: of the means of two disjoint halves of the data. Its floor: the "
            "plain cosine of each of the two thirds with itself, which noise alone keeps below 1.",
            "difference²: squared norm of the difference of the two means over the mean of their squared norms; an "
            "interval above 0 says that E[g | L] depends on the length. Intervals 95%: jackknife.",
        ],
    )


def growth(found: Sequence[Analysis]) -> Table:
    rows: list[list[Cell]] = [
        [
            one.name,
            one.gradients,
            label_of(mode),
            f"{length:.0f}",
            one.growth.predicted[mode][k],
            one.growth.norm[mode][k],
            one.growth.along[mode][k],
        ]
        for one in found
        if one.growth
        for mode in COMPARED
        for k, length in enumerate(one.growth.length)
    ]
    return Table(
        "growth",
        "‖E G‖ on prompts with short, middle and long responses",
        ["model", "gradients", "aggregation", "mean length", "M Σx (predicted)", "‖E G‖, measured", "along Dr. GRPO's"],
        rows,
        [
            "In units of Dr. GRPO Norm's ‖E G‖ over the whole pool. Predicted: what the weights do if E g is the same "
            "for all prompts and lengths: GRPO Norm and DAPO Norm make the update smaller as responses grow. Along: "
            "component along Dr. GRPO's E G of the same prompts, in units of its length, so 1 for Dr. GRPO by "
            "definition."
        ],
    )
