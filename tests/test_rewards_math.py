r"""The Math reward: verdicts, limits, failing workers, hostile text, verl's loader and reward manager.

Covered: every outcome class, by real worker processes; hanging answers, memory bombs; workers that are killed, stopped,
crashed, broken, recycled or orphaned, and that none of these becomes a score; threads; hostile responses (10,000 with
``-m slow``); verl's loader and reward manager in an event loop off the main thread. Not covered: which texts are equal
(`tests/test_math_answers.py`); a training run; what verl's trainer makes of an `InfrastructureError`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import hostile
from tests.test_rewards_countdown import run_manager
from vlnorm_verl.tasks import math as reward
from vlnorm_verl.tasks.latex import pool as worker_pool
from vlnorm_verl.tasks.latex.pool import InfrastructureError, Pool
from vlnorm_verl.tasks.math import MAX_ANSWER_LENGTH, OUTCOMES, compute_score, extract_boxed, judge, parse_ground_truth

HANGS = "9^{9^{9^{9}}}"  # one operation in C: no signal handler of Python's interrupts it
BOMB = "2^{8000000000}"  # an integer of 1 GB
START_S = 60.0  # a worker needs one second, or many on a crowded machine


def boxed(answer: str) -> str:
    return rf"So it is \boxed{{{answer}}}."


def workers() -> list[psutil.Process]:
    """The living worker processes of this one."""
    found = []
    for child in psutil.Process().children():
        try:
            if child.status() != psutil.STATUS_ZOMBIE and "latex/worker.py" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def is_ready(worker: psutil.Process) -> bool:
    # It closes its standard error for good when it is ready.
    return os.readlink(f"/proc/{worker.pid}/fd/2") == os.devnull


def workers_of(pool: Pool) -> list[int]:
    return [w.process.pid for w in pool._slots.queue if w is not None]


@pytest.fixture(scope="module")
def one_worker() -> Iterator[Pool]:
    pool = Pool(limit_s=20, workers=1)
    yield pool
    pool.close()


@pytest.fixture
def pool(one_worker: Pool) -> Pool:
    """One for all tests that need no settings of their own; its worker runs, and no attempt has failed."""
    assert one_worker.compare("1", "1") == "correct"
    one_worker._failed.clear()
    return one_worker


@pytest.fixture
def new_pool() -> Iterator[Callable[..., Pool]]:
    pools: list[Pool] = []

    def make(**settings: Any) -> Pool:
        pools.append(Pool(**settings))
        return pools[-1]

    before = {w.pid for w in workers()}
    yield make
    for pool in pools:
        pool.close()
    assert {w.pid for w in workers()} <= before, "a closed pool leaves no worker behind"


# --- verdicts -----------------------------------------------------------------------------------------------

VERDICTS = [
    (r"\frac{1}{2}", "0.5", "correct"),
    ("5", "5\\$", "correct"),
    ("6", "7", "wrong"),
    (r"\text{east}", "west", "wrong"),
    ("42", r"41 \implies 42", "unparsable"),
    ("))((", "7", "gold_unparsed"),
    ("))((", "))((", "correct"),
    (r"41 \implies 42", r"41 \implies  42", "correct"),
]


@pytest.mark.parametrize(("gold", "answer", "outcome"), VERDICTS)
def test_verdicts(pool: Pool, gold: str, answer: str, outcome: str) -> None:
    assert judge(boxed(answer), gold, pool) == outcome
    assert pool.compare(gold, answer) == outcome


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1}", "1"),
        (r"\boxed{1} then \boxed{2}.", "2"),
        (r"\boxed{ $\frac{1}{2}$ }", r"\frac{1}{2}"),
        (r"\boxed {3}", "3"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{a\}b}", r"a\}b"),
        (r"\boxed{a\\}", r"a\\"),
        (r"\boxed{1} and \boxed{2", None),
        (r"\boxed{1} in a \boxed", "1"),
        (r"\boxed{}", ""),
        (r"\boxed{\boxed{4}}", "4"),
        ("boxed{1}", None),
        ("", None),
        (rf"\boxed{{{'1' * MAX_ANSWER_LENGTH}}}", "1" * MAX_ANSWER_LENGTH),
        (rf"\boxed{{{'1' * (MAX_ANSWER_LENGTH + 1)}}}", None),
    ],
)
def test_which_box_counts(text: str, answer: str | None) -> None:
    assert extract_boxed(text) == answer


@given(st.text(alphabet="a{}\\ ", max_size=30))
def test_a_box_closes_where_its_braces_balance(inside: str) -> None:
    found = extract_boxed(r"\boxed{" + inside + "}")
    if found is not None:
        plain = found.replace("\\\\", "").replace("\\{", "").replace("\\}", "")
        assert plain.count("{") == plain.count("}")


@pytest.mark.parametrize("unit", [r"\boxed{", r"\boxed", r"\boxed    ", r"\boxed{1}", "{", "\\", " ", "$"])
def test_finding_the_box_takes_linear_time(unit: str) -> None:
    start = time.thread_time()
    extract_boxed(r"\boxed{" + unit * 100_000)
    assert time.thread_time() - start < 5


@pytest.mark.parametrize("text", ["no box", r"\boxed{$ $}"])
def test_without_a_box_no_worker_is_asked(text: str) -> None:
    class Untouchable(Pool):
        def compare(self, gold: str, answer: str) -> str:
            raise AssertionError("a worker was asked")

    assert judge(text, "4", Untouchable()) == "unparsable"
    assert judge(boxed("$4$"), "4", Untouchable()) == "correct"


@pytest.mark.parametrize(("value", "gold"), [("42", "42"), (" $42$ ", "42"), (r"so \boxed{42}", "42"), ("a b", "a b")])
def test_ground_truths(value: str, gold: str) -> None:
    assert parse_ground_truth(value) == gold


def test_white_space_inside_a_long_right_answer_costs_no_more_than_its_length() -> None:
    """It is read in the process of the rewards, outside of the workers' limits: quadratic, this would take minutes."""
    gold = "1" + " " * 300_000 + "x"
    assert parse_ground_truth(f"$ {gold} $ ") == gold
    assert parse_ground_truth(r" 5\$ $") == r"5\$"


@pytest.mark.parametrize("value", ["", "  ", "$$", None, 42, ["42"], {"answer": "42"}])
def test_bad_ground_truths_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"reward_model\.ground_truth must be"):
        compute_score("any", boxed("42"), value)


def test_score_follows_the_outcome() -> None:
    results = [compute_score("any", boxed(a), "0.5", {}, reward_router_address=None) for a in ("1/2", "1/3", "((")]
    assert results == [
        {"score": 1.0, "acc": 1.0, "outcome": "correct", "validation_set": "any"},
        {"score": 0.0, "acc": 0.0, "outcome": "wrong", "validation_set": "any"},
        {"score": 0.0, "acc": 0.0, "outcome": "unparsable", "validation_set": "any"},
    ]


@pytest.mark.parametrize("setting", ["limit_s", "workers", "memory_mib"])
def test_a_setting_that_makes_no_sense_is_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting} must be above 0"):
        compute_score("any", boxed("1"), "2", **{setting: 0})


# --- limits -------------------------------------------------------------------------------------------------


def test_a_hanging_answer_is_a_timeout_and_its_worker_dies(new_pool: Callable[..., Pool]) -> None:
    pool = new_pool(limit_s=1, workers=1)
    assert pool.compare("1", "1") == "correct"
    (worker,) = workers_of(pool)
    start = time.monotonic()
    assert pool.compare("1", HANGS) == "timeout"
    assert 0.9 < time.monotonic() - start < 4
    assert not psutil.pid_exists(worker)
    assert pool.compare("0.5", "1/2") == "correct"
    assert not any(pool._failed)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [("2^{2^{2019}}", "2^{2^{2019}}."), ("2^{2^{2019}}", "2^{ 2^{2019}}"), (HANGS, r"9^{9^{9^{9}}} \,")],
)
def test_the_same_text_is_correct_without_being_evaluated(pool: Pool, gold: str, answer: str) -> None:
    assert pool.compare(gold, answer) == "correct"


def test_memory_is_bounded(new_pool: Callable[..., Pool]) -> None:
    """The integer does not fit: the answer is given up at once instead of filling the memory until the time is over."""
    pool = new_pool(limit_s=60, workers=1, memory_mib=200)
    assert pool.compare("1", "1") == "correct"
    before = workers_of(pool)
    peaks: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            for pid in before:
                try:
                    peaks.append(psutil.Process(pid).memory_info().rss)
                except psutil.Error:
                    return

    watcher = threading.Thread(target=watch)
    watcher.start()
    outcome = pool.compare("1", BOMB)
    done.set()
    watcher.join()
    assert outcome in ("wrong", "unparsable", "crash")
    assert max(peaks) < 220 * 2**20
    assert workers_of(pool) == [], "a worker that used so much is replaced"
    assert pool.compare("1", "1") == "correct"


def test_workers_are_recycled(new_pool: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch) -> None:
    """After RECYCLE_AFTER answers and not before, however large this process is (it holds torch)."""
    monkeypatch.setattr(worker_pool, "RECYCLE_AFTER", 3)
    pool = new_pool(limit_s=20, workers=1)
    used = []
    for _ in range(6):
        assert pool.compare("1", "2") == "wrong"
        used.append(workers_of(pool))
    assert used[0] == used[1] != [] == used[2] == used[5]
    assert used[3] == used[4] != used[0]


def test_an_idle_worker_stays(new_pool: Callable[..., Pool]) -> None:
    """The timer that ends an orphan is of an answer, not of the wait for the next one."""
    pool = new_pool(limit_s=1, workers=1)
    assert pool.compare("1", "2") == "wrong"
    before = workers_of(pool)
    time.sleep(2.5)
    assert pool.compare("1", "2") == "wrong"
    assert workers_of(pool) == before


def test_a_worker_maps_no_locales(pool: Pool) -> None:
    """Where all are installed, they take half of its address space: it would be replaced after each answer."""
    assert psutil.Process(workers_of(pool)[0]).environ()["LC_ALL"] == "C"


# --- failures -----------------------------------------------------------------------------------------------


def during_each_answer(act: Callable[[psutil.Process], None], times: int) -> threading.Thread:
    """Do something to the next workers that start, so many of them, each once it computes."""
    seen = {worker.pid for worker in workers()}
    enough = len(seen) + times

    def run() -> None:
        while len(seen) < enough:
            for worker in workers():
                try:
                    if worker.pid not in seen and is_ready(worker):
                        time.sleep(0.3)  # the answer is on its way to it
                        act(worker)
                        seen.add(worker.pid)
                except (OSError, psutil.Error):
                    continue
            time.sleep(0.01)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def joined(thread: threading.Thread) -> bool:
    thread.join(10)
    return not thread.is_alive()


def test_an_answer_whose_worker_is_killed_is_compared_again(new_pool: Callable[..., Pool]) -> None:
    pool = new_pool(limit_s=2, workers=1)
    killer = during_each_answer(psutil.Process.kill, times=1)
    assert pool.compare("1", HANGS) == "timeout"
    assert joined(killer)
    assert list(pool._failed) == [True, False]


def test_an_idle_worker_that_was_killed_is_replaced(pool: Pool) -> None:
    os.kill(workers_of(pool)[0], signal.SIGKILL)
    assert pool.compare("0.5", "1/2") == "correct"
    assert list(pool._failed) == [True, False]


def test_a_stalled_machine_is_not_the_answers_fault(new_pool: Callable[..., Pool]) -> None:
    """A stopped worker stands for a machine that swaps or was suspended: over the limit, without the CPU."""
    pool = new_pool(limit_s=2, workers=1)
    assert pool.compare("1", "1") == "correct"
    os.kill(workers_of(pool)[0], signal.SIGSTOP)
    assert pool.compare("0.5", "1/2") == "correct"
    assert list(pool._failed) == [False, True, False]


def test_an_answer_that_crashes_two_workers_is_a_crash(new_pool: Callable[..., Pool]) -> None:
    pool = new_pool(limit_s=20, workers=1)
    crasher = during_each_answer(lambda worker: worker.send_signal(signal.SIGSEGV), times=2)
    assert pool.compare("1", HANGS) == "crash"
    assert joined(crasher)
    assert not any(pool._failed), "it is the answer's fault"


def test_three_failures_on_one_answer_are_no_score(new_pool: Callable[..., Pool]) -> None:
    pool = new_pool(limit_s=20, workers=1)
    killer = during_each_answer(psutil.Process.kill, times=3)
    with pytest.raises(InfrastructureError, match=r"3 attempts: a worker died with exit code -9; "):
        pool.compare("1", HANGS)
    assert joined(killer)
    assert pool.compare("1", "1") == "correct"


def test_a_failure_rate_above_the_set_one_is_an_error(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "max_failure_rate", 0.015)
    for _ in range(100):
        assert pool.compare("1", "1") == "correct"
    os.kill(workers_of(pool)[0], signal.SIGKILL)
    assert pool.compare("1", "1") == "correct"
    os.kill(workers_of(pool)[0], signal.SIGKILL)
    with pytest.raises(InfrastructureError, match=r"2 of the last 104 attempts .* max_failure_rate=0\.015"):
        pool.compare("1", "1")


def test_too_little_memory_is_an_error_with_the_remedy(new_pool: Callable[..., Pool]) -> None:
    with pytest.raises(InfrastructureError, match=r"MemoryError: ; memory_mib=48 is too little"):
        new_pool(memory_mib=48).compare("1", "2")


def test_a_broken_sympy_is_an_error_with_the_remedy(
    new_pool: Callable[..., Pool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sympy.py").write_text("raise ImportError('broken on purpose')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(InfrastructureError, match=r"broken on purpose; it needs sympy: pip install"):
        new_pool().compare("1", "2")
    # In verl too: the reward manager does not swallow it.
    override = "reward.custom_reward_function.path=pkg://vlnorm_verl.tasks.math"
    with pytest.raises(InfrastructureError, match="broken on purpose"):
        run_manager("naive", [override, "+reward.custom_reward_function.reward_kwargs.limit_s=19"], [(boxed("1"), "2")])


def test_workers_that_cannot_start_are_an_error(new_pool: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(InfrastructureError, match="cannot start a worker"):
        new_pool().compare("1", "2")


ORPHAN = """
import sys
from vlnorm_verl.tasks.latex.pool import Pool
pool = Pool(limit_s=float(sys.argv[2]), memory_mib=4096)
pool.compare("1", sys.argv[1])
sys.stdin.read()
"""


@pytest.mark.parametrize(("answer", "limit_s"), [("2", 1000), (HANGS, 1)])
def test_workers_die_with_their_parent(answer: str, limit_s: int) -> None:
    """Idle (long before any limit) or in the middle of an answer, even if the parent is killed by a signal that it
    cannot handle."""
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN, answer, str(limit_s)], stdin=subprocess.PIPE)
    children: list[psutil.Process] = []
    end = time.monotonic() + START_S
    try:
        while not children and time.monotonic() < end:
            children = [child for child in psutil.Process(parent.pid).children() if is_ready(child)]
            time.sleep(0.02)
        time.sleep(0.3)  # the answer is on its way to it
    finally:
        parent.kill()
        parent.communicate()
    gone, alive = psutil.wait_procs(children, timeout=60)
    assert gone
    assert not alive


# --- threads ------------------------------------------------------------------------------------------------


def test_threads_get_their_own_verdicts(new_pool: Callable[..., Pool]) -> None:
    pool = new_pool(limit_s=20, workers=2)
    with ThreadPoolExecutor(16) as threads:
        cases = [(str(i % 7), str(i % 5)) for i in range(200)]
        outcomes = list(threads.map(lambda case: pool.compare(*case), cases))
    assert outcomes == ["correct" if gold == answer else "wrong" for gold, answer in cases]
    assert len(workers_of(pool)) == 2


def test_a_forked_process_has_workers_of_its_own() -> None:
    assert compute_score("any", boxed("1"), "2", limit_s=18)["outcome"] == "wrong"
    if not (child := os.fork()):
        os._exit(len(reward._pools))
    assert os.waitpid(child, 0)[1] == 0
    assert compute_score("any", boxed("1"), "1.0", limit_s=18)["outcome"] == "correct"


def test_one_thread_starts_one_worker(new_pool: Callable[..., Pool]) -> None:
    pool = new_pool(limit_s=20, workers=8)
    for answer in ("1", "2", "3"):
        pool.compare("4", answer)
    assert len(workers_of(pool)) == 1


def test_a_worker_imports_nothing_heavy() -> None:
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1])['load'](); "
        "print(sorted({'torch', 'verl', 'ray', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(Path(reward.__file__).with_name("latex") / "worker.py")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


# --- hostile text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "limit_s"), [(100, 1.0), pytest.param(10_000, 0.5, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]
)
def test_hostile_responses(new_pool: Callable[..., Pool], count: int, limit_s: float) -> None:
    # On a crowded machine a worker can be stalled for so short a limit: that is seen and tried again, at any rate.
    pool = new_pool(limit_s=limit_s, workers=2, max_failure_rate=1)

    def timed(response: str) -> tuple[str, float]:
        start = time.monotonic()
        outcome = judge(response, "7", pool)
        return outcome, time.monotonic() - start

    with ThreadPoolExecutor(2) as executor:
        results = list(executor.map(timed, hostile.responses(count, 1, r"\boxed{", "}", hostile.MATHS)))
    outcomes = Counter(outcome for outcome, _ in results)
    assert set(outcomes) <= set(OUTCOMES)
    assert {"wrong", "unparsable", "timeout"} <= set(outcomes), outcomes
    assert outcomes["gold_unparsed"] == 0
    # The limit is on the answer; a new worker's start comes before it.
    assert max(seconds for _, seconds in results) < 3 * (limit_s + 10)


# --- verl ---------------------------------------------------------------------------------------------------


def test_verl_scores_with_it() -> None:
    path = "reward.custom_reward_function.path=pkg://vlnorm_verl.tasks.math"
    kwargs = "+reward.custom_reward_function.reward_kwargs"
    samples = [(boxed("1/2"), "0.5"), (boxed("1/3"), "0.5"), (boxed(HANGS), "0.5"), ("none", "0.5")] * 3
    results = run_manager("dapo", [path, f"{kwargs}.limit_s=1", f"{kwargs}.workers=2"], samples)
    assert [r["reward_score"] for r in results] == [1.0, 0.0, 0.0, 0.0] * 3
    outcomes = [r["reward_extra_info"]["outcome"] for r in results]
    assert outcomes == ["correct", "wrong", "timeout", "unparsable"] * 3
    (pool,) = [p for p in reward._pools.values() if p.limit_s == 1]
    assert len(workers_of(pool)) <= 2
    pool.close()
