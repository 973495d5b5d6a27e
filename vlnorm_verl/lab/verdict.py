"""What an analysis says, in sentences: which α to use, and how sure that is."""

from __future__ import annotations

import math

from vlnorm_verl.lab.aggregations import ALPHAS, LARGE_SHARE, Tradeoff
from vlnorm_verl.lab.analysis import Analysis
from vlnorm_verl.report.estimates import Estimate
from vlnorm_verl.report.table import number


def interval(estimate: Estimate) -> str:
    value = number(estimate.value, 2) if math.isfinite(estimate.value) else "unknown"
    if math.isfinite(estimate.low):
        return f"{value} [{number(estimate.low, 2)}, {number(estimate.high, 2)}]"
    reason = estimate.note if value == "unknown" else f"no interval: {estimate.note}"
    return f"{value} ({reason})" if estimate.note else value


def headline(trade: Tradeoff) -> str:
    """The answer in one line."""
    if trade.lost:
        return f"Which α: {trade.lost}"
    low, high = trade.among
    if not math.isfinite(trade.recommended):
        return f"No α is shown to be better than 0 (the data allow 0 to {high:g})"
    allowed = f"{low:g} to {high:g}" if low < high else "no other"
    return f"Use α = {trade.recommended:g} (the data allow {allowed})"


def verdict(analysis: Analysis) -> str:
    """What the answer rests on, and how sure it is."""
    wanted = analysis.tradeoff
    gradients = f"{analysis.gradients}, {analysis.entries:,} parameters"
    said = [f"{analysis.name} ({gradients}), mini-batches of {wanted.responses} responses:"]
    if analysis.slope and math.isfinite(analysis.slope.mean.value):
        said.append(
            f"the variance of a response's gradient grows as L^β with β = {interval(analysis.slope.interval)}; if "
            "E[g | L], and the variance at a given length, were the same for all prompts and lengths, α = β would have "
            "the least variance."
        )
    if wanted.lost:
        said.append(
            "The mean gradient is lost in noise, so which α is aligned best cannot be said: of "
            f"{analysis.prompts} prompts of the pool {analysis.mixed} have rewards that differ."
        )
    else:
        cosine = interval(wanted.cosine[ALPHAS.index(wanted.best)])
        said.append(
            f"The alignment, which no common factor changes, decides: it is largest at α = {wanted.best:g}, where the "
            f"update has the cosine {cosine} to that of α = 0. The mean squared error, which rewards a shorter update, "
            f"is least at α = {wanted.least_error:g}."
        )
    if analysis.noisy:
        said.append(
            f"Single responses have more than {LARGE_SHARE:.0%} of an aggregation's noise, up to "
            f"{max(response.share for response in analysis.noisy):.0%} (see the table): how often such ones occur the "
            "intervals do not know."
        )
    return " ".join(said)
