"""The tiny CountDown test bed: task, reward, tokenizer, data files and the shipped weights.

Covered: every trace is parsed and recomputed; the noise rates are as documented; the reward's verdicts, hostile
text included; held-out split; fixed prompt length; tokenizer and chat template; parquet files; determinism;
accuracy and lengths of the shipped weights. Not covered: that the warm start, run in full, reaches them (it takes
minutes; weights/warmstart.json records the run), verl and vLLM on these files (the end-to-end tests do that).
"""

from __future__ import annotations

import itertools
import json
import random
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data_command import rows_of
from vlnorm_verl.runs.config import compose, made_files
from vlnorm_verl.tasks.countdown import Problem, ground_truth, parse_ground_truth
from vlnorm_verl.tasks.tiny import WEIGHTS, boxed, data
from vlnorm_verl.tasks.tiny.countdown import (
    GIVE_UP_PROBABILITY,
    MAX_NUMBER,
    MAX_TARGET,
    MAX_VALUE,
    PROMPT_LENGTH,
    WRONG_RESULT_PROBABILITY,
    Expression,
    compute_score,
    distinct_problems,
    expressions,
    is_held_out,
    judge,
    problems,
    render_prompt,
    search_trace,
)

CONFIG = Path(__file__).parent.parent / "recipes" / "config"
ATTEMPT = re.compile(r"(\d+)([-+*])(\d+)=(\d+)([-+*])(\d+)=(\d+)([!;])")
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}

numbers = st.integers(1, MAX_NUMBER)
triples = st.tuples(numbers, numbers, numbers)
operators = st.sampled_from("+-*")
expression_texts = st.builds(Expression, numbers, operators, numbers, operators, numbers)


def traces(count: int, seed: int = 5) -> list[tuple[Problem, str]]:
    rng = random.Random(seed)
    return [(p, search_trace(p, rng)) for p in itertools.islice(problems(seed, "train"), count)]


def parse(trace: str) -> tuple[list[tuple[Expression, int, int, str]], str]:
    """Attempts as (expression, written middle, written result, mark), and the answer."""
    search, answer = trace.split("A:")
    assert ATTEMPT.sub("", search) == ""
    assert answer[-1] == "."
    attempts = []
    for a, op1, b, middle, op2, c, result, mark in ATTEMPT.findall(search):
        attempts.append((Expression(int(a), op1, int(b), op2, int(c)), int(middle), int(result), mark))
    return attempts, answer[:-1]


# --- task ---------------------------------------------------------------------------------------------------


def test_problems_are_as_documented() -> None:
    for p in itertools.islice(problems(3, "train"), 2000):
        assert all(1 <= n <= MAX_NUMBER for n in p.numbers)
        assert 1 <= p.target <= MAX_TARGET
        assert any(e.value == p.target for e in expressions(p.numbers))


@given(triples)
@settings(max_examples=200)
def test_representatives_cover_every_value_once_per_class(three: tuple[int, int, int]) -> None:
    chosen = expressions(three)
    reachable = set()
    for a, b, c in itertools.permutations(three):
        for op1, op2 in itertools.product("+-*", repeat=2):
            middle = OPERATIONS[op1](a, b)
            value = OPERATIONS[op2](middle, c)
            if 0 <= middle <= MAX_VALUE and 0 <= value <= MAX_VALUE:
                reachable.add(value)
    assert {e.value for e in chosen} == reachable
    assert len(set(chosen)) == len(chosen)
    # Sums and products of all three have one representative each, whatever the order.
    assert sum(e.op1 == e.op2 == "+" for e in chosen) == 1
    assert sum(e.op1 == e.op2 == "*" for e in chosen) <= 1


def test_traces_are_right() -> None:
    for problem, trace in traces(3000):
        attempts, answer = parse(trace)
        assert len({e for e, *_ in attempts}) == len(attempts), "an attempt is repeated"
        for i, (e, middle, result, mark) in enumerate(attempts):
            assert sorted((e.a, e.b, e.c)) == sorted(problem.numbers)
            assert middle == OPERATIONS[e.op1](e.a, e.b)
            true = OPERATIONS[e.op2](middle, e.c)
            assert 0 <= result <= MAX_VALUE
            assert abs(result - true) <= 3
            assert (mark == "!") == (result == problem.target)
            if mark == "!":
                assert true == problem.target, "a claimed hit is false"
                assert i == len(attempts) - 1, "the search goes on after the hit"
                assert answer == str(e)
                assert judge(trace, problem) == "correct"
        if not attempts or attempts[-1][3] == ";":
            tried = {str(e) for e, *_ in attempts}
            assert answer not in tried or len(tried) == len(expressions(problem.numbers))


def test_noise_rates_are_as_documented() -> None:
    decisions = given_up = results = wrong = 0
    for _, trace in traces(6000):
        attempts, _ = parse(trace)
        hit = bool(attempts) and attempts[-1][3] == "!"
        decisions += len(attempts) + (not hit)
        given_up += not hit
        results += len(attempts)
        wrong += sum(e.value != result for e, _, result, _ in attempts)
    # 4 standard deviations; exhausted searches (a slip hid the only solution) are counted as given up: < 0.3%.
    for rate, documented, n in (
        (given_up / decisions, GIVE_UP_PROBABILITY, decisions),
        (wrong / results, WRONG_RESULT_PROBABILITY, results),
    ):
        assert abs(rate - documented) < 4 * (documented * (1 - documented) / n) ** 0.5 + 0.003


def test_trace_lengths_spread() -> None:
    lengths = [len(trace) for _, trace in traces(2000)]
    assert min(lengths) <= 9
    assert max(lengths) > 10 * min(lengths)
    assert max(lengths) <= 256


def test_held_out_split_is_disjoint_in_any_order() -> None:
    def key(p: Problem) -> tuple[tuple[int, ...], int]:
        return tuple(sorted(p.numbers)), p.target

    train = {key(p) for p in itertools.islice(problems(0, "train"), 30_000)}
    test = {key(p) for p in itertools.islice(problems(1, "test"), 3_000)}
    assert train.isdisjoint(test)
    assert len(train) > 2000
    assert len(test) > 300


def test_held_out_split_never_changes() -> None:
    """Frozen verdicts: weights trained under another split would have seen the test problems."""
    held_out = [t for t in range(1, MAX_TARGET + 1) if is_held_out(Problem((3, 7, 12), t))]
    assert held_out == [5, 8, 13, 36, 37, 38, 47]
    assert held_out == [t for t in range(1, MAX_TARGET + 1) if is_held_out(Problem((12, 3, 7), t))]


def test_prompts_have_one_length_and_are_unique() -> None:
    asked = distinct_problems(2000, 0, "train")
    prompts = [render_prompt(p) for p in asked]
    assert {len(p) for p in prompts} == {PROMPT_LENGTH}
    assert len(set(prompts)) == len(prompts)
    assert render_prompt(Problem((7, 3, 12), 18)) == "07,03,12>bp:"


def test_bad_requests_name_the_cause() -> None:
    with pytest.raises(ValueError, match="fewer than 1000000 different problems"):
        distinct_problems(1_000_000, 0, "test")
    with pytest.raises(ValueError, match="must have three numbers"):
        compute_score("any", "A:1+2*3.", '{"numbers": [1, 2], "target": 3}')


# --- reward -------------------------------------------------------------------------------------------------

PROBLEM = Problem((2, 3, 4), 20)


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("A:2+3*4.", "correct"),  # (2 + 3) * 4: left to right
        ("A:2+3*4", "correct"),  # verl decodes without the end mark
        ("4*2=8+3=11;3+2=5*4=20!A:3+2*4.", "correct"),
        ("A:1+1+1.A:2+3*4.", "correct"),  # the last answer counts
        ("A:3*4+2.", "wrong_value"),  # 14
        ("A:5*4+0.", "wrong_numbers"),  # worth the target, but not with these numbers
        ("A:4*4+4.", "wrong_numbers"),
        ("2+3=5*4=20!", "no_answer"),  # cut at the length limit
        ("A:2+3*.", "no_answer"),
        ("A:2+3.", "no_answer"),
        ("A:2+3*4*1.", "no_answer"),
        ("A:2+3*4. ", "no_answer"),
        ("A:2+3*4.\n", "no_answer"),
        ("A:(2+3)*4.", "no_answer"),
        ("A:2+3*4.;", "no_answer"),
        ("a:2+3*4.", "no_answer"),
        ("A:٢+3*4.", "no_answer"),  # a digit, but not one of ours
        ("A:2+3*4.A:", "no_answer"),
        ("A:+2+3*4.", "no_answer"),
        ("A:2+3**4.", "no_answer"),
        ("A:__import__('os').", "no_answer"),
        ("", "no_answer"),
    ],
)
def test_verdicts(text: str, outcome: str) -> None:
    result = compute_score("any", text, ground_truth(PROBLEM), {"index": 0}, reward_router_address=None)
    assert result == {
        "score": float(outcome == "correct"),
        "acc": float(outcome == "correct"),
        "outcome": outcome,
    }


@given(triples, expression_texts, st.text(max_size=40))
def test_reward_equals_an_independent_reading(three: tuple[int, int, int], e: Expression, prefix: str) -> None:
    value = OPERATIONS[e.op2](OPERATIONS[e.op1](e.a, e.b), e.c)
    problem = Problem(three, 20)
    right = sorted((e.a, e.b, e.c)) == sorted(three) and value == 20
    assert compute_score("any", f"{prefix}A:{e}.", ground_truth(problem))["score"] == float(right)
    own = Problem((e.c, e.a, e.b), value)
    assert compute_score("any", f"{prefix}A:{e}.", ground_truth(own))["score"] == 1.0


@given(st.one_of(st.text(), st.text("0123456789+-*=;!A:.", max_size=300)))
def test_hostile_text_never_raises(text: str) -> None:
    result = compute_score("any", text, ground_truth(PROBLEM))
    assert result["outcome"] in ("correct", "wrong_value", "wrong_numbers", "no_answer")
    assert result["score"] == float(result["outcome"] == "correct")


@pytest.mark.parametrize("piece", ["A:", "9", "A:9*9*", "((((", "A:2+3*4.", "\x00", "𝟙+"])
def test_long_text_is_bounded(piece: str) -> None:
    text = piece * (5_000_000 // len(piece))
    started = time.thread_time()
    compute_score("any", text, ground_truth(PROBLEM))
    assert time.thread_time() - started < 0.1


# --- tokenizer and data files -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(WEIGHTS)


def test_tokenizer_is_one_token_per_character(tokenizer) -> None:
    from vlnorm_verl.tasks.tiny.model import EOS, VOCABULARY

    assert len(tokenizer) == len(VOCABULARY)
    assert tokenizer.convert_ids_to_tokens(range(len(VOCABULARY))) == list(VOCABULARY)
    assert tokenizer.pad_token_id == 0
    assert tokenizer.eos_token == EOS
    assert tokenizer.eos_token_id == VOCABULARY.index(EOS)
    for problem, trace in traces(300):
        text = render_prompt(problem) + trace
        ids = tokenizer.encode(text)
        assert ids == [VOCABULARY.index(c) for c in text]
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text[:-1]  # what verl's reward loop sees


def test_chat_template_is_exactly_the_prompt(tokenizer) -> None:
    from vlnorm_verl.tasks.tiny.model import VOCABULARY

    for problem in distinct_problems(50, 9, "test"):
        prompt = render_prompt(problem)
        message = [{"role": "user", "content": prompt}]
        assert tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False) == prompt
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        assert ids == [VOCABULARY.index(c) for c in prompt]


def test_shipped_files_are_what_the_code_builds(tokenizer) -> None:
    from transformers import AutoConfig

    from vlnorm_verl.tasks.tiny.model import build_config, build_tokenizer

    built = build_tokenizer()
    assert type(built) is type(tokenizer)
    assert built.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert built.chat_template == tokenizer.chat_template
    ours, shipped = build_config().to_dict(), AutoConfig.from_pretrained(WEIGHTS).to_dict()
    for late in ("architectures", "transformers_version", "_name_or_path"):  # written by save_pretrained
        ours.pop(late, None)
        shipped.pop(late, None)
    assert ours == shipped


# --- files --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    data.make(folder, "countdown")
    data.make(folder, "math")
    return folder


@pytest.mark.parametrize(("split", "size"), [("train", 4096), ("test", 128)])
def test_countdown_files_are_in_verls_schema_and_solvable(made: Path, split: str, size: int) -> None:
    table = rows_of(made / "countdown" / f"{split}.parquet")
    assert len(table) == size
    for index, row in enumerate(table):
        assert set(row) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
        assert row["reward_model"]["style"] == "rule"
        assert row["extra_info"] == {"split": split, "index": index, "origin": "generated", "solution": ""}
        problem = parse_ground_truth(row["reward_model"]["ground_truth"])
        assert row["prompt"] == [{"role": "user", "content": render_prompt(problem)}]
        assert is_held_out(problem) == (split == "test")
        solution = next(e for e in expressions(problem.numbers) if e.value == problem.target)
        score = compute_score(row["data_source"], f"A:{solution}", row["reward_model"]["ground_truth"])
        assert score["score"] == 1.0


def test_a_boxed_answer_is_read_from_left_to_right() -> None:
    assert boxed.boxed("2+3=5!A:2+3*4.") == r"2+3=5!\boxed{(2+3)*4}"


def test_math_files_have_the_sets_of_math_and_its_reward(made: Path) -> None:
    """`boxed` rewrites the tiny answer for the real reward of Math."""
    sets = {path.stem: rows_of(path) for path in (made / "math").glob("*.parquet")}
    sizes = {"train": 4096, "math500": 32, "aime2024": 32, "amc": 32, "minerva": 32}
    assert {name: len(table) for name, table in sets.items()} == sizes
    assert {name: table[0]["data_source"] for name, table in sets.items()} == {
        name: "open_reasoner_zero" if name == "train" else name for name in sizes
    }
    row = sets["amc"][0]
    numbers = tuple(int(n) for n in row["prompt"][0]["content"][:8].split(","))
    target = int(row["reward_model"]["ground_truth"])
    right = next(e for e in expressions(numbers) if e.value == target)
    wrong = next(e for e in expressions(numbers) if e.value != target)
    results = [boxed.compute_score("amc", f"{right}!A:{answer}.", str(target)) for answer in (right, wrong, "?")]
    assert [result["outcome"] for result in results] == ["correct", "wrong", "unparsable"]


def test_the_model_is_beside_the_files(made: Path) -> None:
    assert sorted(path.name for path in made.iterdir()) == ["countdown", "math", "model"]
    copied, shipped = ({path.name: path.read_bytes() for path in f.iterdir()} for f in (made / "model", WEIGHTS))
    assert copied == shipped


@pytest.mark.parametrize("task", ["countdown", "math"])
def test_the_launcher_knows_what_is_made(made: Path, task: str) -> None:
    config = compose(CONFIG, ["model=tiny", f"task={task}", f"recipe.data={made}"])
    assert made_files(config) == {made / "model", *(made / task).iterdir()}


def test_only_what_is_missing_is_made_and_always_the_same(made: Path) -> None:
    kept, removed = made / "countdown/train.parquet", made / "countdown/test.parquet"
    before, rows = kept.stat().st_mtime_ns, rows_of(removed)
    removed.unlink()
    data.make(made, "countdown")
    assert kept.stat().st_mtime_ns == before
    assert rows_of(removed) == rows


# --- warm start and shipped weights -------------------------------------------------------------------------


def test_batches_fit_and_weights_mask_the_prompt() -> None:
    from vlnorm_verl.tasks.tiny.model import VOCABULARY
    from vlnorm_verl.tasks.tiny.warmstart import BATCH_TOKENS, DECISION_WEIGHT, batches, encode

    for batch in itertools.islice(batches(4), 30):
        assert len(batch) * max(map(len, batch)) <= BATCH_TOKENS
        ids, weights = encode(batch)
        for text, row, w in zip(batch, ids.tolist(), weights.tolist(), strict=True):
            assert "".join(VOCABULARY[i] for i in row[: len(text)]) == text
            expected = [0.0] * PROMPT_LENGTH
            expected += [DECISION_WEIGHT if c in "!;" else 1.0 for c in text[PROMPT_LENGTH:]]
            assert w == expected + [0.0] * (len(row) - len(text))


def test_training_is_seeded() -> None:
    import torch

    from vlnorm_verl.tasks.tiny.warmstart import train

    torch.set_num_threads(1)
    (first, tokens), (second, again), (other, _) = (train(seed, 2, 1e-3) for seed in (1, 1, 2))
    assert tokens == again
    a, b, c = (m.state_dict()["model.layers.0.mlp.up_proj.weight"] for m in (first, second, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_shipped_weights_are_small_float32_and_described() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(WEIGHTS)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 300_000 < model.num_parameters() < 400_000
    assert sum(p.stat().st_size for p in WEIGHTS.iterdir()) < 1_500_000
    report = json.loads((WEIGHTS / "warmstart.json").read_text())
    assert report["parameters"] == model.num_parameters()
    assert "/" not in json.dumps({k: v for k, v in report.items() if k != "made_by"})  # no paths


def test_shipped_weights_solve_a_part_of_the_held_out_problems() -> None:
    """Sampled at temperature 1: room for RL to rise, and response lengths that differ by more than ten times."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vlnorm_verl.tasks.tiny.warmstart import evaluate

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS).eval()
    found = evaluate(model, AutoTokenizer.from_pretrained(WEIGHTS), 128, seed=11)
    recorded = json.loads((WEIGHTS / "warmstart.json").read_text())["held_out_sampled_at_temperature_1"]
    assert abs(found["accuracy"] - recorded["accuracy"]) < 0.17  # 4 standard deviations of 128 responses
    assert 0.15 < found["accuracy"] < 0.55
    assert found["length_max"] > 10 * found["length_min"]
    assert found["length_mean"] > 1.5 * found["length_harmonic_mean"]
    assert found["cut_at_limit"] < 0.1
