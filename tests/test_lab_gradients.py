"""Score gradients of the shipped tiny model and of tiny random ones, and the files that they are stored in.

Covered: against an independent computation, exact enumeration, and verl's own policy loss and advantages; CountSketch;
resuming; what is refused. Not covered: a GPU.
"""

from __future__ import annotations

import itertools
import math
import re
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.multiprocessing.reductions import StorageWeakRef

from tests.lab_tiny import (
    PROMPT,
    RESPONSE,
    ROUNDING,
    SIZES,
    by_autograd,
    differences,
    flat,
    ids,
    log_probability,
    sample_small,
    score,
)
from vlnorm_verl.files import UserError
from vlnorm_verl.lab import gradients, models, store
from vlnorm_verl.lab.gradients import _checkpoint, compute, score_gradient
from vlnorm_verl.lab.parameters import LAST_QKV, parts_of, select_parameters
from vlnorm_verl.lab.sketch import CountSketch
from vlnorm_verl.lab.store import Stored, folder_of, grpo_advantages, load
from vlnorm_verl.tasks.tiny import WEIGHTS


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
    out = sample_small(tmp_path_factory.mktemp("lab"))
    compute(out)
    return out


def computed(sampled: Path, out: Path, modules: str, *arguments: Any, **options: Any) -> Stored:
    """Other gradients of the same rollouts, in a folder of their own."""
    out.mkdir()
    shutil.copy(sampled / store.ROLLOUTS, out)
    compute(out, modules, *arguments, **options)
    return load(out, folder_of(modules))


@pytest.mark.parametrize("modules", ["last-qkv", "all"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_score_gradient_is_that_of_the_definition(exact: Any, modules: str, temperature: float) -> None:
    value = log_probability(exact, ids(PROMPT), ids(RESPONSE), temperature)
    expected = by_autograd(value, select_parameters(exact, modules))
    assert differences(score(exact, ids(RESPONSE), temperature, modules), expected) < ROUNDING


LLAMA = {**SIZES, "intermediate_size": 32, "initializer_range": 0.5}
DECODERS = {
    "GPT-NeoX": transformers.GPTNeoXConfig(**LLAMA),
    "GPT-2": transformers.GPT2Config(vocab_size=16, n_embd=16, n_layer=3, n_head=2, initializer_range=0.5),
    "OPT": transformers.OPTConfig(
        **SIZES, ffn_dim=32, word_embed_proj_dim=16, init_std=0.5, bos_token_id=0, eos_token_id=0, pad_token_id=0
    ),
    "Llama": transformers.LlamaConfig(**LLAMA),
    "sliding windows": transformers.MistralConfig(**LLAMA, num_key_value_heads=2, sliding_window=4),
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("modules", [r"\.2\.", "all"])
def test_a_prompt_that_is_computed_once_gives_the_same_gradients(decoder: str, modules: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(DECODERS[decoder], dtype=torch.float64).eval()
    parameters = select_parameters(model, modules)
    for prompt in ([3, 1, 4, 1, 5, 9], [2, 6], [2]):
        known = gradients.keys_and_values(model, prompt)
        for response in ([5, 3, 5, 8, 9, 7], [9], [3, 2]):
            whole = score_gradient(model, parameters, prompt, response, 0.7)
            shared = score_gradient(model, parameters, prompt, response, 0.7, known)
            assert differences(flat(shared), flat(whole)) < ROUNDING


def test_a_model_that_cannot_share_a_prompt_computes_it_anew(sampled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, intermediate_size=32)
    mamba = transformers.AutoModelForCausalLM.from_config(config).eval()
    tiny, rollouts = models.load_model(str(WEIGHTS)), next(store.read_rollouts(sampled))
    assert gradients.keys_and_values(mamba, rollouts.prompt_ids) == []  # it keeps a state instead
    asked = (tiny, select_parameters(tiny, "last-qkv"), rollouts, 1.0)
    assert gradients.why_not_shared(*asked) == ""
    known = gradients.keys_and_values(tiny, rollouts.prompt_ids)

    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(gradients, "keys_and_values", lambda *_: [(keys + 0.1, values) for keys, values in known])
    assert re.match("its gradient of norm .* would be off by", gradients.why_not_shared(*asked))
    monkeypatch.setattr(gradients, "keys_and_values", fails)
    error: Exception = AttributeError("no layers")
    assert gradients.why_not_shared(*asked) == "AttributeError: no layers"
    error = torch.OutOfMemoryError("of a GPU")
    with pytest.raises(torch.OutOfMemoryError):
        gradients.why_not_shared(*asked)


def test_sharing_is_checked_on_a_short_response(sampled: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole computation of a long one may not fit where all others do."""
    rollouts, parameters = next(store.read_rollouts(sampled)), select_parameters(tiny, "last-qkv")
    lengths: list[int] = []

    def noting(*arguments: Any) -> Any:
        lengths.append(len(arguments[3]))
        return score_gradient(*arguments)

    monkeypatch.setattr(gradients, "score_gradient", noting)
    for given in ([200, 40], [200, 5, 40, 90], [5, 40], [5, 40, 31]):
        of_lengths = replace(rollouts, responses=[[3] * length for length in given])
        assert gradients.why_not_shared(tiny, parameters, of_lengths, 1.0) == ""
    assert lengths == [40] * 8
    assert gradients.why_not_shared(tiny, parameters, replace(rollouts, responses=[[3] * 5, [3] * 20]), 1.0) == ""
    assert lengths[8:] == [20] * 2


def test_a_rotary_embedding_that_changes_with_the_length_is_not_shared() -> None:
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    config = transformers.LlamaConfig(**LLAMA, max_position_embeddings=64, rope_parameters=rope)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    parameters, prompt, responses = select_parameters(model, r"\.2\."), [3, 1, 4, 1], [[5, 9] * 20, [5, 9] * 80]
    off = [
        differences(
            flat(score_gradient(model, parameters, prompt, response, 1.0, gradients.keys_and_values(model, prompt))),
            flat(score_gradient(model, parameters, prompt, response, 1.0)),
        )
        for response in responses
    ]
    assert off[0] < gradients.ALIKE < off[1]  # only the long one shows it
    rollouts = store.Rollouts("slope", "", prompt, responses, [0.0, 1.0], [False, False])
    assert gradients.why_not_shared(model, parameters, rollouts, 1.0) == "its rotary embedding changes with the length"


def test_logits_are_freed_before_the_backward_pass(tiny: Any) -> None:
    freed: list[bool] = []

    def watch(_: Any, __: Any, logits: torch.Tensor) -> None:
        storage = StorageWeakRef(logits.untyped_storage())
        logits.register_hook(lambda _: freed.append(storage.expired()))

    with tiny.lm_head.register_forward_hook(watch):
        for prompt in (None, gradients.keys_and_values(tiny, ids(PROMPT))):
            score_gradient(tiny, select_parameters(tiny, "last-qkv"), ids(PROMPT), ids(RESPONSE), 1.0, prompt)
    assert freed == [True, True]


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


def test_advantages_are_verls() -> None:
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    generator = np.random.default_rng(0)
    for rewards in ([1.0, 0.0, 0.0, 1.0, 1.0], [1.0] * 4, [0.0] * 3, [0.1] * 8, generator.normal(size=128)):
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
    response = ids(RESPONSE)
    logits = exact(input_ids=torch.tensor([ids(PROMPT) + response])).logits[0, len(PROMPT) - 1 : -1]
    log_prob = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(response)[:, None]).T  # [1 x L]
    ones = torch.ones_like(log_prob)
    loss, _ = compute_policy_loss_vanilla(
        log_prob.detach(), log_prob, advantage * ones, ones, "token-mean", config, rollout_is_weights=None
    )
    expected = by_autograd(loss * len(response), select_parameters(exact, "last-qkv"))
    assert differences(-advantage * score(exact, response), expected) < ROUNDING


def test_stored_groups_are_what_was_sampled(sampled: Path) -> None:
    stored = load(sampled, LAST_QKV)
    assert (stored.settings["model"], stored.settings["task"]) == (str(WEIGHTS), "tiny")
    assert [(group.kind, len(group.lengths)) for group in stored.groups] == [("slope", 6), ("pool", 3), ("pool", 3)]
    assert len({raw.prompt for raw in store.read_rollouts(sampled)}) == 3
    assert stored.dimension == stored.entries == 3 * (96 * 96 + 96)
    assert all(name.startswith("model.layers.2.self_attn.") for name in stored.settings["names"])
    model = models.load_model(str(WEIGHTS))
    parameters = select_parameters(model, "last-qkv")
    for group, raw in zip(stored.groups, store.read_rollouts(sampled), strict=True):
        assert isinstance(group.score_gradients, np.memmap)
        assert group.score_gradients.dtype == np.float32
        assert group.lengths.tolist() == [len(response) for response in raw.responses]
        assert group.rewards.tolist() == raw.rewards
        assert group.truncated.tolist() == raw.truncated
        assert group.advantages.tolist() == grpo_advantages(group.rewards).tolist()
        for row, response in zip(group.score_gradients, raw.responses, strict=True):
            expected = by_autograd(log_probability(model, raw.prompt_ids, response, 1.0), parameters)
            assert differences(torch.tensor(row), expected) < 1e-4


def test_stored_gradients_are_at_the_sampling_temperature(sampled: Path, tmp_path: Path, exact: Any) -> None:
    group = next(store.read_rollouts(sampled))
    settings = {**store.read_settings(sampled), "temperature": 0.5}
    store.write_rollouts(tmp_path, settings, [group])
    modules = "layers.2.self_attn.v_proj.weight"
    compute(tmp_path, modules)
    parameters = select_parameters(exact, modules)
    expected = flat(score_gradient(exact, parameters, group.prompt_ids, group.responses[0], 0.5))
    stored = load(tmp_path, folder_of(modules))
    assert differences(torch.tensor(stored.groups[0].score_gradients[0]).double(), expected) < 1e-5


def test_count_sketch_keeps_inner_products() -> None:
    generator = torch.Generator().manual_seed(0)
    k, seeds = 64, 400
    # Entries of one sign on average: only random signs keep their inner products unbiased.
    a = {"w": 0.5 + torch.randn(50, 20, generator=generator), "b": 0.5 + torch.randn(30, generator=generator)}
    b = {name: 0.5 * value + torch.randn(value.shape, generator=generator) for name, value in a.items()}
    true, scale = float(flat(a) @ flat(b)), float(flat(a).norm() * flat(b).norm())

    def estimated(seed: int) -> float:
        """By the signs and buckets of other names."""
        renamed = ({f"{name} {seed}": value for name, value in of.items()} for of in (a, b))
        return float(torch.dot(*map(CountSketch(k), renamed)))

    errors = np.array([estimated(seed) - true for seed in range(seeds)]) / scale
    # Var = (‖a‖²‖b‖² + (a·b)² − 2 Σ a²b²)/K (Charikar et al. 2002; Weinberger et al. 2009).
    sd = math.sqrt((1 + (true / scale) ** 2 - 2 * float((flat(a) ** 2) @ (flat(b) ** 2)) / scale**2) / k)
    assert abs(errors.mean()) < 4 * sd / math.sqrt(seeds)
    assert errors.std() == pytest.approx(sd, rel=0.15)
    assert sd <= math.sqrt(2 / k)


def test_count_sketch_is_the_same_in_any_order_and_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = {"w": torch.randn(40, 25, dtype=torch.float64), "b": torch.randn(7, dtype=torch.float64)}
    whole = CountSketch(32)(gradients)
    assert torch.allclose(CountSketch(32)(dict(reversed(gradients.items()))), whole, rtol=0, atol=1e-12)
    monkeypatch.setattr("vlnorm_verl.lab.sketch._AT_A_TIME", 7)
    assert torch.allclose(CountSketch(32)(gradients), whole, rtol=0, atol=1e-12)


def test_count_sketch_is_what_was_stored() -> None:
    """Stored sketches must stay comparable. If a release of torch draws other numbers, raise store.FORMAT."""
    sketch = CountSketch(7)({"w": torch.arange(1.0, 101.0)})
    assert sketch.tolist() == [-142.0, 301.0, 84.0, -347.0, 196.0, -217.0, 171.0]


PARTS = ("other", "layer 0", "layer 1", "layer 2")


def test_short_parts_are_not_projected(sampled: Path, tmp_path: Path) -> None:
    """Each of the three projections has 9,312 entries; a share of 10,000 holds them, one of 5,000 does not."""
    held = computed(sampled, tmp_path / "held", LAST_QKV, 30_000)
    assert np.array_equal(held.groups[0].score_gradients, load(sampled, LAST_QKV).groups[0].score_gradients)
    stored = computed(sampled, tmp_path / "not", LAST_QKV, 15_000)
    assert stored.dimension < stored.entries
    assert stored.parts["v_proj"] == slice(10_000, 15_000)


def test_projected_gradients_are_sketches_of_the_whole_ones(sampled: Path, tmp_path: Path, tiny: Any) -> None:
    stored = computed(sampled, tmp_path / "lab", "all", 4096)
    assert (stored.dimension, stored.entries) == (4096, 337_152)
    assert stored.parts == {name: slice(1024 * k, 1024 * (k + 1)) for k, name in enumerate(PARTS)}
    raw = list(store.read_rollouts(sampled))[1]
    for row, response in zip(stored.groups[1].score_gradients, raw.responses, strict=True):
        gradient = score_gradient(tiny, select_parameters(tiny, "all"), raw.prompt_ids, response, 1.0)
        for part, names in parts_of(list(gradient)).items():
            of_part = CountSketch(1024)({name: gradient[name] for name in names})
            assert differences(torch.tensor(row[stored.parts[part]]), of_part) < 1e-5


def test_many_entries_are_projected_unless_told_otherwise(sampled: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(gradients, "PROJECT_ABOVE", 10_000)
    monkeypatch.setattr(gradients, "PROJECTION", 128)
    for folder, modules, projection, dimension in (
        ("few", "layers.2.self_attn.v_proj", None, 96 * 97),
        ("many", "last-qkv", None, 126),
        ("told", "last-qkv", 0, 3 * 96 * 97),
    ):
        assert computed(sampled, tmp_path / folder, modules, projection).dimension == dimension


def test_one_gradient_is_held_at_a_time(sampled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of all parameters is as large as the model."""
    last: list[weakref.ref[torch.Tensor]] = []

    def noting(*arguments: Any) -> Any:
        assert all(gradient() is None for gradient in last)
        found = score_gradient(*arguments)
        last[:] = [weakref.ref(gradient) for gradient in found.values()]
        return found

    monkeypatch.setattr(gradients, "score_gradient", noting)
    computed(sampled, tmp_path / "lab", "all", 4096)
    assert last


def test_checkpointing_does_not_change_gradients(
    sampled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[None] = []
    monkeypatch.setattr(gradients, "_checkpoint", lambda model: used.append(_checkpoint(model)))
    recomputed = computed(sampled, tmp_path / "lab", LAST_QKV, checkpointing=True)
    assert used
    plain = load(sampled, LAST_QKV)
    assert np.allclose(plain.groups[0].score_gradients, recomputed.groups[0].score_gradients, rtol=1e-5, atol=1e-6)


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


def test_a_stopped_call_goes_on_to_the_same_bytes(
    sampled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "lab"
    out.mkdir()
    shutil.copy(sampled / store.ROLLOUTS, out)
    made, wanted = (folder / store.GRADIENTS / LAST_QKV for folder in (out, sampled))
    left = [9]  # two to try the cache with; the first prompt has six responses

    def stop(*arguments: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return score_gradient(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(gradients, "score_gradient", stop)
        with pytest.raises(KeyboardInterrupt):
            compute(out)
    assert sorted(path.name for path in made.iterdir()) == ["000.npy", "settings.json"]
    with pytest.raises(store.Incomplete, match="lacks the gradients of 2 prompts"):
        load(out, LAST_QKV)
    kept = (made / "000.npy").stat().st_mtime_ns
    compute(out)
    assert (made / "000.npy").stat().st_mtime_ns == kept
    for name in ("000.npy", "001.npy", "002.npy", "settings.json"):
        assert (made / name).read_bytes() == (wanted / name).read_bytes()


def test_gradients_of_other_settings_are_refused(sampled: Path) -> None:
    with pytest.raises(UserError, match=r'with other settings \(parts: .*"v_proj": 9312\} there, \{"q_proj": 21'):
        compute(sampled, LAST_QKV, 64)


def test_gradients_of_other_rollouts_or_weights_are_refused(sampled: Path, tmp_path: Path) -> None:
    shutil.copytree(sampled, tmp_path / "lab")
    settings, groups = store.read_settings(sampled), list(store.read_rollouts(sampled))
    store.write_rollouts(tmp_path / "lab", settings, groups[1:])
    with pytest.raises(UserError, match="gradients of other rollouts"):
        load(tmp_path / "lab", LAST_QKV)
    with pytest.raises(UserError, match="rollouts_sha256"):
        compute(tmp_path / "lab")
    store.write_rollouts(tmp_path / "other", {**settings, "weights": "0"}, groups)
    with pytest.raises(UserError, match="would not be on policy"):
        compute(tmp_path / "other")
