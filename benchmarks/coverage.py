"""How often the report's 95% intervals contain the truth, by simulation.

    python benchmarks/coverage.py [--draws 1000]

Eight responses a problem; problems' log-odds are those of Beta distributed chances (sum of its parameters 1.5); a seed
shifts all log-odds by a normal number of the standard deviation shown; in a difference, each method also shifts every
problem by a normal number of 0.3. "truth" is the mean over 400,000 problems and seeds: the interval is to hold for
problems and seeds that were not drawn. Coverage has a Monte-Carlo error of 0.7 points at 1,000 draws.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer
from origin import line
from rich.console import Console
from rich.table import Table
from scipy.special import expit, logit

from vlnorm_verl.report.estimates import Estimate, Scores, difference, mean, pass_at_k, rank_correlation

N, MANY = 8, 400_000
GENERATOR = np.random.default_rng(0)


def problems(count: int, rate: float) -> np.ndarray:
    return np.asarray(logit(np.clip(GENERATOR.beta(rate * 1.5, (1 - rate) * 1.5, count), 1e-9, 1 - 1e-9)))


def shift(size: int | tuple[int, int], spread: float) -> np.ndarray:
    return np.asarray(GENERATOR.normal(0, spread, size))


def answers(log_odds: np.ndarray, seeds: int, spread: float) -> np.ndarray:
    return np.asarray(GENERATOR.binomial(N, expit(log_odds + shift((seeds, 1), spread))))


def scores(values: np.ndarray, sizes: tuple[int, ...] | None = None) -> Scores:
    names = tuple(str(i) for i in range(values.shape[1]))
    return Scores(values, names, sizes or (len(names),), tuple(range(len(values))))


def single(count: int, seeds: int, rate: float, spread: float) -> Estimate:
    return mean(scores(answers(problems(count, rate), seeds, spread) / N))


def passes(count: int, seeds: int, rate: float, spread: float) -> Estimate:
    correct = answers(problems(count, rate), seeds, spread)
    return mean(scores(pass_at_k(np.full(correct.shape, N), correct, N)))


def gap(count: int, seeds: int, rate: float, spread: float) -> Estimate:
    base = problems(count, rate)
    a, b = (answers(base + up + shift(count, 0.3), seeds, spread) / N for up in (0.3, 0.0))
    return difference(scores(a), scores(b))


SETS = {30: 0.15, 83: 0.4, 500: 0.7, 272: 0.3}  # sizes of the paper's Math sets, rates made up


def weighted(count: int, seeds: int, rate: float, spread: float) -> Estimate:
    log_odds = np.concatenate([problems(size, rate) for size, rate in SETS.items()])
    return mean(scores(answers(log_odds, seeds, spread) / N, tuple(SETS)))


CURVE = np.linspace(0, 0.4, 9)  # log-odds gained over nine validations


def curve(count: int, seeds: int, rate: float, spread: float) -> Estimate:
    log_odds = problems(count, rate)
    values = np.array([answers(log_odds + gain, 1, 0.0)[0] / N for gain in CURVE])
    return rank_correlation(values.mean(1), values, (count,))


def truth_of(kind: str, count: int, rate: float, spread: float) -> float:
    if kind == "monotonicity":  # the mean of what is measured: τ of a curve with the noise of so many problems
        return float(np.mean([curve(count, 1, rate, 0.0).value for _ in range(2000)]))
    if kind == "weighted":
        means = [expit(problems(MANY, rate) + shift(MANY, spread)).mean() for rate in SETS.values()]
        return float(np.average(means, weights=list(SETS)))
    log_odds = problems(MANY, rate)
    if kind == "difference":
        a, b = (expit(log_odds + up + shift(MANY, 0.3) + shift(MANY, spread)) for up in (0.3, 0.0))
        return float((a - b).mean())
    one = expit(log_odds + shift(MANY, spread))
    return float((1 - (1 - one) ** N).mean() if kind == "Pass@8" else one.mean())


KINDS = {"Avg@8": single, "Pass@8": passes, "difference": gap, "weighted": weighted, "monotonicity": curve}


def cases() -> list[tuple[str, int, int, float, float]]:
    """(kind, problems, seeds, rate, spread of seeds)."""
    found = []
    for seeds in (1, 2, 3, 5):
        for spread in (0.0,) if seeds == 1 else (0.0, 0.1, 0.3):
            for kind in ("Avg@8", "Pass@8", "difference"):
                found += [(kind, 30, seeds, rate, spread) for rate in (0.03, 0.15, 0.5)]
                found += [(kind, size, seeds, 0.6, spread) for size in (128, 1024)]
            found.append(("weighted", sum(SETS), seeds, 0.5, spread))
    return found + [("monotonicity", size, 1, 0.5, 0.0) for size in (128, 1024)]


def main(
    draws: Annotated[int, typer.Option(min=10, help="Simulated validations of each row.")] = 1000,
    only: Annotated[str, typer.Option(help=f"One of {', '.join(KINDS)}.")] = "",
) -> None:
    """Simulate the report's intervals: how often they cover the truth, and how wide they are."""
    if only and only not in KINDS:
        raise typer.BadParameter(f"accepted are {', '.join(KINDS)}", param_hint="--only")
    table = Table(
        "interval", "problems", "seeds", "rate", "sd of seeds", "covers", "mean width",
        title=f"{draws} draws, {line()}",
    )  # fmt: skip
    for kind, count, seeds, rate, spread in cases():
        if only and kind != only:
            continue
        truth = truth_of(kind, count, rate, spread)
        found = [KINDS[kind](count, seeds, rate, spread) for _ in range(draws)]
        covers = np.mean([one.low <= truth <= one.high for one in found])
        width = np.nanmean([one.high - one.low for one in found])
        rates = "four" if kind == "weighted" else f"{rate:g}"
        table.add_row(kind, str(count), str(seeds), rates, f"{spread:g}", f"{covers:.3f}", f"{width:.3f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
