"""The lab's tables: which α, exponents, aggregations, and what "unbiased" assumes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vlnorm_verl.lab.aggregations import ALPHAS, COMPARED, LARGE_SHARE, Tradeoff
from vlnorm_verl.lab.analysis import Analysis
from vlnorm_verl.lab.jackknife import LOST
from vlnorm_verl.lab.length_means import PAIRS, THIRDS, Thirds
from vlnorm_verl.methods import label_of
from vlnorm_verl.report.table import Cell, Table

SHOWN_ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)

# A column's heading and its cell, from an analysis and what else the row is of.
Columns = Mapping[str, Callable[..., Cell]]
OF_MODEL: Columns = {"model": lambda a, *_: a.name, "gradients": lambda a, *_: a.gradients}


def tables(analyses: Sequence[Analysis]) -> list[Table]:
    """All tables; one without a row is left out."""
    makers = (summary, slopes, methods, alpha, thirds, growth, noisy)
    return [table for maker in makers if (table := maker(analyses)).rows]


def _table(
    name: str, title: str, columns: Columns, rows_of: Iterable[tuple[Any, ...]], foot: list[str], digits: int = 3
) -> Table:
    columns = {**OF_MODEL, **columns}
    rows = [[cell(*row) for cell in columns.values()] for row in rows_of]
    return Table(name, title, list(columns), rows, foot, digits)


def summary(analyses: Sequence[Analysis]) -> Table:
    def at_best(statistic: str) -> Callable[[Analysis, Tradeoff], Cell]:
        return lambda _, t: getattr(t, statistic)[ALPHAS.index(t.best)] if math.isfinite(t.best) else None

    def best(_: Analysis, t: Tradeoff) -> str:
        return f"{t.best:g} ({t.among[0]:g} to {t.among[1]:g})" if math.isfinite(t.best) else LOST

    return _table(
        "summary",
        "Which α should I use?",
        {
            "β": lambda a, t: a.slope.interval if a.slope else None,
            "mini-batch": lambda a, t: t.responses,
            "best α": best,
            "by alignment": lambda a, t: f"{t.best_aligned:g}" if math.isfinite(t.best_aligned) else LOST,
            "bias²": at_best("bias"),
            "cosine": at_best("cosine"),
            "variance": at_best("variance"),
        },
        [(a, trade) for a in analyses for trade in a.tradeoffs],
        [
            "β: exponent of the variance with real advantages, all selected parameters. Best α: of least mean squared "
            "error for mini-batches of so many responses, and those that the data do not tell from it; by alignment: "
            "see the table on α. bias², cosine, variance: there, in units of the squared norm of the mean gradient; "
            "absent if that is lost in noise. bias² has any shrinkage of the update in it, which Adam removes; the "
            "cosine has not."
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
            "E g_i of a prompt is the mean of its other responses (leave one out). Log–log: least squares of the "
            "logarithms, as the paper's Figure 4 shows them. Of the mean: E d = c L^β, a constant for each prompt, "
            "corrected for the noise of E g_i; this one tells how variances add up, and α = β has the least variance.",
            "Intervals 95%: bootstrap over the responses of these prompts; over prompts: mean of the single prompts' "
            "β, t interval, for the mean β of the task's prompts (a single other prompt varies more).",
            "β is of this checkpoint: it moves during training.",
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
            "M Σx": lambda a, m: m.sum_x,
            "along Dr. GRPO's E G": lambda a, m: m.scale,
            "cosine to Dr. GRPO's": lambda a, m: m.cosine,
            "noise, predicted": lambda a, m: m.noise_predicted,
            "noise, predicted by β": lambda a, m: m.noise_by_beta,
            "noise, measured": lambda a, m: m.noise,
            "CV, predicted": lambda a, m: m.cv_predicted,
            "CV, measured": lambda a, m: m.cv,
            "variance": lambda a, m: m.variance,
            "bias², predicted": lambda a, m: (m.sum_x - 1) ** 2,
            "bias², measured": lambda a, m: m.bias,
        },
        [(a, method) for a in analyses for method in a.methods],
        [
            f"Mini-batches of {drawn} responses drawn from the pool, "
            "with real advantages. G = Σ x_i g_i. M Σx: what the model says of ‖E G‖ over Dr. GRPO's; beside it the "
            "component of E G along Dr. GRPO's, in units of its length, measured.",
            "Noise: standard deviation of G for a given Σx, over that of VL Norm with α = 1. Predicted: closed forms "
            "with variance ∝ L (paper) or ∝ L^β (β of the mean, all selected parameters); they take the lengths as "
            "given, so the variance of Σx itself, which GRPO Norm and DAPO Norm have, is not in them. The closed form "
            "of Dr. GRPO Norm, √(A/H) of the arithmetic and the harmonic mean length, is the whole possible gain only "
            "in this model. vl_norm/effective_responses of the training log is how concentrated the weights are "
            "(Kish), not noise.",
            "CV: √(E‖G − E G‖²)/‖E G‖. ‖E G‖ from products of mini-batches that share no prompt. Variance E‖G − E G‖² "
            "and bias² ‖E G − E G(Dr. GRPO)‖² in units of ‖E G(Dr. GRPO)‖²; predicted: (M Σx − 1)². For GRPO Norm and "
            "DAPO Norm it is mostly another scale, which a learning rate can make up for.",
            "Intervals 95%: jackknife over blocks of prompts.",
        ],
    )


def alpha(analyses: Sequence[Analysis]) -> Table:
    def mark(_: Analysis, t: Tradeoff, at: int) -> str:
        if ALPHAS[at] == t.best:
            return "best"
        return "not told from the best" if t.among[0] <= ALPHAS[at] <= t.among[1] else ""

    return _table(
        "alpha",
        "Which α: bias, variance and mean squared error of VL Norm(α)",
        {
            "mini-batch": lambda a, t, at: t.responses,
            "α": lambda a, t, at: ALPHAS[at],
            "along α = 0": lambda a, t, at: t.scale[at],
            "cosine to α = 0": lambda a, t, at: t.cosine[at],
            "bias²": lambda a, t, at: t.bias[at],
            "variance": lambda a, t, at: t.variance[at],
            "error": lambda a, t, at: t.error[at],
            "alignment": lambda a, t, at: t.alignment[at],
            "": mark,
        },
        [(a, trade, ALPHAS.index(value)) for a in analyses for trade in a.tradeoffs for value in SHOWN_ALPHAS],
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


def thirds(analyses: Sequence[Analysis]) -> Table:
    def floor(_: Analysis, t: Thirds, x: int, y: int) -> str:
        floors = (t.plain[x, x], t.plain[y, y])
        return ", ".join(f"{value:.2f}" for value in floors) if all(map(math.isfinite, floors)) else LOST

    return _table(
        "thirds",
        "What “unbiased” assumes: E[g | L] by thirds of the lengths",
        {
            "lengths' thirds": lambda a, t, x, y: t.where,
            "compared": lambda a, t, x, y: f"{THIRDS[x]} – {THIRDS[y]}",
            "mean length": lambda a, t, x, y: f"{t.length[x]:.0f} – {t.length[y]:.0f}",
            "‖E g‖ of the shorter": lambda a, t, x, y: t.norm[x],
            "of the longer": lambda a, t, x, y: t.norm[y],
            "cosine": lambda a, t, x, y: t.cosine[x, y],
            "plain cosine": lambda a, t, x, y: t.plain[x, y],
            "its floor": floor,
            "difference²": lambda a, t, x, y: t.difference[x, y],
        },
        [(a, third, *pair) for a in analyses for third in a.thirds for pair in PAIRS],
        [
            "The theory takes E[g | L] as the same for all lengths: equal norms, cosine 1, difference² 0.",
            "Norms and cosine without the noise's share (products of different prompts, or of different responses); a "
            "cosine above 1 is noise. Plain cosine: of the means of two disjoint halves of the data. Its floor: the "
            "plain cosine of each of the two thirds with itself, which noise alone keeps below 1.",
            "difference²: squared norm of the difference of the two means over the mean of their squared norms; an "
            "interval above 0 says that E[g | L] depends on the length. Intervals 95%: jackknife.",
        ],
    )


def growth(analyses: Sequence[Analysis]) -> Table:
    return _table(
        "growth",
        "‖E G‖ on prompts with short, middle and long responses",
        {
            "aggregation": lambda a, mode, g: label_of(mode),
            "mean length": lambda a, mode, g: f"{g.length:.0f}",
            "M Σx (predicted)": lambda a, mode, g: g.predicted[mode],
            "‖E G‖, measured": lambda a, mode, g: g.norm[mode],
            "along Dr. GRPO's": lambda a, mode, g: g.along[mode],
        },
        [(a, mode, third) for a in analyses for mode in COMPARED for third in a.growth],
        [
            "In units of Dr. GRPO Norm's ‖E G‖ over the whole pool. Predicted: what the weights do if E g is the same "
            "for all prompts and lengths: GRPO Norm and DAPO Norm make the update smaller as responses grow. Along: "
            "component along Dr. GRPO's E G of the same prompts, in units of its length, so 1 for Dr. GRPO by "
            "definition."
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
