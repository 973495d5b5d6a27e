"""What the lab samples: prompts as verl makes them, responses of the policy's distribution, kept as they are finished.

vLLM is `slow`. Not covered: a GPU.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from transformers.utils import chat_template_utils

from tests.byte_level import byte_level_model
from tests.lab_tiny import PROMPT, SMALL_DESIGN, ids, sample_small
from vlnorm_verl.files import UserError
from vlnorm_verl.lab import models, store, vllm_engine
from vlnorm_verl.lab.engines import Request, by_prompt, end_tokens, with_transformers
from vlnorm_verl.lab.rollouts import Design, prompt_ids, sample
from vlnorm_verl.lab.store import Rollouts
from vlnorm_verl.lab.tasks import Question, Task, load_task
from vlnorm_verl.tasks.tiny import WEIGHTS
from vlnorm_verl.tasks.tiny.countdown import DATA_SOURCE, compute_score
from vlnorm_verl.tasks.tiny.model import EOS, VOCABULARY
from vlnorm_verl.tokenizer import refuse_lost_spaces


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_small(tmp_path_factory.mktemp("lab"))


def hostile_copy(folder: Path) -> Path:
    """The tiny model with generation settings that would change the distribution if they were used."""
    shutil.copytree(WEIGHTS, folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"do_sample": False, "top_k": 1, "top_p": 0.1, "repetition_penalty": 2.0, "temperature": 0.1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def request(texts: list[str], counts: list[int], temperature: float, longest: int) -> Request:
    return Request([*map(ids, texts)], counts, 0, temperature, longest, {1})


def sampled_by_transformers(model: Any, asked: Request, batch_size: int) -> dict[int, list[list[int]]]:
    return dict(by_prompt(with_transformers(model, asked, batch_size), asked.counts))


def check_first_tokens(responses: list[list[int]], temperature: float) -> None:
    """χ² of the first tokens against the exact softmax, over the tokens that are expected five times and the rest."""
    from scipy import stats

    model = models.load_model(str(WEIGHTS))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids(PROMPT)])).logits[0, -1].double()
    expected = torch.softmax(logits / temperature, dim=-1).numpy() * len(responses)
    counted = np.bincount([response[0] for response in responses], minlength=len(VOCABULARY))
    often = expected >= 5
    assert often.sum() > 3
    observed = np.append(counted[often], counted[~often].sum())
    assert stats.chisquare(observed, np.append(expected[often], expected[~often].sum())).pvalue > 1e-3


def test_a_prompts_responses_are_in_the_order_asked_for() -> None:
    finished = iter([(2, [7]), (1, [5, 5]), (4, [9]), (0, [8, 8, 8]), (3, [6])])
    grouped = by_prompt(finished, [1, 3, 1])
    assert next(grouped) == (2, [[9]])
    assert next(finished) == (0, [8, 8, 8])  # a prompt is there as soon as it is whole
    assert next(grouped) == (1, [[5, 5], [7], [6]])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_have_the_policys_distribution(tmp_path: Path, temperature: float) -> None:
    model = models.load_model(str(hostile_copy(tmp_path / "model")))
    responses = sampled_by_transformers(model, request(["01,02", PROMPT], [5, 2000], temperature, 1), 401)
    assert [len(of_prompt) for of_prompt in responses.values()] == [5, 2000]
    check_first_tokens(responses[1], temperature)


def test_batches_that_span_prompts_of_other_lengths() -> None:
    """At almost no temperature each response is its prompt's greedy continuation, computed alone and unpadded."""
    tiny = models.load_model(str(WEIGHTS))
    texts, limit = [PROMPT, "01,05,09>cm:1+5=6", "12,12,02>cm:A"], 12
    responses = sampled_by_transformers(tiny, request(texts, [2, 4, 1], 1e-4, limit), 3)
    assert [len(of_prompt) for of_prompt in responses.values()] == [2, 4, 1]
    for text, of_prompt in zip(texts, responses.values(), strict=True):
        greedy: list[int] = []
        while len(greedy) < limit and greedy[-1:] != [1]:
            with torch.no_grad():
                greedy.append(int(tiny(input_ids=torch.tensor([ids(text) + greedy])).logits[0, -1].argmax()))
        assert all(response == greedy for response in of_prompt)
    assert len({tuple(of_prompt[0]) for of_prompt in responses.values()}) == 3


def test_responses_end_with_the_end_token_or_are_cut(sampled: Path) -> None:
    end = VOCABULARY.index(EOS)
    seen = set()
    for group in store.read_rollouts(sampled):
        assert group.prompt_ids == ids(group.prompt)
        for response, reward, truncated in zip(group.responses, group.rewards, group.truncated, strict=True):
            assert end not in response[:-1]
            assert truncated == (response[-1] != end)
            assert len(response) == 64 if truncated else len(response) <= 64
            text = "".join(VOCABULARY[token] for token in response)
            numbers = [int(n) for n in group.prompt[:8].split(",")]
            target = 10 * (ord(group.prompt[9]) - ord("a")) + ord(group.prompt[10]) - ord("h")
            truth = json.dumps({"numbers": numbers, "target": target})
            assert reward == compute_score(DATA_SOURCE, text, truth)["score"]
            seen |= {("truncated", truncated), ("reward", reward)}
    assert seen == {("truncated", True), ("truncated", False), ("reward", 0.0), ("reward", 1.0)}


def test_tokens_that_end_a_response_are_vllms(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(WEIGHTS, tmp_path / "model"))
    for name, ends in (("config.json", 5), ("generation_config.json", [6, 7])):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, "eos_token_id": ends}))
    assert end_tokens(str(folder), 1) == {1, 6, 7}
    (folder / "generation_config.json").unlink()
    assert end_tokens(str(folder), 1) == {1, 5}


def test_same_seed_same_rollouts(tmp_path: Path, sampled: Path) -> None:
    first, same, other = (
        (folder / store.ROLLOUTS).read_bytes()
        for folder in (sampled, sample_small(tmp_path / "3", 3), sample_small(tmp_path / "4", 4))
    )
    assert first == same != other
    prompts, others = ([group.prompt for group in store.read_rollouts(out)] for out in (sampled, tmp_path / "4"))
    assert prompts != others


def test_auto_takes_transformers_for_a_small_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    design = Design(0, 2, 1, 2)
    sample(str(WEIGHTS), load_task("tiny"), design, 0, 1.0, 4, "auto", tmp_path)
    assert "engine: transformers (337,152 parameters" in capsys.readouterr().out
    assert store.read_settings(tmp_path)["engine"] == "transformers"


def test_progress_is_seen_in_a_log_file_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shown: list[str] = []
    keep = store.keep_prompt

    def noting(*arguments: Any) -> None:
        shown.append(capsys.readouterr().err)
        keep(*arguments)

    monkeypatch.setattr(store, "keep_prompt", noting)
    sample(str(WEIGHTS), load_task("tiny"), Design(0, 2, 1, 2), 0, 1.0, 4, "transformers", tmp_path)
    assert "responses, transformers:   0%" in shown[0]  # while it samples, though stderr is no terminal


def test_rollouts_of_other_settings_are_refused(sampled: Path) -> None:
    task = load_task("tiny")
    before = (sampled / store.ROLLOUTS).read_bytes()
    sample(str(WEIGHTS), task, SMALL_DESIGN, 3, 1.0, 64, "auto", sampled)
    with pytest.raises(UserError, match=r"chat_template: true .*; seed: 3 there, 4 asked for; temperature: 1\.0 there"):
        sample(str(WEIGHTS), task, SMALL_DESIGN, 4, 0.5, 64, "transformers", sampled, chat_template=False)
    assert (sampled / store.ROLLOUTS).read_bytes() == before


def test_rollouts_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def interrupted() -> Any:
        yield Rollouts("pool", "p", [1], [[2]], [0.0], [True])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write_rollouts(tmp_path, {}, interrupted())
    assert list(tmp_path.iterdir()) == []


class Stopped(BaseException):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, prompts: int) -> list[int]:
    """Ends the sampling after so many prompts; returns the list of those that are kept."""
    kept: list[int] = []
    keep = store.keep_prompt

    def keep_or_stop(out: Path, number: int, group: Rollouts) -> None:
        if len(kept) == prompts:
            raise Stopped
        keep(out, number, group)
        kept.append(number)

    monkeypatch.setattr(store, "keep_prompt", keep_or_stop)
    return kept


@pytest.mark.parametrize("torn", ["", '{"number": 2, "ki'])
def test_a_stopped_call_goes_on_to_the_same_rollouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: str
) -> None:
    """In batches of four the second prompt's responses are in two of them. The last line may be half written."""
    arguments = (str(WEIGHTS), load_task("tiny"), Design(1, 6, 3, 3), 3, 1.0, 32, "transformers")
    sample(*arguments, tmp_path / "whole", batch_size=4)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            sample(*arguments, tmp_path / "lab", batch_size=4)
    assert not (tmp_path / "lab" / store.ROLLOUTS).exists()
    with (tmp_path / "lab" / store.PARTIAL).open("a") as file:
        file.write(torn)
    with pytest.raises(UserError, match=r"partial.* made with other settings \(batch_size: 4 there, 5 asked for"):
        sample(*arguments, tmp_path / "lab", batch_size=5)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stopped):
            sample(*arguments, tmp_path / "lab", batch_size=4)
    last = stop_after(monkeypatch, 9)
    sample(*arguments, tmp_path / "lab", batch_size=4)
    assert last == [3]
    assert not (tmp_path / "lab" / store.PARTIAL).exists()
    assert (tmp_path / "lab" / store.ROLLOUTS).read_bytes() == (tmp_path / "whole" / store.ROLLOUTS).read_bytes()


@pytest.mark.slow
def test_vllm_samples_the_same_distribution(tmp_path: Path) -> None:
    folder = str(hostile_copy(tmp_path / "model"))
    asked = request(["01,02", PROMPT], [5, 2000], 1.0, 40)
    sampled = list(vllm_engine.responses(folder, asked, tmp_path))
    assert len(sampled) == 2005  # one at a time, so that there is progress to see
    responses = dict(by_prompt(sampled, asked.counts))
    assert [len(responses[number]) for number in (0, 1)] == [5, 2000]
    check_first_tokens(responses[1], 1.0)
    assert {response[-1] == 1 for response in responses[1]} == {True, False}
    assert all(1 not in response[:-1] for response in responses[1])


@pytest.mark.slow
def test_vllm_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (str(WEIGHTS), load_task("tiny"), Design(0, 2, 6, 2), 3, 1.0, 32, "vllm", tmp_path)
    with monkeypatch.context() as patch:
        first = stop_after(patch, 2)
        with pytest.raises(Stopped):
            sample(*arguments)
    second = stop_after(monkeypatch, 10)
    sample(*arguments)
    assert sorted(first + second) == list(range(6))
    assert len(second) == 4
    # The responses of a call that was not stopped: what was cut off, the long ones, is not drawn again.
    sample(*arguments[:-1], tmp_path / "whole")
    stopped, whole = (store.read_rollouts(folder) for folder in (tmp_path, tmp_path / "whole"))
    assert [group.responses for group in stopped] == [group.responses for group in whole]


def test_vllm_on_a_gpu_is_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that its end frees the GPU. No GPU here: what would be started."""
    started: dict[str, Any] = {}

    def start(_: list[str], **options: Any) -> Any:
        started.update(json.load(options["stdin"])["engine"], environment=options["env"])
        return contextlib.nullcontext(SimpleNamespace(stdout=iter(["[0, [5, 1]]\n"])))

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(subprocess, "Popen", start)
    assert list(vllm_engine.responses("model", request([PROMPT], [1], 1.0, 4), tmp_path)) == [(0, [5, 1])]
    assert started["environment"]["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert started["environment"]["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    assert (started["dtype"], started["enforce_eager"]) == ("auto", False)


@pytest.mark.slow
def test_vllm_that_ends_early_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vLLM ended with exit code 1, see .*vllm\.log"):
        list(vllm_engine.responses(str(tmp_path / "none"), request([PROMPT], [2], 1.0, 4), tmp_path))


# ------------------------------------------------------------------------------------------- prompts, tasks, rewards


CHAT = [{"role": "system", "content": "07,03"}, {"role": "user", "content": ",12>bp:"}]


def test_prompts_go_through_the_chat_template_as_in_verl() -> None:
    tokenizer = models.load_tokenizer(str(WEIGHTS))
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role[0] }}{{ m.content }}>{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    text = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert text == "<s07,03><u,12>bp:>:"
    assert prompt_ids(tokenizer, CHAT, chat_template=True) == tokenizer.encode(text, add_special_tokens=False)
    assert prompt_ids(tokenizer, CHAT, chat_template=False) == ids("07,03,12>bp:")


def test_a_template_with_todays_date_gives_the_same_prompt_tomorrow(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = models.load_tokenizer(str(WEIGHTS))
    tokenizer.chat_template = "{{ strftime_now('%d,%m,%Y') }}>"
    today = prompt_ids(tokenizer, CHAT, chat_template=True)
    monkeypatch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: datetime(1999, 9, 9)))
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "09,09,1999>"
    assert prompt_ids(tokenizer, CHAT, chat_template=True) == today


def test_mistrals_own_tokenizer_gives_control_tokens(tmp_path: Path) -> None:
    package = Path(pytest.importorskip("mistral_common").__file__).parent
    shutil.copy(package / "data" / "tekken_240911.json", tmp_path / "tekken.json")
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    tokenizer = models.load_tokenizer(str(tmp_path))
    begin, *_, end = found = prompt_ids(tokenizer, CHAT, chat_template=True)
    assert [begin, found[1], end] == tokenizer.convert_tokens_to_ids(["<s>", "[INST]", "[/INST]"])
    assert tokenizer.decode(found).startswith("<s>[INST]")
    refuse_lost_spaces(tokenizer, "model", ["two words", ""])


def test_a_tokenizer_without_a_chat_template_is_refused() -> None:
    tokenizer = models.load_tokenizer(str(WEIGHTS))
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"chat template cannot be applied: .* --no-chat-template takes the prompts"):
        prompt_ids(tokenizer, CHAT, chat_template=True)


def test_a_tokenizer_that_loses_spaces_is_refused(tmp_path: Path) -> None:
    task = load_task("countdown", parquet(tmp_path / "train.parquet", rows(2)))
    for name, message in (
        (
            "LlamaTokenizerFast",
            r"read as LlamaTokenizer, loses spaces and line ends: the text 'prompt (\d)\\n<think>' comes back as "
            r"'prompt\1<think>'\. .* set `tokenizer_class` .* for example PreTrainedTokenizerFast",
        ),
        ("PreTrainedTokenizerFast", "has no weights"),  # it is asked further
    ):
        model = byte_level_model(tmp_path / name, name)
        arguments = (str(model), task, Design(0, 2, 2, 2), 0, 1.0, 4, "transformers", tmp_path / "lab")
        with pytest.raises(UserError, match=message):
            sample(*arguments, chat_template=False)


def test_a_tokenizer_that_loses_a_few_spaces_is_taken() -> None:
    """Phi-3's special tokens take the space behind them."""
    vocabulary = {token: at for at, token in enumerate(("<unk>", "<s>", "</s>", "▁", "a", "b"))}
    tokenizer = transformers.LlamaTokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_tokens(tokenizers.AddedToken("<|user|>", rstrip=True, special=True))
    assert tokenizer.decode(tokenizer.encode("<|user|> a b  a", add_special_tokens=False)) == "<|user|>a b  a"
    refuse_lost_spaces(tokenizer, "model", ["<|user|> a b  a"])


def test_requests_that_cannot_be_met(tmp_path: Path) -> None:
    task = load_task("tiny")
    good: dict[str, Any] = {
        "model": str(WEIGHTS),
        "task": task,
        "design": Design(0, 2, 1, 2),
        "seed": 0,
        "temperature": 1.0,
        "max_response_length": 4,
        "engine": "transformers",
        "out": tmp_path / "lab",
    }
    (tmp_path / "empty").mkdir()
    for change, message in (
        ({"model": str(tmp_path / "nothing")}, f"MODEL {tmp_path}/nothing: there is no such folder"),
        ({"model": str(tmp_path / "empty")}, f"MODEL {tmp_path}/empty holds neither config.json"),
        ({"model": str(WEIGHTS / "config.json")}, f"MODEL {WEIGHTS}/config.json is a file"),
        ({"engine": "sglang"}, "--engine sglang is not accepted. Accepted: auto, vllm, transformers"),
        ({"temperature": 0.0}, "--temperature 0: must be above 0"),
        ({"max_response_length": 501}, "accepted: up to 500"),
        ({"design": Design(0, 2, 1_000_000, 2)}, "ask for fewer of the train split"),
    ):
        with pytest.raises(UserError) as caught:
            sample(**{**good, **change})
        assert message in str(caught.value)
        assert not (tmp_path / "lab" / store.ROLLOUTS).exists()


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


TRUTH = json.dumps({"numbers": [1, 2, 3], "target": 6})


def rows(count: int = 20) -> list[dict[str, Any]]:
    from vlnorm_verl.tasks.base import row

    return [row("countdown", f"prompt {i}\n<think>", TRUTH, "train", i, "generated") for i in range(count)]


def test_questions_are_rows_of_the_file_by_the_seed(tmp_path: Path) -> None:
    task = load_task("countdown", parquet(tmp_path / "train.parquet", rows()))
    questions = task.questions(20, 0)
    assert {question.messages[0]["content"] for question in questions} == {f"prompt {i}\n<think>" for i in range(20)}
    assert questions[:5] != task.questions(20, 1)[:5]
    with pytest.raises(UserError, match="has 20 rows, 21 prompts are asked for"):
        task.questions(21, 0)


def test_rollouts_of_a_file_that_has_changed_are_refused(tmp_path: Path) -> None:
    data = parquet(
        tmp_path / "train.parquet", [{**row, "prompt": [{"role": "user", "content": PROMPT}]} for row in rows(2)]
    )
    design = Design(0, 2, 2, 2)

    def again() -> None:
        task = load_task("countdown", data)
        sample(str(WEIGHTS), task, design, 0, 1.0, 4, "transformers", tmp_path / "lab", chat_template=False)

    again()
    again()
    parquet(data, [{**row, "prompt": [{"role": "user", "content": "01,02"}]} for row in rows(2)])
    with pytest.raises(UserError, match=r"other settings \(prompts: "):
        again()


def test_responses_are_scored_by_the_tasks_reward(tmp_path: Path) -> None:
    task = load_task("countdown", parquet(tmp_path / "train.parquet", rows()))
    (question,) = task.questions(1, 0)
    assert task.score(question, "so <answer>1+2+3</answer>") == 1.0
    assert task.score(question, "so <answer>1*2+3</answer>") == 0.0


@pytest.mark.parametrize(
    "changed",
    [
        {"prompt": [{"role": "user", "image": "a.png"}]},
        {"prompt": ["a text"]},
        {"prompt": []},
        {"reward_model": {"style": "rule"}},
    ],
)
def test_a_row_that_cannot_be_asked_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    data = parquet(tmp_path / "train.parquet", [{**rows(1)[0], **changed}])
    with pytest.raises(UserError, match=r"must be a chat, a list of messages with a text, and .* `ground_truth`"):
        load_task("countdown", data).questions(1, 0)


def test_wrong_tasks_are_refused(tmp_path: Path) -> None:
    data = parquet(tmp_path / "train.parquet", rows())
    parquet(tmp_path / "other.parquet", [{"prompt": "a", "answer": "b"}])
    (tmp_path / "text.parquet").write_text("prompt")
    (tmp_path / "broken.py").write_text("import a_module_that_is_not_there")
    (tmp_path / "waits.py").write_text("async def compute_score(**_):\n    return 1.0\n")
    for arguments, message in (
        (("countdwn", data), "Did you mean 'countdown'? Accepted: tiny, countdown, math, custom"),
        (("countdown",), "needs --data FILE"),
        (("tiny", data), "leave --data out"),
        (("math", tmp_path / "none.parquet"), "cannot be read as a parquet file: [Errno 2]"),
        (("math", tmp_path / "text.parquet"), "cannot be read as a parquet file"),
        (("math", tmp_path / "other.parquet"), "lacks data_source, reward_model; it has prompt, answer"),
        (("custom", data), "--task custom and --reward belong together"),
        (("math", data, "reward.py"), "--task custom and --reward belong together"),
        (("custom", data, str(tmp_path / "none.py")), "cannot be loaded"),
        (("custom", data, str(tmp_path / "broken.py")), "No module named 'a_module_that_is_not_there'"),
        (("custom", data, "pkg://vlnorm_verl.files", "score"), "cannot be loaded"),
        (("custom", data, "pkg://vlnorm_verl.files", "UserError"), "is not a plain function (def)"),
        (("custom", data, str(tmp_path / "waits.py")), "wrap it in one, a coroutine with asyncio.run"),
    ):
        with pytest.raises(UserError) as caught:
            load_task(*arguments)
        assert message in str(caught.value), arguments


def test_a_reward_of_ones_own(tmp_path: Path) -> None:
    """In the signature of verl's custom_reward_function; its file is one of the settings."""
    data = parquet(tmp_path / "train.parquet", rows())
    file = tmp_path / "reward.py"
    file.write_text("def length(data_source, solution_str, ground_truth, extra_info):\n    return len(solution_str)\n")
    task = load_task("custom", data, str(file), "length")
    assert task.score(task.questions(1, 0)[0], "four") == 4.0
    assert task.reward is not None
    file.write_text(file.read_text() + "# another")
    changed = load_task("custom", data, str(file), "length").reward
    assert changed is not None
    assert (changed["path"], changed["name"]) == (task.reward["path"], task.reward["name"])
    assert changed["sha256"] != task.reward["sha256"]
    assert load_task("custom", data, "pkg://vlnorm_verl.tasks.countdown").score(task.questions(1, 0)[0], "no") == 0.0


def test_extra_info_that_the_data_lack_is_empty(tmp_path: Path) -> None:
    """As verl's data set has it."""
    without = [{key: value for key, value in row.items() if key != "extra_info"} for row in rows(1)]
    task = Task("custom", parquet(tmp_path / "train.parquet", without), lambda extra_info, **_: len(extra_info))
    assert task.score(task.questions(1, 0)[0], "response") == 0.0


@pytest.mark.parametrize("result", [float("nan"), "good", None, {"acc": 1.0}, {"score": float("inf")}])
def test_a_reward_that_is_no_number_is_refused(result: Any) -> None:
    task = Task("custom", None, lambda **_: result)
    with pytest.raises(UserError, match="accepted: a finite number, or a dictionary with one as 'score'"):
        task.score(Question([], None, "", {}), "response")
