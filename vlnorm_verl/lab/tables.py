"""The lab's tables: which α, exponents, aggregations, and what "unbiased" assumes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vlnorm_verl.lab.aggregations import ALPHAS, LARGE_SHARE, Tradeoff
from vlnorm_verl.lab.analysis import Analysis
from vlnorm_verl.lab.length_means import PAIRS, THIRDS
from vlnorm_verl.methods import label_of
from vlnorm_verl.report.estimates import Estimate
from vlnorm_verl.report.table import Cell, Table

SHOWN_ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)

# A column's heading and its cell, from an analysis and what else the row is of.
Columns = Mapping[str, Callable[..., Cell]]
OF_MODEL: Columns = {"model": lambda a, *_: a.name, "gradients": lambda a, *_: a.gradients}


def tables(analyses: Sequence[Analysis]) -> list[Table]:
    """All tables; one without a row is left out."""
    makers = (summary, slopes, methods, alpha, thirds, noisy, sampled)
    return [table for maker in makers if (table := maker(analyses)).rows]


def _table(
    name: str, title: str, columns: Columns, rows_of: Iterable[tuple[Any, ...]], foot: list[str], digits: int = 3
) -> Table:
    """Rows of one model of which noise has left nothing become a single one, which says so, if there are several."""
    columns = {**OF_MODEL, **columns}
    rows: list[list[Cell]] = []
    made = ([cell(*row) for cell in columns.values()] for row in rows_of)
    for of, group in itertools.groupby(made, lambda cells: cells[: len(OF_MODEL)]):
        of_model = list(group)
        lost = [*map(_lost, of_model)]
        if len(notes := [note for note in lost if note]) < 2:
            rows += of_model
            continue
        rows += [cells for cells, note in zip(of_model, lost, strict=True) if not note]
        rows.append([*of, f"{len(notes)} rows: {notes[0]}", *[None] * (len(columns) - len(of) - 1)])
    return Table(name, title, list(columns), rows, foot, digits)


def _lost(cells: Sequence[Cell]) -> str:
    """What is said of a row of which noise has left no estimate; "" where it has, or where there was none."""
    measured = [cell for cell in cells if isinstance(cell, Estimate)]
    return measured[0].note if measured and all(math.isnan(e.value) for e in measured) else ""


def summary(analyses: Sequence[Analysis]) -> Table:
    def shown(alpha: float, otherwise: str | None = None) -> str | None:
        return f"{alpha:g}" if math.isfinite(alpha) else otherwise

    def at_best(a: Analysis, of: Sequence[Estimate]) -> Estimate | None:
        return None if a.tradeoff.lost else of[ALPHAS.index(a.tradeoff.best)]

    def allowed(a: Analysis) -> str:
        return a.tradeoff.lost or " to ".join(f"{end:g}" for end in dict.fromkeys(a.tradeoff.among))

    return _table(
        "summary",
        "Which α should I use?",
        {
            "recommended": lambda a: shown(a.tradeoff.recommended, "none"),
            "the data allow": allowed,
            "best alignment": lambda a: shown(a.tradeoff.best),
            "least error": lambda a: shown(a.tradeoff.least_error),
            "β": lambda a: a.slope.interval if a.slope else None,
            "cosine": lambda a: at_best(a, a.tradeoff.cosine),
            "bias²": lambda a: at_best(a, a.tradeoff.bias),
            "variance": lambda a: at_best(a, a.tradeoff.variance),
        },
        [(a,) for a in analyses],
        [
            "Of the α whose alignment the data do not tell from the best one: that of the authors' scripts (1 or 0.75) "
            f"nearest to it, for mini-batches of {analyses[0].tradeoff.responses} responses; none where α = 0 is among "
            "them. The least error decides nothing: it rewards a shorter update. β: exponent of the variance, with "
            "real advantages; none where no prompt with many responses has rewards and lengths that differ. Cosine, "
            "bias², variance: at the α of best alignment, as in the table on α."
        ],
        digits=2,
    )


def slopes(analyses: Sequence[Analysis]) -> Table:
    return _table(
        "slopes",
        "How ‖g_i − E g_i‖² grows with L_i: exponent β",
        {
            "part": lambda a, s: s.part,
            "g_i": lambda a, s: "score only (A = 1)" if s.score_only else "advantages",
            "β, log–log": lambda a, s: s.log_log,
            "β, of the mean": lambda a, s: s.mean,
            "β, over prompts": lambda a, s: s.over_prompts,
            "prompts": lambda a, s: len(s.points),
        },
        [(a, slope) for a in analyses for slope in a.slopes],
        [
            "E g_i of a prompt is the mean of its other responses. Log–log: least squares of the logarithms, as the "
            "paper's Figure 4 shows them. Of the mean: E d = c L^β, a constant for each prompt, corrected for the "
            "noise of E g_i; this one tells how variances add up. If E[g | L], and the variance at a given length, "
            "were the same for all prompts and lengths, α = β would have the least variance.",
            "Intervals 95%: bootstrap over the responses of these prompts; over prompts: t interval for the mean β of "
            "the task's prompts (a single other prompt varies more). β moves during training.",
        ],
        digits=2,
    )


def methods(analyses: Sequence[Analysis]) -> Table:
    drawn = " or ".join(sorted({str(a.drawn) for a in analyses}))
    return _table(
        "methods",
        "Noise and bias of the aggregated gradient, predicted and measured",
        {
            "aggregation": lambda a, m: label_of(m.mode),
            "noise, predicted": lambda a, m: m.noise_predicted,
            "noise, predicted by β": lambda a, m: m.noise_by_beta,
            "noise, measured": lambda a, m: m.noise,
            "CV, predicted": lambda a, m: m.cv_predicted,
            "CV, measured": lambda a, m: m.cv,
            "M Σx": lambda a, m: m.sum_x,
            "along Dr. GRPO's E G": lambda a, m: m.scale,
            "cosine to Dr. GRPO's": lambda a, m: m.cosine,
            "bias²": lambda a, m: m.bias,
        },
        [(a, method) for a in analyses for method in a.methods],
        [
            f"Mini-batches of {drawn} responses drawn from the pool, with real advantages. G = Σ x_i g_i. Noise: "
            "standard deviation of G for a given Σx (not for a given signal: that is the CV), over that of VL Norm "
            "with α = 1. Predicted: closed forms with variance ∝ L (paper) or ∝ L^β (β of the mean); they take the "
            "lengths as given, so the variance of Σx itself, which GRPO Norm and DAPO Norm have, is not in them. That "
            "of Dr. GRPO Norm, √(A/H) of the arithmetic and harmonic mean length, is the whole possible gain only in "
            "this model; vl_norm/effective_responses in the training log is the weights' effective sample size (Kish), "
            "not noise.",
            "CV: √(E‖G − E G‖²)/‖E G‖, ‖E G‖ from products of mini-batches that share no prompt. M Σx: what the model "
            "says of ‖E G‖ over Dr. GRPO's; beside it the component of E G along Dr. GRPO's, in units of its length.",
            "bias²: ‖E G − E G(Dr. GRPO)‖² over ‖E G(Dr. GRPO)‖², by the model (M Σx − 1)². For GRPO Norm and DAPO "
            "Norm it is mostly another scale, which a learning rate can make up for. Intervals 95%: jackknife over "
            "blocks of prompts.",
        ],
    )


def alpha(analyses: Sequence[Analysis]) -> Table:
    def mark(t: Tradeoff, at: int) -> str:
        if ALPHAS[at] == t.best:
            return "best alignment"
        return "not told from it" if t.among[0] <= ALPHAS[at] <= t.among[1] else ""

    return _table(
        "alpha",
        "Alignment, bias, variance and mean squared error of VL Norm(α)",
        {
            "α": lambda a, at: f"{ALPHAS[at]:g}",
            "": lambda a, at: mark(a.tradeoff, at),
            "alignment": lambda a, at: a.tradeoff.alignment[at],
            "error": lambda a, at: a.tradeoff.error[at],
            "bias²": lambda a, at: a.tradeoff.bias[at],
            "variance": lambda a, at: a.tradeoff.variance[at],
            "cosine to α = 0": lambda a, at: a.tradeoff.cosine[at],
        },
        [(a, ALPHAS.index(value)) for a in analyses for value in SHOWN_ALPHAS],
        [
            "Alignment: E G·E G(α = 0) / √(E‖G‖² ‖E G(α = 0)‖²), at most 1; E G of α = 0 (Dr. GRPO Norm) is the mean "
            "gradient whatever E[g | L] is. No factor common to all updates changes it: 1 − alignment² is the least "
            "error that any such factor leaves. The cosine is the same for E G alone, without the noise.",
            "Error, bias², variance: in units of ‖E G‖² of α = 0. error = bias² + variance for mini-batches of "
            f"{analyses[0].tradeoff.responses} responses: measured on those drawn from the pool, the variance scaled "
            "as 1/size and the bias taken as it is (VL Norm normalises within a mini-batch, so that of larger ones is "
            "somewhat larger). A shorter update has more bias² and less variance, so that with much noise it has the "
            "smaller error; the learning rate or Adam undo both. Adam's scaling of each coordinate is not in any of "
            "these numbers.",
            "The grid of α is finer than the table (0.125). Intervals 95%: jackknife over blocks of prompts.",
        ],
    )


def thirds(analyses: Sequence[Analysis]) -> Table:
    return _table(
        "thirds",
        "What “unbiased” assumes: E[g | L] by thirds of the lengths",
        {
            "thirds": lambda a, t, x, y: f"{THIRDS[x]} – {THIRDS[y]}",
            "mean length": lambda a, t, x, y: f"{t.length[x]:.0f} – {t.length[y]:.0f}",
            "‖E g‖ of the shorter": lambda a, t, x, y: t.norm[x],
            "of the longer": lambda a, t, x, y: t.norm[y],
            "cosine": lambda a, t, x, y: t.cosine[x, y],
            "difference²": lambda a, t, x, y: t.difference[x, y],
        },
        [(a, a.thirds, *pair) for a in analyses if a.thirds for pair in PAIRS],
        [
            "The theory takes E[g | L] as the same for all lengths: equal norms, cosine 1, difference² 0. All are "
            "without the noise's share (products of different prompts); a cosine above 1 is noise. A reward that "
            "depends on the length is one way for E[g | L] to vary, not the only one.",
            "difference²: squared norm of the difference of the two means over the mean of their squared norms. An "
            "interval above 0 says that E[g | L] depends on the length. Intervals 95%, by a jackknife over prompts.",
        ],
    )


def noisy(analyses: Sequence[Analysis]) -> Table:
    return _table(
        "noisy_responses",
        f"Single responses with more than {LARGE_SHARE:.0%} of an aggregation's noise",
        {
            "aggregation": lambda a, n: label_of(n.mode),
            "prompt": lambda a, n: n.prompt,
            "response": lambda a, n: n.response,
            "tokens": lambda a, n: n.length,
            "reward": lambda a, n: n.reward,
            "share of the noise": lambda a, n: n.share,
        },
        [(a, response) for a in analyses for response in a.noisy],
        [
            "Share of Σ x_i² ‖g_i − mean g‖² over the pool's responses. prompt, response: line of rollouts.jsonl after "
            "the settings and place in it, both from 0. The intervals know the responses that were sampled; how often "
            "one like these occurs (a rare short failure, say) they do not know: sample more to find out."
        ],
    )


def sampled(analyses: Sequence[Analysis]) -> Table:
    return _table(
        "sampled",
        "What was sampled",
        {
            "task": lambda a: a.settings["task"],
            "many responses": lambda a: f"{a.slope_prompts[0]} × {a.slope_prompts[1]}",
            "pool": lambda a: f"{a.prompts} × {len(a.lengths) // a.prompts}",
            "of mixed reward": lambda a: a.mixed,
            "mean reward": lambda a: a.reward,
            "mean length": lambda a: f"{a.lengths.mean():.0f}",
            "harmonic": lambda a: f"{len(a.lengths) / (1 / a.lengths).sum():.0f}",
            "lengths": lambda a: f"{a.lengths.min()} to {a.lengths.max()}",
            "cut": lambda a: f"{a.truncated:.1%}",
            "temperature": lambda a: f"{a.settings['temperature']:g}",
            "seed": lambda a: a.settings["seed"],
            "parameters": lambda a: f"{a.entries:,}",
            "projected to": lambda a: f"{a.columns:,}" if a.columns < a.entries else None,
        },
        [(a,) for a in analyses],
        ["Prompts × responses to each. Mean reward, lengths in tokens and the share that was cut: of the pool."],
    )
