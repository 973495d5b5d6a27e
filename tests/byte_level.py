"""A model's folder with a tokenizer of bytes and without weights."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers


def byte_level_model(folder: Path, tokenizer_class: str) -> Path:
    """As LlamaTokenizerFast transformers 5 reads it wrongly, like that of DeepSeek-R1-Distill-Llama."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({token: at for at, token in enumerate(alphabet)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    settings = {"tokenizer_class": tokenizer_class, "unk_token": None, "bos_token": None, "eos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
