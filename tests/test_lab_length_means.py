"""E[g | length] on gradients whose law is known: thirds that do and do not differ."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.lab_laws import holds, pool_of, rate, turning
from vlnorm_verl.lab.gram import Responses
from vlnorm_verl.lab.length_means import thirds


def test_thirds_of_one_mean_do_not_differ() -> None:
    rng = np.random.default_rng(41)
    held, cosines = [], []
    for _ in range(20):
        found = thirds(pool_of(rng, prompts=32))
        assert found is not None
        held.append(holds(found.difference[0, 2], 0.0))
        cosines.append(found.cosine[0, 2].value)
    assert rate(held) >= 0.8
    assert abs(np.mean(cosines) - 1.0) < 0.1


def test_thirds_that_differ_are_seen_to() -> None:
    found = thirds(pool_of(np.random.default_rng(42), prompts=96, mean=turning))
    assert found is not None
    assert found.length[0] < found.length[1] < found.length[2]
    assert found.difference[0, 2].low > 0
    assert found.cosine[0, 2].value < found.cosine[0, 1].value
    middle = turning(np.array([math.exp((math.log(10) + math.log(400)) / 2)]))[0]
    assert found.norm[1].value == pytest.approx(np.linalg.norm(middle), rel=0.3)


@pytest.mark.parametrize(("bound", "share"), [(np.minimum, 0.5), (np.minimum, 0.2), (np.maximum, 0.7)])
def test_where_many_responses_have_one_length_each_third_has_a_length_of_its_own(bound: np.ufunc, share: float) -> None:
    pool = pool_of(np.random.default_rng(44), prompts=24)
    piled = Responses(pool.prompts, bound(pool.lengths, int(np.quantile(pool.lengths, share))), pool.products)
    found = thirds(piled)
    assert found is not None
    assert found.length[0] < found.length[1] < found.length[2]
    assert (found.length[2] == piled.lengths.max()) == (bound is np.minimum)
    assert (found.length[0] == piled.lengths.min()) == (bound is np.maximum)


def test_thirds_need_lengths_that_differ() -> None:
    pool = pool_of(np.random.default_rng(43), prompts=8)
    same = Responses(pool.prompts, np.full_like(pool.lengths, 20), pool.products)
    assert thirds(same) is None
