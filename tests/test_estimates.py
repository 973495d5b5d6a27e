"""Estimates and their intervals: exact values by enumeration, coverage by simulation.

Covered: Avg@k, Pass@k, single runs, seeds, paired and unpaired differences, strata, rank correlation. Not covered: the
coverage over a grid of settings, which benchmarks/coverage.py measures.

Coverage tests draw CountDown-like data (difficulties of problems Beta distributed, seeds that shift all log-odds) and
allow three Monte-Carlo standard errors around 95%, or a stated band where the interval is conservative.
"""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from scipy.stats import kendalltau

from vlnorm_verl.report import estimates
from vlnorm_verl.report.estimates import Estimate, OtherProblems, Scores, difference, mean, over_seeds, pass_at_k


def of(values: np.ndarray, sizes: tuple[int, ...] | None = None, seeds: tuple[int, ...] | None = None) -> Scores:
    values = np.atleast_2d(values)
    problems = tuple(f"p{i:05d}" for i in range(values.shape[1]))
    return Scores(values, problems, sizes or (values.shape[1],), seeds or tuple(range(len(values))))


def log_odds(generator: np.random.Generator, problems: int, rate: float = 0.5, spread: float = 1.5) -> np.ndarray:
    return logit(np.clip(generator.beta(rate * spread, (1 - rate) * spread, problems), 1e-9, 1 - 1e-9))


def answers(
    generator: np.random.Generator, odds: np.ndarray, seeds: int, of_seed: float = 0.0, n: int = 8
) -> np.ndarray:
    """Correct responses of n, int [S, P]."""
    shifted = odds + generator.normal(0, of_seed, (seeds, 1)) if of_seed else np.tile(odds, (seeds, 1))
    return generator.binomial(n, expit(shifted))


def coverage(truth: float, count: int, draw: Callable[[], Estimate]) -> float:
    """The share of `count` intervals that the truth is in."""
    drawn = [draw() for _ in range(count)]
    return float(np.mean([estimate.low <= truth <= estimate.high for estimate in drawn]))


# ---------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_response(n: int) -> None:
    for correct in range(n + 1):
        responses = [1] * correct + [0] * (n - correct)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(responses, k))
            expected = Fraction(sum(any(subset) for subset in subsets), len(subsets))
            got = pass_at_k(np.array([n]), np.array([correct]), k)[0]
            assert got == pytest.approx(float(expected), abs=1e-12)


def test_pass_at_k_of_many_responses_neither_overflows_nor_loses_digits() -> None:
    assert pass_at_k(np.array([100_000]), np.array([1]), 50_000)[0] == pytest.approx(0.5, rel=1e-9)
    assert pass_at_k(np.array([10_000]), np.array([9_990]), 8)[0] == pytest.approx(1.0)


def test_a_mean_is_that_of_all_problems_and_seeds() -> None:
    assert mean(of(np.array([[0.0, 1.0, 0.5, 0.5], [1.0, 1.0, 0.0, 0.5]]))).value == pytest.approx(4.5 / 8)


# -------------------------------------------------------------------------------------------------------- one seed


def test_one_seed_is_near_the_textbook_interval_of_a_mean_and_says_one_seed() -> None:
    values = np.random.default_rng(0).binomial(8, 0.5, 400) / 8
    found = mean(of(values))
    half = 1.966 * values.std(ddof=1) / 20  # t with 399 degrees of freedom
    assert found.note == "one seed"
    assert found.low == pytest.approx(values.mean() - half, abs=0.08 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.08 * half)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_alike_has_an_exact_interval(value: float) -> None:
    found = mean(of(np.full(30, value)))
    end = 1 - 0.025 ** (1 / 30)
    assert (found.low, found.high) == pytest.approx((0.0, end) if value == 0 else (1 - end, 1.0))


def test_no_interval_rather_than_one_of_width_zero() -> None:
    wrong, same, other = (of(np.tile(score, (2, 30)), seeds=(2, 3)) for score in (0.0, 0.5, 1.0))
    uneven = of(np.tile([0.0, 1.0], (2, 15)))
    unpaired = [difference(of(np.zeros((2, 30))), b) for b in (wrong, same, other)]
    unpaired.append(difference(uneven, of(uneven.values, seeds=(2, 3))))
    alike = [mean(of(values)) for values in (np.full(30, 0.5), np.array([0.5]), np.array([[0.0, 1.0], [1.0, 0.0]]))]
    for found in (*alike, *unpaired):
        assert np.isnan([found.low, found.high]).all()
        assert found.note


def test_intervals_do_not_leave_the_range_of_a_rate() -> None:
    for values in (np.eye(20)[0], 1 - np.eye(20)[0], np.array([[0.0] * 19 + [1.0], [1.0] * 20])):
        found = mean(of(values))
        assert 0 <= found.low < found.value < found.high <= 1


@pytest.mark.parametrize(("problems", "rate"), [(30, 0.15), (128, 0.5)])
def test_coverage_of_one_seed(problems: int, rate: float) -> None:
    generator = np.random.default_rng(1)
    truth = expit(log_odds(generator, 400_000, rate)).mean()
    share = coverage(truth, 300, lambda: mean(of(answers(generator, log_odds(generator, problems, rate), 1) / 8)))
    assert 0.95 - 3 * np.sqrt(0.95 * 0.05 / 300) <= share <= 0.985


def test_coverage_of_pass_at_8() -> None:
    generator = np.random.default_rng(2)
    truth, n = (1 - expit(-log_odds(generator, 400_000)) ** 8).mean(), np.full((1, 128), 8)
    share = coverage(truth, 300, lambda: mean(of(pass_at_k(n, answers(generator, log_odds(generator, 128), 1), 8))))
    assert 0.92 <= share <= 0.99


# ---------------------------------------------------------------------------------------------------- several seeds


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("of_seed", [0.0, 0.3])
def test_coverage_of_several_seeds(seeds: int, of_seed: float) -> None:
    """Over problems and seeds that were not drawn; a little wide where seeds do not differ (S = 2 most)."""
    generator = np.random.default_rng(3)
    truth = expit(log_odds(generator, 400_000, 0.8) + generator.normal(0, of_seed, 400_000)).mean()
    share = coverage(
        truth, 1000, lambda: mean(of(answers(generator, log_odds(generator, 512, 0.8), seeds, of_seed) / 8))
    )
    assert 0.93 <= share <= 0.995


def test_seeds_that_differ_widen_the_interval_and_have_students_t() -> None:
    """Seeds far apart on problems all alike: nothing is left but the t interval of the seeds' means."""
    values = np.tile(np.array([[0.4], [0.5], [0.6]]), (1, 100))
    values += np.tile([0.001, -0.001], (3, 50))
    found = difference(of(values, seeds=(0, 1, 2)), of(np.zeros((3, 100)) + 0.1))
    half = 4.302653 * 0.1 / np.sqrt(3)
    assert (found.low, found.high) == pytest.approx((0.4 - half, 0.4 + half), abs=1e-3)


def test_over_seeds_is_students_interval_cut_to_its_range() -> None:
    found = over_seeds([0.1, 0.2, 0.3], -1, 1)
    assert (found.low, found.high) == pytest.approx((0.2 - 4.302653 * 0.1 / np.sqrt(3), 0.2 + 4.302653 * 0.1 / 3**0.5))
    assert over_seeds([0.9, 0.8], -1, 1).high == 1
    assert np.isnan(over_seeds([0.3]).low)
    assert over_seeds([0.3]).note == "one seed"


# ------------------------------------------------------------------------------------------------------- differences


def test_pairing_takes_the_difficulty_of_problems_out() -> None:
    generator = np.random.default_rng(4)
    odds = log_odds(generator, 200, spread=0.5)
    a, b = (answers(generator, odds + shift, 1) / 8 for shift in (0.5, 0.0))
    paired = difference(of(a), of(b))
    shuffled = difference(of(a), of(generator.permuted(b, axis=1)))
    assert paired.value == pytest.approx(shuffled.value)
    assert paired.high - paired.low < 0.6 * (shuffled.high - shuffled.low)


def test_pairing_takes_out_what_seeds_share() -> None:
    """Seeds whose level differs by far more than the methods do; Student's t of the pairs, or of two samples."""
    level = np.repeat([[0.1], [0.3], [0.5]], 100, axis=1)
    spread = np.tile([0.001, -0.001], (3, 50))
    a, b = of(level + 0.05 + spread), of(level - spread)
    paired, apart = difference(a, b), difference(a, replace(b, seeds=(7, 8, 9)))
    assert paired.value == pytest.approx(0.05)
    assert paired.high - paired.low < 0.01
    assert apart.high - apart.low > 0.6


def test_problems_are_paired_by_identity_not_by_place() -> None:
    generator = np.random.default_rng(5)
    a = of(answers(generator, log_odds(generator, 50), 1) / 8)
    order = np.arange(10, 50)[::-1]
    b = Scores(a.values[:, order], tuple(a.problems[i] for i in order), (40,), a.seeds)
    found = difference(a, b)
    assert found.value == 0
    assert np.isnan(found.low)


def test_a_difference_needs_common_problems_and_sets() -> None:
    a = of(np.array([0.0, 1.0, 0.5]))
    other = Scores(a.values, (a.problems[0], "y", "z"), (3,), (0,))
    with pytest.raises(OtherProblems, match="less than half"):
        difference(a, other)
    with pytest.raises(OtherProblems, match="same validation sets"):
        difference(a, Scores(a.values, a.problems, (2, 1), (0,)))
    found = difference(a, Scores(np.array([[0.5, 0.0, 0.0]]), (*a.problems[:2], "z"), (3,), (0,)))
    assert (found.value, found.note) == (0.25, "one seed; 2 of 3 problems")


def test_a_single_seed_on_either_side_is_named() -> None:
    generator = np.random.default_rng(6)
    odds = log_odds(generator, 64)
    one, three = (of(answers(generator, odds, count) / 8) for count in (1, 3))
    assert difference(one, three).note == "one seed"
    assert difference(three, one).note == "one seed"
    assert difference(three, of(answers(generator, odds, 3) / 8)).note == ""


@pytest.mark.parametrize("same_seeds", [True, False])
def test_coverage_of_a_difference(same_seeds: bool) -> None:
    """Methods with a common difficulty of problems, an interaction with it, and seeds of their own."""
    generator = np.random.default_rng(7)
    odds = log_odds(generator, 400_000)
    noise = [generator.normal(0, scale, 400_000) for scale in (0.3, 0.3, 0.15, 0.15)]

    def draw() -> Estimate:
        base = log_odds(generator, 256)
        a = answers(generator, base + 0.3 + generator.normal(0, 0.3, 256), 3, 0.15) / 8
        b = answers(generator, base + generator.normal(0, 0.3, 256), 3, 0.15) / 8
        return difference(of(a), of(b, seeds=(0, 1, 2) if same_seeds else (7, 8, 9)))

    truth = (expit(odds + 0.3 + noise[0] + noise[2]) - expit(odds + noise[1] + noise[3])).mean()
    assert 0.93 <= coverage(truth, 800, draw) <= 0.99


def test_coverage_of_a_difference_of_one_seed_each() -> None:
    generator = np.random.default_rng(8)
    odds = log_odds(generator, 400_000)

    def draw() -> Estimate:
        base = log_odds(generator, 128)
        return difference(*(of(answers(generator, base + gain, 1) / 8) for gain in (0.4, 0.0)))

    assert 0.92 <= coverage((expit(odds + 0.4) - expit(odds)).mean(), 300, draw) <= 0.98


# ----------------------------------------------------------------------------------------------------------- strata


def test_sets_are_weighted_by_size_and_resampled_within() -> None:
    """Sets that differ only from each other: within each nothing varies, so the interval is almost nothing."""
    values = np.concatenate([np.full(30, 0.1), np.full(500, 0.9)]) + np.tile([0.001, -0.001], 265)
    found = mean(of(values, sizes=(30, 500)))
    assert found.value == pytest.approx((30 * 0.1 + 500 * 0.9) / 530)
    counts = estimates.resampling_counts((30, 500))
    assert (counts[:, :30].sum(1) == 30).all()
    assert (counts[:, 30:].sum(1) == 500).all()
    paired = difference(of(values, sizes=(30, 500)), of(np.full(530, 0.2), sizes=(30, 500)))
    assert paired.high - paired.low < 0.001


def test_resampling_holds_little_more_than_its_table() -> None:
    estimates.resampling_counts.cache_clear()
    tracemalloc.start()
    counts = estimates.resampling_counts((400,))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * counts.nbytes


@pytest.mark.parametrize("seeds", [1, 3])
def test_coverage_of_the_weighted_average(seeds: int) -> None:
    generator, sizes, rates = np.random.default_rng(9), (30, 83, 120), (0.15, 0.4, 0.7)
    truths = [expit(log_odds(generator, 400_000, rate)).mean() for rate in rates]

    def draw() -> Estimate:
        odds = np.concatenate([log_odds(generator, size, rate) for size, rate in zip(sizes, rates, strict=True)])
        return mean(of(answers(generator, odds, seeds) / 8, sizes=sizes))

    assert 0.92 <= coverage(np.average(truths, weights=sizes), 300, draw) <= 0.985


# ------------------------------------------------------------------------------------- other problems in each seed


def test_equal_means_of_two_seeds_do_not_make_an_interval_of_width_zero() -> None:
    tables = [of(np.tile(part, 16)) for part in ([0.0, 1.0], [0.25, 0.75])]
    found = estimates.mean_over_own_problems(tables)
    variance = sum(np.var(table.values, ddof=1) / 32 for table in tables) / 4
    assert found.high - found.low == pytest.approx(2 * 2.0 * variance**0.5, rel=0.05)
    assert np.isnan(over_seeds([0.5, 0.5]).low)


@pytest.mark.parametrize("of_seed", [0.0, 0.3])
def test_coverage_where_each_seed_has_its_own_problems(of_seed: float) -> None:
    generator = np.random.default_rng(12)
    truth = expit(log_odds(generator, 400_000) + generator.normal(0, of_seed, 400_000)).mean()

    def draw() -> Estimate:
        tables = [of(answers(generator, log_odds(generator, 64), 1, of_seed) / 8) for _ in range(3)]
        return estimates.mean_over_own_problems(tables)

    assert 0.93 <= coverage(truth, 600, draw) <= 0.995


# ----------------------------------------------------------------------------------------------------- monotonicity


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=12))
def test_rank_correlation_is_scipys(curve: list[int]) -> None:
    expected = kendalltau(range(len(curve)), curve).statistic
    got = estimates.kendall(np.array([curve], dtype=float) / 8)[0]
    assert got == pytest.approx(expected, nan_ok=True)


def test_rank_correlation_of_a_rising_curve() -> None:
    generator = np.random.default_rng(10)
    odds, steps = log_odds(generator, 128), np.arange(6)
    values = np.array([answers(generator, odds + shift, 1)[0] / 8 for shift in np.linspace(0, 2, 6)])
    found = estimates.rank_correlation(values.mean(1), values, (128,))
    assert found.value == pytest.approx(kendalltau(steps, values.mean(1)).statistic)
    assert found.low < found.value <= found.high <= 1
    assert estimates.rank_correlation(np.full(6, 0.5), np.full((6, 128), 0.5), (128,)).note == "constant"


def test_the_interval_of_a_rank_correlation_is_of_two_standard_deviations() -> None:
    """Those of curves whose problems are drawn anew."""
    generator = np.random.default_rng(13)
    odds = log_odds(generator, 128)
    values = np.array([answers(generator, odds + shift, 1)[0] / 8 for shift in np.linspace(0, 0.4, 6)])
    found = estimates.rank_correlation(values.mean(1), values, (128,))
    curves = (values[:, generator.integers(128, size=128)].mean(1) for _ in range(300))
    drawn = [kendalltau(range(6), curve).statistic for curve in curves]
    assert 1.6 < (found.value - found.low) / np.std(drawn) < 2.4


def test_the_same_input_gives_the_same_interval() -> None:
    values = np.random.default_rng(11).binomial(8, 0.5, 60) / 8
    first = mean(of(values))
    estimates.resampling_counts.cache_clear()
    assert mean(of(values)) == first
