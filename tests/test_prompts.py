"""A base model gets a recipe's prompt and nothing else: the token ids of verl's rollout are the prompt's own.

Covered: verl's model config with the recipes' custom_chat_template, the dataset's length filter and the agent loop's
prompt builder, on a Qwen2 tokenizer that has a chat format of its own, as Qwen2.5's base models have.
Not covered: the published tokenizers (no network); what vLLM does after it is given the ids.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from transformers import Qwen2Config, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from vlnorm_verl.runs.config import compose
from vlnorm_verl.tasks import countdown, math

CONFIG = Path(__file__).parent.parent / "recipes" / "config"
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS = {
    "countdown": countdown.prompt(countdown.Problem((44, 19, 35), 98)),
    "math": math.prompt("What is $\\frac{1}{2} + \\boxed{x}$?\n  Zweite Zeile: übrig?\n"),
}


def byte_level_tokenizer(chat_template: str) -> Qwen2Tokenizer:
    """One token a byte: encodes any text."""
    vocabulary = {letter: i for i, letter in enumerate(bytes_to_unicode().values())}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], eos_token="<|endoftext|>", chat_template=chat_template)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as of a base model: byte-level Qwen2 tokenizer, its special tokens, its own chat format."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_level_tokenizer(CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1, architectures=["Qwen2ForCausalLM"]
    ).save_pretrained(folder)
    return folder


def tokenizer_of_verl(model: Path, task: str, *overrides: str) -> Any:
    """The tokenizer as verl's workers build it from a recipe."""
    from verl.utils.config import omega_conf_to_dataclass

    config = compose(CONFIG, [f"task={task}", f"actor_rollout_ref.model.path={model}", *overrides])
    return omega_conf_to_dataclass(config.actor_rollout_ref.model).tokenizer


def rollout_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The ids that verl's single-turn agent loop hands to vLLM."""
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    builder = create_continuous_token_builder(tokenizer, hf_model_type="qwen2", chat_template_kwargs={})
    return list(builder.build_initial_tokens([{"role": "user", "content": prompt}]))


@pytest.mark.parametrize("task", list(PROMPTS))
def test_the_rollout_gets_the_prompt_itself(model_folder: Path, task: str) -> None:
    tokenizer = tokenizer_of_verl(model_folder, task)
    ids = rollout_ids(tokenizer, PROMPTS[task])
    assert ids == tokenizer(PROMPTS[task], add_special_tokens=False)["input_ids"]
    assert bytes(tokenizer.decode(ids), "utf-8") == bytes(PROMPTS[task], "utf-8")
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_without_the_recipes_template_it_would_not(model_folder: Path) -> None:
    tokenizer = tokenizer_of_verl(model_folder, "math", "actor_rollout_ref.model.custom_chat_template=null")
    text = tokenizer.decode(rollout_ids(tokenizer, PROMPTS["math"]))
    assert text.startswith("<|im_start|>system")
    assert text.endswith("<|im_start|>assistant\n")


def test_the_length_filter_counts_the_prompt_alone(model_folder: Path, tmp_path: Path) -> None:
    from verl.utils.dataset.rl_dataset import RLHFDataset

    tokenizer = tokenizer_of_verl(model_folder, "countdown")
    length = len(rollout_ids(tokenizer, PROMPTS["countdown"]))
    row = {"prompt": [{"role": "user", "content": PROMPTS["countdown"]}], "data_source": "countdown"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train.parquet")
    kept = []
    for limit in (length, length - 1):
        config = compose(CONFIG, [f"data.max_prompt_length={limit}"]).data
        OmegaConf.update(config, "cache_dir", str(tmp_path / "cache"), force_add=True)
        kept.append(len(RLHFDataset(str(tmp_path / "train.parquet"), tokenizer, config)))
    assert kept == [1, 0]
