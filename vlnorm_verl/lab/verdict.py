"""What an analysis says, in sentences: what was sampled, which α to use, and how sure that is."""

from __future__ import annotations

import math

from vlnorm_verl.lab.aggregations import ALPHAS, LARGE_SHARE, Tradeoff
from vlnorm_verl.lab.analysis import Analysis
from vlnorm_verl.report.estimates import Estimate


def described(analysis: Analysis) -> str:
    """What was sampled and computed."""
    projected = f", projected to {analysis.columns:,}" if analysis.columns < analysis.entries else ""
    prompts, responses = analysis.slope_prompts
    lengths, settings = analysis.lengths, analysis.settings
    harmonic = len(lengths) / (1 / lengths).sum()
    return (
        f"{analysis.name}, {analysis.gradients} ({analysis.entries:,} parameters{projected}): {prompts} prompts with "
        f"{responses} responses each and {analysis.prompts} with {len(lengths) // analysis.prompts}, of which "
        f"{analysis.mixed} have rewards that differ; task {settings['task']}, temperature {settings['temperature']:g}, "
        f"seed {settings['seed']}. Responses of the pool: mean reward {analysis.reward:.3f}, length "
        f"{lengths.mean():.0f} on average (harmonic {harmonic:.0f}), {lengths.min()} to "
        f"{lengths.max()} tokens, {analysis.truncated:.1%} cut."
    )


def interval(estimate: Estimate) -> str:
    value = f"{estimate.value:.2f}" if math.isfinite(estimate.value) else "unknown"
    if math.isfinite(estimate.low):
        return f"{value} [{estimate.low:.2f}, {estimate.high:.2f}]"
    reason = estimate.note if value == "unknown" else f"no interval: {estimate.note}"
    return f"{value} ({reason})" if estimate.note else value


def verdict(analysis: Analysis) -> str:
    """Which α to use for this model and task, and how sure that is."""
    wanted = analysis.tradeoffs[-1]
    begin = f"{analysis.name} ({analysis.gradients}): "
    if analysis.slope and math.isfinite(analysis.slope.mean.value):
        begin += (
            f"the variance of a response's gradient grows as L^β with β = {interval(analysis.slope.interval)}. "
            f"If E[g | L] were the same for every length, α = β would have the least variance. "
        )
    if not math.isfinite(wanted.best):
        return (
            f"{begin}Which α has the least error cannot be said: the mean gradient is lost in noise. Of "
            f"{analysis.prompts} prompts of the pool {analysis.mixed} have rewards that differ; more --pool-prompts of "
            f"that kind would find it. {rare(analysis)}"
        ).rstrip()
    at = ALPHAS.index(wanted.best)
    return (
        f"{begin}For mini-batches of {wanted.responses} responses the mean squared error is least at α = "
        f"{wanted.best:g}: bias² {interval(wanted.bias[at])} and variance {interval(wanted.variance[at])} of the "
        "squared norm of the mean gradient. In bias² is also any shrinkage of the update, which Adam removes; not so "
        f"in the cosine to the mean gradient, {interval(wanted.cosine[at])}. Alignment, which no common factor "
        f"changes, is largest at α = {wanted.best_aligned:g}. {rare(analysis)}{advice(wanted)}"
    )


def rare(analysis: Analysis) -> str:
    """A warning where single responses carry much of the noise."""
    if not analysis.noisy:
        return ""
    largest = max(analysis.noisy, key=lambda response: response.share)
    return (
        f"Single responses have more than {LARGE_SHARE:.0%} of an aggregation's noise, up to {largest.share:.0%} (see "
        "the table): how often such ones occur the intervals do not know. "
    )


def advice(wanted: Tradeoff) -> str:
    """One recommendation: the paper's α where the data allow it, since it is tested; none if α = 0 is as good."""
    low, high = wanted.among
    if low == 0:
        return (
            f"No recommendation: from α = 0 to {high:g} the data do not tell the errors apart, so they do not show "
            "that any α beats Dr. GRPO Norm (α = 0) here; more --pool-prompts would tell more."
        )
    if low == high:
        return f"Recommended: α = {wanted.best:g}; every other α on the grid has a larger error."
    range_ = f"From α = {low:g} to {high:g} the data do not tell the errors apart. "
    usual = [alpha for alpha in (1.0, 0.75) if low <= alpha <= high]
    if usual:
        nearest = min(usual, key=lambda alpha: abs(alpha - wanted.best))
        return f"{range_}Recommended: α = {nearest:g}, the paper's value nearest to the best among those."
    return f"{range_}Recommended: α = {wanted.best:g}; the paper's 0.75 and 1 have a larger error here."
