"""The lab's rollouts and per-response gradients, on the shipped tiny model and on tiny random ones.

Covered: score gradients against an independent computation, against finite differences, by exact enumeration, and
against verl's own policy loss and advantages; sampling against the exact distribution; CountSketch; resuming; choice of
parameters; errors; a checkpoint of two ranks written by verl's own checkpoint manager.
Not covered: a GPU. vLLM, a checkpoint of one rank and a broken one are `slow`: each starts vLLM or verl.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from vlnorm_verl.files import UserError
from vlnorm_verl.lab import models, rollouts, store
from vlnorm_verl.lab.gradients import (
    CountSketch,
    _checkpoint,
    compute,
    load,
    parts_of,
    score_gradient,
    select_parameters,
)
from vlnorm_verl.lab.rollouts import Design, sample
from vlnorm_verl.lab.store import Rollouts, grpo_advantages
from vlnorm_verl.lab.tasks import load_task
from vlnorm_verl.tasks.tiny import WEIGHTS
from vlnorm_verl.tasks.tiny.countdown import DATA_SOURCE, compute_score
from vlnorm_verl.tasks.tiny.model import EOS, VOCABULARY

PROMPT = "07,03,12>bp:"
RESPONSE = "7*3=21-12=9;7+3=10-12=0;A:7+3-12."
SMALL_DESIGN = Design(deep_prompts=1, deep_responses=6, pool_prompts=2, pool_responses=3)
ROUNDING = 1e-6  # Qwen2's norms are in float32 whatever its dtype, so float64 does not give more
SIZES: dict[str, Any] = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def ids(text: str) -> list[int]:
    return [VOCABULARY.index(character) for character in text]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return models.load_model(str(WEIGHTS))


@pytest.fixture(scope="module")
def exact() -> Any:
    """The same weights in float64."""
    return transformers.AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts and gradients of a small design."""
    out = tmp_path_factory.mktemp("lab")
    sample(str(WEIGHTS), load_task("tiny"), SMALL_DESIGN, 3, 1.0, 64, "transformers", out)
    compute(out)
    return out


def log_probability(model: Any, prompt: list[int], response: list[int], temperature: float) -> torch.Tensor:
    """Σ_t log π, token by token from the definition."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0] / temperature
    return sum(
        (logits[len(prompt) + t - 1] - torch.logsumexp(logits[len(prompt) + t - 1], dim=0))[token]
        for t, token in enumerate(response)
    )


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradient.reshape(-1) for gradient in gradients.values()])


def score(model: Any, response: list[int], temperature: float = 1.0, modules: str = "last-qkv") -> torch.Tensor:
    return flat(score_gradient(model, select_parameters(model, modules), ids(PROMPT), response, temperature))


def differences(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


# --------------------------------------------------------------------------------------------------- score gradients


@pytest.mark.parametrize("modules", ["last-qkv", "all"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_score_gradient_is_that_of_the_definition(exact: Any, modules: str, temperature: float) -> None:
    parameters = select_parameters(exact, modules)
    expected = torch.autograd.grad(
        log_probability(exact, ids(PROMPT), ids(RESPONSE), temperature), list(parameters.values())
    )
    actual = score(exact, ids(RESPONSE), temperature, modules)
    assert differences(actual, torch.cat([g.reshape(-1) for g in expected])) < ROUNDING


def test_score_gradient_is_that_of_finite_differences() -> None:
    """On GPT-NeoX, which is in float64 throughout; Qwen2's norms are in float32 whatever its dtype."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(**SIZES, intermediate_size=32, initializer_range=0.5)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    prompt, response, temperature, step = [3, 1, 4], [1, 5, 9, 2, 6, 5, 0], 1.3, 1e-5
    for name in ("layers.2.attention.query_key_value.weight", "layers.0.attention.query_key_value.bias", "embed_in"):
        parameters = select_parameters(model, name)
        (gradient,) = score_gradient(model, parameters, prompt, response, temperature).values()
        (parameter,) = parameters.values()
        position = np.unravel_index(int(gradient.abs().argmax()), gradient.shape)
        values = []
        with torch.no_grad():
            original = parameter[position].item()
            for moved in (original + step, original - step):
                parameter[position] = moved
                values.append(float(log_probability(model, prompt, response, temperature)))
            parameter[position] = original
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(gradient[position]), rel=1e-6)


def test_float32_gradient_is_that_of_float64(tiny: Any, exact: Any) -> None:
    assert differences(score(tiny, ids(RESPONSE)).double(), score(exact, ids(RESPONSE))) < 1e-5


def test_padding_and_batching_do_not_matter(exact: Any) -> None:
    """Of a padded batch with both paddings and a mask, as verl's workers see it, the rows' gradients are the same."""
    parameters = select_parameters(exact, "last-qkv")
    responses = [ids(RESPONSE), ids("A:7+3-12."), ids("7*3=21-12=9;")]
    width = max(map(len, responses))
    rows = [[0, 0, 0, *ids(PROMPT), *response, *[0] * (width - len(response))] for response in responses]
    start = 3 + len(PROMPT)
    mask = torch.tensor([[0] * 3 + [1] * (len(PROMPT) + len(r)) + [0] * (width - len(r)) for r in responses])
    logits = exact(
        input_ids=torch.tensor(rows), attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
    ).logits
    log_probs = torch.log_softmax(logits[:, start - 1 : -1], dim=-1)
    chosen = log_probs.gather(2, torch.tensor(rows)[:, start:, None])[..., 0] * mask[:, start:]
    for row, response in enumerate(responses):
        gradients = torch.autograd.grad(chosen[row].sum(), list(parameters.values()), retain_graph=True)
        expected = torch.cat([g.reshape(-1) for g in gradients])
        assert differences(score(exact, response), expected) < ROUNDING


def test_end_token_is_part_of_the_response(exact: Any) -> None:
    parameters = list(select_parameters(exact, "last-qkv").values())
    assert RESPONSE.endswith(EOS)
    with_end, without = score(exact, ids(RESPONSE)), score(exact, ids(RESPONSE[:-1]))
    logits = exact(input_ids=torch.tensor([ids(PROMPT + RESPONSE[:-1])])).logits[0, -1]
    last = torch.autograd.grad(torch.log_softmax(logits, dim=-1)[VOCABULARY.index(EOS)], parameters)
    assert differences(with_end - without, torch.cat([g.reshape(-1) for g in last])) < 1e-3
    assert (with_end - without).norm() > 1e-5


def test_gradients_add_up(exact: Any) -> None:
    responses = [ids(RESPONSE), ids("A:7+3-12."), ids("7*3=21-12=9;")]
    parameters = list(select_parameters(exact, "last-qkv").values())
    total = torch.autograd.grad(sum(log_probability(exact, ids(PROMPT), r, 1.0) for r in responses), parameters)
    actual = sum(score(exact, response) for response in responses)
    assert differences(actual, torch.cat([g.reshape(-1) for g in total])) < ROUNDING


def test_expected_score_gradient_is_zero() -> None:
    """Exact: every response of at most two tokens, token 0 ending it, weighted by its probability."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(**{**SIZES, "vocab_size": 6}, intermediate_size=16, initializer_range=0.8)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    parameters = select_parameters(model, "all")
    responses = [[0], *([a, b] for a, b in itertools.product(range(1, 6), range(6)))]
    for temperature in (1.0, 0.6):
        mean, norms, total = torch.zeros(()), 0.0, 0.0
        for response in responses:
            with torch.no_grad():
                p = math.exp(log_probability(model, [3, 1, 4], response, temperature))
            gradient = flat(score_gradient(model, parameters, [3, 1, 4], response, temperature))
            mean, norms, total = mean + p * gradient, norms + p * float(gradient.norm()), total + p
        assert total == pytest.approx(1, abs=1e-12)
        assert norms > 0.01
        assert mean.norm() < 1e-10 * norms


def test_parameters_that_the_response_does_not_use_have_gradient_zero(exact: Any) -> None:
    spare = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    parameters = {**select_parameters(exact, "last-qkv"), "spare": spare}
    assert score_gradient(exact, parameters, ids(PROMPT), ids("A:7+3-12."), 1.0)["spare"].tolist() == [0, 0, 0]


# ---------------------------------------------------------------------------------------------------- what verl does


def test_advantages_are_verls() -> None:
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    generator = np.random.default_rng(0)
    for rewards in ([1.0, 0.0, 0.0, 1.0, 1.0], [1.0] * 4, [0.0] * 3, [0.1] * 8, [1.0], generator.normal(size=128)):
        n = len(rewards)
        token_rewards = torch.zeros(n, 4)
        token_rewards[:, -1] = torch.tensor(np.array(rewards, dtype=np.float32))
        theirs, _ = compute_grpo_outcome_advantage(token_rewards, torch.ones(n, 4), np.zeros(n, dtype=int))
        assert grpo_advantages(np.array(rewards)).tolist() == theirs[:, 0].double().tolist()


@pytest.mark.parametrize("advantage", [1.7, -0.6])
def test_advantage_times_score_is_verls_policy_gradient(exact: Any, advantage: float) -> None:
    """On policy, clipped or not: the gradient of verl's loss of one response, summed over tokens, is −A s."""
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
    from verl.workers.config import FSDPActorConfig

    config = FSDPActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=0.2, clip_ratio_high=0.3
    )
    parameters = select_parameters(exact, "last-qkv")
    response = ids(RESPONSE)
    logits = exact(input_ids=torch.tensor([ids(PROMPT) + response])).logits[0, len(PROMPT) - 1 : -1]
    log_prob = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(response)[:, None]).T  # [1 x L]
    ones = torch.ones_like(log_prob)
    loss, _ = compute_policy_loss_vanilla(
        log_prob.detach(), log_prob, advantage * ones, ones, "token-mean", config, rollout_is_weights=None
    )
    expected = torch.autograd.grad(loss * len(response), list(parameters.values()))
    assert differences(-advantage * score(exact, response), torch.cat([g.reshape(-1) for g in expected])) < ROUNDING


# ---------------------------------------------------------------------------------------------------------- sampling


def hostile_copy(folder: Path) -> Path:
    """The tiny model with generation settings that would change the distribution if they were used."""
    shutil.copytree(WEIGHTS, folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"do_sample": False, "top_k": 1, "top_p": 0.1, "repetition_penalty": 2.0, "temperature": 0.1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


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


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_have_the_policys_distribution(tmp_path: Path, temperature: float) -> None:
    model = models.load_model(str(hostile_copy(tmp_path / "model")))
    prompts, counts = [ids("01,02"), ids(PROMPT)], [5, 2000]
    got = list(rollouts.with_transformers(model, prompts, counts, 0, temperature, 1, {1}, 401))
    assert [len(responses) for responses in got] == counts
    check_first_tokens(got[1], temperature)


def test_batches_that_span_prompts_of_other_lengths(tiny: Any) -> None:
    """At almost no temperature each response is its prompt's greedy continuation, computed alone and unpadded."""
    prompts, counts, limit = [ids(PROMPT), ids("01,05,09>cm:1+5=6"), ids("12,12,02>cm:A")], [2, 4, 1], 12
    got = list(rollouts.with_transformers(tiny, prompts, counts, 0, 1e-4, limit, {1}, 3))
    assert [len(responses) for responses in got] == counts
    for prompt, responses in zip(prompts, got, strict=True):
        greedy: list[int] = []
        while len(greedy) < limit and greedy[-1:] != [1]:
            with torch.no_grad():
                greedy.append(int(tiny(input_ids=torch.tensor([prompt + greedy])).logits[0, -1].argmax()))
        assert all(response == greedy for response in responses)
    assert len({tuple(responses[0]) for responses in got}) == 3


def test_sampling_follows_the_seed(tiny: Any) -> None:
    first, same, other = (
        list(rollouts.with_transformers(tiny, [ids(PROMPT)], [4], seed, 1.0, 20, {1}, 4)) for seed in (0, 0, 1)
    )
    assert first == same != other


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


def test_stored_groups_are_what_was_sampled(sampled: Path) -> None:
    stored = load(sampled)
    assert (stored.model, stored.task, stored.projected) == (str(WEIGHTS), "tiny", False)
    assert [(group.kind, len(group.lengths)) for group in stored.groups] == [("deep", 6), ("pool", 3), ("pool", 3)]
    assert len({group.prompt for group in stored.groups}) == 3
    assert stored.dimension == sum(stored.sizes) == 3 * (96 * 96 + 96)
    assert all(name.startswith("model.layers.2.self_attn.") for name in stored.modules)
    model = models.load_model(str(WEIGHTS))
    for group, raw in zip(stored.groups, store.read_rollouts(sampled), strict=True):
        assert isinstance(group.score_gradients, np.memmap)
        assert group.score_gradients.dtype == np.float32
        assert group.lengths.tolist() == [len(response) for response in raw.responses]
        assert group.rewards.tolist() == raw.rewards
        assert group.truncated.tolist() == raw.truncated
        assert group.advantages.tolist() == grpo_advantages(group.rewards).tolist()
        for row, response in zip(group.score_gradients, raw.responses, strict=True):
            parameters = select_parameters(model, "last-qkv")
            expected = torch.autograd.grad(
                log_probability(model, raw.prompt_ids, response, 1.0), list(parameters.values())
            )
            assert differences(torch.tensor(row), torch.cat([g.reshape(-1) for g in expected])) < 1e-4


def test_stored_gradients_are_at_the_sampling_temperature(sampled: Path, tmp_path: Path, exact: Any) -> None:
    group = next(store.read_rollouts(sampled))
    settings = {**store.read_settings(sampled), "temperature": 0.5}
    store.write_rollouts(tmp_path, settings, [group])
    compute(tmp_path, modules="layers.2.self_attn.v_proj.weight")
    parameters = select_parameters(exact, "layers.2.self_attn.v_proj.weight")
    expected = flat(score_gradient(exact, parameters, group.prompt_ids, group.responses[0], 0.5))
    assert differences(torch.tensor(load(tmp_path).groups[0].score_gradients[0]).double(), expected) < 1e-5


def test_same_seed_same_rollouts(tmp_path: Path, sampled: Path) -> None:
    task = load_task("tiny")
    for seed in (3, 4):
        sample(str(WEIGHTS), task, SMALL_DESIGN, seed, 1.0, 64, "transformers", tmp_path / str(seed))
    first, same, other = (
        (folder / store.ROLLOUTS).read_bytes() for folder in (sampled, tmp_path / "3", tmp_path / "4")
    )
    assert first == same
    assert [group.prompt for group in store.read_rollouts(tmp_path / "4")] != [
        group.prompt for group in store.read_rollouts(sampled)
    ]
    assert first != other


def test_auto_takes_transformers_for_a_small_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    design = Design(0, 2, 1, 2)
    sample(str(WEIGHTS), load_task("tiny"), design, 0, 1.0, 4, "auto", tmp_path)
    assert "engine: transformers (337,152 parameters" in capsys.readouterr().out
    assert store.read_settings(tmp_path)["engine"] == "transformers"


def test_rollouts_of_other_settings_are_refused(sampled: Path) -> None:
    task = load_task("tiny")
    before = (sampled / store.ROLLOUTS).read_bytes()
    sample(str(WEIGHTS), task, SMALL_DESIGN, 3, 1.0, 64, "auto", sampled)
    with pytest.raises(UserError, match=r"seed: 3 there, 4 asked for; temperature: 1.0 there, 0.5 asked for"):
        sample(str(WEIGHTS), task, SMALL_DESIGN, 4, 0.5, 64, "transformers", sampled)
    assert (sampled / store.ROLLOUTS).read_bytes() == before


def test_rollouts_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def interrupted() -> Any:
        yield Rollouts("pool", "p", [1], [[2]], [0.0], [True])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write_rollouts(tmp_path, {}, interrupted())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_vllm_samples_the_same_distribution(tmp_path: Path) -> None:
    folder = str(hostile_copy(tmp_path / "model"))
    prompts, counts = [ids("01,02"), ids(PROMPT)], [5, 2000]
    got = list(rollouts._with_vllm(folder, prompts, counts, 0, 1.0, 40, {1}, tmp_path))
    assert [len(responses) for responses in got] == counts
    check_first_tokens(got[1], 1.0)
    assert {response[-1] == 1 for response in got[1]} == {True, False}
    assert all(1 not in response[:-1] for response in got[1])


# -------------------------------------------------------------------------------------------------------- projection


def test_count_sketch_keeps_inner_products() -> None:
    generator = torch.Generator().manual_seed(0)
    k, seeds = 64, 400
    # Entries of one sign on average: only random signs keep their inner products unbiased.
    a = {"w": 0.5 + torch.randn(50, 20, generator=generator), "b": 0.5 + torch.randn(30, generator=generator)}
    b = {name: 0.5 * value + torch.randn(value.shape, generator=generator) for name, value in a.items()}
    true, scale = float(flat(a) @ flat(b)), float(flat(a).norm() * flat(b).norm())
    errors = (
        np.array([float(CountSketch(k, seed)(a) @ CountSketch(k, seed)(b)) - true for seed in range(seeds)]) / scale
    )
    # Var = (‖a‖²‖b‖² + (a·b)² − 2 Σ a²b²)/K (Charikar et al. 2002; Weinberger et al. 2009).
    sd = math.sqrt((1 + (true / scale) ** 2 - 2 * float((flat(a) ** 2) @ (flat(b) ** 2)) / scale**2) / k)
    assert abs(errors.mean()) < 4 * sd / math.sqrt(seeds)
    assert errors.std() == pytest.approx(sd, rel=0.15)
    assert sd <= math.sqrt(2 / k)


def test_count_sketch_is_linear_deterministic_and_independent_of_chunks() -> None:
    gradients = {"w": torch.randn(40, 25, dtype=torch.float64), "b": torch.randn(7, dtype=torch.float64)}
    whole = CountSketch(32)(gradients)
    assert torch.equal(whole, CountSketch(32)(gradients))
    assert torch.allclose(CountSketch(32, chunk=7)(gradients), whole, rtol=0, atol=1e-12)
    assert torch.allclose(CountSketch(32)(dict(reversed(gradients.items()))), whole, rtol=0, atol=1e-12)
    assert torch.allclose(CountSketch(32)({n: 3 * g for n, g in gradients.items()}), 3 * whole, rtol=0, atol=1e-12)
    assert not torch.allclose(CountSketch(32, seed=1)(gradients), whole)
    renamed = {"v": gradients["w"], "b": gradients["b"]}
    assert not torch.allclose(CountSketch(32)(renamed), whole)


def test_count_sketch_hashes_by_splitmix64() -> None:
    """Against the published algorithm on Python's integers: stored sketches must stay comparable."""

    def splitmix64(key: int, index: int) -> int:
        state = (key + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        return state ^ (state >> 31)

    assert splitmix64(1234567, 0) == 6457827717110365317  # the reference implementation's first number of this seed
    gradient = torch.arange(1.0, 101.0)
    key = int.from_bytes(hashlib.sha256(b"5 w").digest()[:8], "big")
    expected = [0.0] * 7
    for index, value in enumerate(gradient.tolist()):
        hashed = splitmix64(key, index)
        expected[(hashed >> 1) % 7] += value if hashed % 2 == 0 else -value
    assert CountSketch(7, seed=5)({"w": gradient}).tolist() == expected


PARTS = ("other", "layer 0", "layer 1", "layer 2")


def test_parts_are_layers_or_the_modules_of_one() -> None:
    layer = [
        "model.layers.7.self_attn.q_proj.weight",
        "model.layers.7.self_attn.q_proj.bias",
        "model.layers.7.mlp.up.weight",
    ]
    assert parts_of(layer) == {"q_proj": layer[:2], "up": layer[2:]}
    more = ["wte.weight", *layer, "h.3.attn.c_attn.weight", "model.norm.weight"]
    assert parts_of(more) == {"other": [more[0], more[-1]], "layer 7": layer, "layer 3": [more[-2]]}


def test_short_parts_are_not_projected(sampled: Path, tmp_path: Path) -> None:
    """Each of the three projections has 9,312 entries; a share of 10,000 holds them, one of 5,000 does not."""
    shutil.copytree(sampled, tmp_path / "lab")
    compute(tmp_path / "lab", "last-qkv", 30_000, folder="held")
    assert np.array_equal(
        load(tmp_path / "lab", "held").groups[0].score_gradients, load(sampled).groups[0].score_gradients
    )
    assert not load(tmp_path / "lab", "held").projected
    compute(tmp_path / "lab", "last-qkv", 15_000, folder="not")
    stored = load(tmp_path / "lab", "not")
    assert stored.projected
    assert stored.parts["v_proj"] == slice(10_000, 15_000)
    with pytest.raises(UserError, match="--projection 2: fewer numbers than the 3 parts"):
        compute(tmp_path / "lab", "last-qkv", 2, folder="fewer")


def test_projected_gradients_are_sketches_of_the_whole_ones(sampled: Path, tmp_path: Path, tiny: Any) -> None:
    shutil.copytree(sampled, tmp_path / "lab")
    compute(tmp_path / "lab", "all", 4096, folder="projected")
    stored = load(tmp_path / "lab", "projected")
    assert (stored.projected, stored.dimension, sum(stored.sizes)) == (True, 4096, 337_152)
    assert stored.parts == {name: slice(1024 * k, 1024 * (k + 1)) for k, name in enumerate(PARTS)}
    raw = list(store.read_rollouts(sampled))[1]
    rows = stored.groups[1].score_gradients
    whole = [
        score_gradient(tiny, select_parameters(tiny, "all"), raw.prompt_ids, response, 1.0)
        for response in raw.responses
    ]
    for row, gradient in zip(rows, whole, strict=True):
        for part, names in parts_of(list(gradient)).items():
            of_part = CountSketch(1024)({name: gradient[name] for name in names})
            assert differences(torch.tensor(row[stored.parts[part]]), of_part) < 1e-5
    gram = np.array([[float(flat(a) @ flat(b)) for b in whole] for a in whole])
    norms = np.sqrt(np.diag(gram))
    assert (np.abs(rows @ rows.T - gram) / np.outer(norms, norms)).max() < 4 * math.sqrt(2 / 4096)


def test_many_entries_are_projected_unless_told_otherwise(sampled: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from vlnorm_verl.lab import gradients

    monkeypatch.setattr(gradients, "PROJECT_ABOVE", 10_000)
    monkeypatch.setattr(gradients, "PROJECTION", 128)
    shutil.copytree(sampled, tmp_path / "lab")
    for folder, modules, projection, dimension in (
        ("few", "layers.2.self_attn.v_proj", None, 96 * 97),
        ("many", "last-qkv", None, 126),
        ("told", "last-qkv", 0, 3 * 96 * 97),
    ):
        compute(tmp_path / "lab", modules, projection, folder=folder)
        assert load(tmp_path / "lab", folder).dimension == dimension


def test_checkpointing_does_not_change_gradients(sampled: Path, tmp_path: Path) -> None:
    shutil.copytree(sampled, tmp_path / "lab")
    compute(tmp_path / "lab", "layers.1", folder="plain")
    compute(tmp_path / "lab", "layers.1", checkpointing=True, folder="recomputed")
    plain, recomputed = (load(tmp_path / "lab", folder).groups[0] for folder in ("plain", "recomputed"))
    assert np.allclose(plain.score_gradients, recomputed.score_gradients, rtol=1e-5, atol=1e-6)


def test_checkpointing_recomputes_without_dropout() -> None:
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(**SIZES, intermediate_size=16, hidden_dropout=0.5, attention_dropout=0.5)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    parameters = select_parameters(model, "all")
    plain = flat(score_gradient(model, parameters, [3, 1], [4, 1, 5], 1.0))
    _checkpoint(model)
    calls: list[int] = []
    model.gpt_neox.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    assert differences(flat(score_gradient(model, parameters, [3, 1], [4, 1, 5], 1.0)), plain) < 1e-12
    assert len(calls) == 2


# ----------------------------------------------------------------------------------------------------------- resuming


def test_a_stopped_call_goes_on_to_the_same_bytes(sampled: Path, tmp_path: Path) -> None:
    out = tmp_path / "lab"
    out.mkdir()
    shutil.copy(sampled / store.ROLLOUTS, out)

    def stop(index: int) -> None:
        if index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute(out, on_group=stop)
    assert sorted(path.name for path in (out / "gradients").iterdir()) == ["000.npy", "001.npy", "settings.json"]
    with pytest.raises(UserError, match="lacks the gradients of 1 prompts"):
        load(out)
    kept = (out / "gradients" / "001.npy").stat().st_mtime_ns
    (out / "gradients" / "000.npy").unlink()
    computed: list[int] = []
    compute(out, on_group=computed.append)
    assert computed == [0, 2]
    assert (out / "gradients" / "001.npy").stat().st_mtime_ns == kept
    for name in ("000.npy", "001.npy", "002.npy", "settings.json"):
        assert (out / "gradients" / name).read_bytes() == (sampled / "gradients" / name).read_bytes()


def test_gradients_of_other_settings_are_refused(sampled: Path) -> None:
    with pytest.raises(UserError, match=r"made with other settings \(names: .*; parts: .* asked for"):
        compute(sampled, "all", 64)
    with pytest.raises(UserError, match=r'parts: .*"v_proj": 9312\} there, \{"q_proj": 21'):
        compute(sampled, "last-qkv", 64)


def test_gradients_of_other_rollouts_or_weights_are_refused(sampled: Path, tmp_path: Path) -> None:
    shutil.copytree(sampled, tmp_path / "lab")
    settings, groups = store.read_settings(sampled), list(store.read_rollouts(sampled))
    store.write_rollouts(tmp_path / "lab", settings, groups[1:])
    with pytest.raises(UserError, match="gradients of other rollouts"):
        load(tmp_path / "lab")
    with pytest.raises(UserError, match="rollouts_sha256"):
        compute(tmp_path / "lab")
    store.write_rollouts(tmp_path / "other", {**settings, "weights": "0"}, groups)
    with pytest.raises(UserError, match="would not be on policy"):
        compute(tmp_path / "other")


def test_fingerprint_notices_a_training_step(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(WEIGHTS, tmp_path / "model")
    assert models.fingerprint(str(tmp_path / "model")) == models.fingerprint(str(WEIGHTS))
    file = tmp_path / "model" / "model.safetensors"
    size = file.stat().st_size
    save_file({name: value * 1.0001 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    assert file.stat().st_size == size
    assert models.fingerprint(str(tmp_path / "model")) != models.fingerprint(str(WEIGHTS))


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sample rollouts"):
        load(tmp_path)
    with pytest.raises(UserError, match="sample rollouts"):
        compute(tmp_path)
    store.write_rollouts(tmp_path, {}, [])
    with pytest.raises(UserError, match="compute the gradients"):
        load(tmp_path)


# --------------------------------------------------------------------------------------------------------- parameters


def random_model(config: Any) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            transformers.Qwen2Config(**SIZES, num_key_value_heads=1, intermediate_size=16),
            [f"model.layers.2.self_attn.{p}_proj.{k}" for p in "qkv" for k in ("weight", "bias")],
        ),
        (
            transformers.LlamaConfig(**SIZES, num_key_value_heads=1, intermediate_size=16),
            [f"model.layers.2.self_attn.{p}_proj.weight" for p in "qkv"],
        ),
        (
            transformers.Qwen3Config(**SIZES, num_key_value_heads=1, intermediate_size=16, head_dim=8),
            [f"model.layers.2.self_attn.{p}_proj.weight" for p in "qkv"],
        ),
        (
            transformers.GPTNeoXConfig(**SIZES, intermediate_size=16),
            [f"gpt_neox.layers.2.attention.query_key_value.{k}" for k in ("weight", "bias")],
        ),
        (
            transformers.GPT2Config(vocab_size=16, n_embd=16, n_layer=12, n_head=2),
            [f"transformer.h.11.attn.c_attn.{k}" for k in ("weight", "bias")],
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_last_qkv(config: Any, expected: list[str]) -> None:
    assert sorted(select_parameters(random_model(config), "last-qkv")) == sorted(expected)


def test_tied_embeddings_count_once(tiny: Any) -> None:
    everything = select_parameters(tiny, "all")
    assert sum(parameter.numel() for parameter in everything.values()) == 337_152
    assert list(select_parameters(tiny, "lm_head")) == ["model.embed_tokens.weight"]
    assert list(select_parameters(tiny, r"lm_head|embed")) == ["model.embed_tokens.weight"]


def test_choice_by_regular_expression(tiny: Any) -> None:
    assert list(select_parameters(tiny, r"layers\.[01]\..*v_proj\.bias")) == [
        f"model.layers.{layer}.self_attn.v_proj.bias" for layer in (0, 1)
    ]
    with pytest.raises(UserError, match=r"matches no parameter\. Near: model\.layers\.N\.self_attn\.q_proj"):
        select_parameters(tiny, r"layers\.2\.q_projj")
    with pytest.raises(UserError, match="not a regular expression"):
        select_parameters(tiny, "layers.(2")


def test_model_without_projections_lists_candidates() -> None:
    layer = torch.nn.ModuleDict({"attention": torch.nn.Linear(2, 2), "mlp": torch.nn.Linear(2, 2)})
    with pytest.raises(
        UserError, match=r"Give a regular expression; its parameters: 0\.attention\.weight, 0\.attention"
    ):
        select_parameters(torch.nn.ModuleList([layer]), "last-qkv")
    halves = torch.nn.ModuleList([torch.nn.ModuleDict({"q_proj": torch.nn.Linear(2, 2)})])
    with pytest.raises(UserError, match="this model has no q_proj, k_proj, v_proj"):
        select_parameters(halves, "last-qkv")


# ------------------------------------------------------------------------------------------------------------- errors


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
        ({"engine": "sglang"}, "--engine sglang is not known. Accepted: auto, vllm, transformers"),
        ({"temperature": 0.0}, "--temperature 0: must be above 0"),
        ({"max_response_length": 0}, "--max-response-length 0"),
        ({"max_response_length": 501}, "accepted: up to 500"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"design": Design(0, 2, 1_000_000, 2)}, "--task tiny: the train split has fewer"),
    ):
        with pytest.raises(UserError) as caught:
            sample(**{**good, **change})
        assert message in str(caught.value)
        assert not (tmp_path / "lab" / store.ROLLOUTS).exists()
    for arguments, message in (
        ((1, 1, 0, 8), "--deep-responses 1"),
        ((0, 8, 0, 8), "at least one"),
        ((-1,), "0 or more"),
    ):
        with pytest.raises(UserError, match=message):
            Design(*arguments)
    with pytest.raises(UserError, match="--projection -1"):
        compute(tmp_path, projection=-1)


def test_tasks(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from vlnorm_verl.tasks.base import row

    truth = json.dumps({"numbers": [1, 2, 3], "target": 6})
    rows = [row("countdown", f"prompt {i}\n<think>", truth, "train", i, "generated") for i in range(20)]
    data = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows), data)
    task = load_task("countdown", data)
    questions = task.questions(20, 0)
    assert {question.prompt for question in questions} == {f"prompt {i}\n<think>" for i in range(20)}
    assert questions[:5] != task.questions(20, 1)[:5]
    assert task.score(questions[0], "so <answer>1+2+3</answer>") == 1.0
    assert task.score(questions[0], "so <answer>1*2+3</answer>") == 0.0
    pq.write_table(pa.table({"prompt": ["a"], "answer": ["b"]}), tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("prompt")
    for name, file, message in (
        ("countdwn", data, "Did you mean 'countdown'? Accepted: tiny, countdown, math"),
        ("countdown", None, "needs --data FILE"),
        ("tiny", data, "leave --data out"),
        ("math", tmp_path / "none.parquet", "there is no such file"),
        ("math", tmp_path / "text.parquet", "not a parquet file"),
        ("math", tmp_path / "other.parquet", "lacks data_source, reward_model; it has prompt, answer"),
    ):
        with pytest.raises(UserError) as caught:
            load_task(name, file)
        assert message in str(caught.value)
    with pytest.raises(UserError, match="has 20 rows, 21 prompts are asked for"):
        task.questions(21, 0)
    two = {**rows[0], "prompt": rows[0]["prompt"] * 2}
    pq.write_table(pa.Table.from_pylist([two]), data)
    with pytest.raises(UserError, match="must be one message"):
        task.questions(1, 0)


# -------------------------------------------------------------------------------------------------- verl's checkpoints


def save_checkpoint(rank: int, ranks: int, port: int, actor: str) -> None:
    """One rank of a verl worker that saves its shard: FSDP2 over gloo, verl's own checkpoint manager."""
    import verl.utils.device
    from omegaconf import OmegaConf
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

    assert verl.utils.device.get_device_name() == "cpu"
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    model = transformers.AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("fsdp",))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    contents = OmegaConf.create({"save_contents": ["model"], "load_contents": ["model"]})
    tokenizer = transformers.AutoTokenizer.from_pretrained(WEIGHTS)
    manager = FSDPCheckpointManager(model, processing_class=tokenizer, checkpoint_config=contents)
    manager.save_checkpoint(actor, global_step=7)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_verl_checkpoint_is_merged(tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlnorm_verl.cpu import cpu_environment

    step = tmp_path / "checkpoints" / "global_step_7"
    with monkeypatch.context() as patched, socket.socket() as free:
        for name, value in cpu_environment(threads=1).items():
            patched.setenv(name, value)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        torch.multiprocessing.spawn(save_checkpoint, (ranks, port, str(step / "actor")), nprocs=ranks)
    out = tmp_path / "lab"
    task, design = load_task("tiny"), Design(0, 2, 1, 2)
    sample(str(step), task, design, 0, 1.0, 32, "transformers", out)
    merged = models.load_model(str(out / "model")).state_dict()
    expected = transformers.AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32).state_dict()
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(merged[name], value.bfloat16().float()), name
    assert models.resolve(str(step / "actor"), out) == str(out / "model")

    # The checkpoint changed: what was merged from it is refused, not used.
    shard = next((step / "actor").glob("model_*_rank_0.pt"))
    shard.touch()
    with pytest.raises(UserError, match="as it was then"):
        compute(out)
    # The checkpoint is gone, as verl removes old ones: what was merged from it is used.
    shutil.rmtree(step)
    compute(out)
    group, raw = load(out).groups[0], next(store.read_rollouts(out))
    model = models.load_model(str(out / "model"))
    wanted = score_gradient(model, select_parameters(model, "last-qkv"), raw.prompt_ids, raw.responses[0], 1.0)
    assert differences(torch.tensor(group.score_gradients[0]), flat(wanted)) < 1e-5


@pytest.mark.slow
def test_broken_checkpoint_is_said(tmp_path: Path) -> None:
    actor = tmp_path / "global_step_1" / "actor"
    actor.mkdir(parents=True)
    (actor / "fsdp_config.json").write_text('{"FSDP_version": 2, "world_size": 1}')
    with pytest.raises(UserError, match=r"verl cannot merge this checkpoint:\n[\s\S]*huggingface"):
        models.resolve(str(actor), tmp_path / "lab")
    assert list((tmp_path / "lab").iterdir()) == []
