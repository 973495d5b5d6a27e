"""Whether a tokenizer keeps the texts that it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlnorm_verl.files import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def refuse_lost_spaces(tokenizer: PreTrainedTokenizerBase, model: str, texts: Sequence[str]) -> None:
    """The class that a tokenizer's configuration names may be of another kind than its file: LlamaTokenizerFast for
    byte-level tokens loses all spaces and line ends in transformers 5 (huggingface/transformers#45488).

    A right one may lose a few, beside special tokens or punctuation.

    Args:
        model: how the caller names the model, for the message.

    Raises:
        UserError: fewer than half of the texts' words come back from their tokens.
    """
    back = [tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    lost = [len(text.split()) - len(found.split()) for text, found in zip(texts, back, strict=True)]
    if 2 * sum(lost) > sum(len(text.split()) for text in texts):
        worst = lost.index(max(lost))
        raise UserError(
            f"{model}: its tokenizer, read as {type(tokenizer).__name__}, loses spaces and line ends: the text "
            f"{texts[worst][:60]!r} comes back as {back[worst][:60]!r}. In a local copy of the model, set "
            "`tokenizer_class` in tokenizer_config.json to the kind that tokenizer.json is of, for example "
            "PreTrainedTokenizerFast, which takes that file as it is"
        )
