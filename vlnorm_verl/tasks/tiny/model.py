"""The tiny model: a character-level tokenizer and a Qwen2 of 0.3 M parameters, as ordinary Hugging Face files.

Covered: both load with ``AutoTokenizer`` / ``AutoModelForCausalLM.from_pretrained(directory)``, without network,
in transformers, verl and vLLM. The chat template passes a message through unchanged, so that the ids that verl
makes of a prompt are exactly the prompt's characters. Not covered: text outside the task's alphabet, which the
tokenizer drops.

The head size is 32 because vLLM's CPU attention has no kernel below it.
"""

from __future__ import annotations

from transformers import Qwen2Config, Qwen2Tokenizer

from vlnorm_verl.tasks.tiny.countdown import TENS_LETTERS, UNITS_LETTERS

PAD = "<pad>"
EOS = "."  # ends every answer, so the text of a trace needs no extra mark
ALPHABET = "0123456789+-*=;!A:,>" + TENS_LETTERS + UNITS_LETTERS
# Byte-level BPE's letter for "\n". The task has no line breaks, but verl's agent loop refuses a Qwen2 tokenizer to
# which one is not exactly one token (verl/utils/tokenizer/continuous_token.py:558).
NEWLINE = "Ċ"
VOCABULARY = (PAD, EOS, NEWLINE, *ALPHABET)
MAX_POSITIONS = 512

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def build_tokenizer() -> Qwen2Tokenizer:
    """One token per character: Qwen2's own tokenizer class with a vocabulary of characters and no merges.

    transformers 5 loads every directory whose config says qwen2 with this class, whatever its
    tokenizer_config.json names, so another class would be saved but never loaded.
    """
    return Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(VOCABULARY)},
        merges=[],
        pad_token=PAD,
        unk_token=PAD,  # never produced; the class's default would add a token of its own
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )


def build_config() -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=VOCABULARY.index(PAD),
        eos_token_id=VOCABULARY.index(EOS),
        bos_token_id=None,
        dtype="float32",
    )
