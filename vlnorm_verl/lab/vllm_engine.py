"""Sampling by vLLM, in a process of its own, so that its memory is free again for the gradients.

The process reads what is asked for as JSON and writes the responses to each prompt as a line of JSON when they are
finished. What vLLM prints goes to the lab's vllm.log.

    python -m vlnorm_verl.lab.vllm_engine < request.json > responses.jsonl
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Set
from pathlib import Path

from vlnorm_verl.files import UserError
from vlnorm_verl.lab.engines import Request, Sampled

LOG = "vllm.log"


def responses(resolved: str, request: Request, out: Path, finished: Set[int] = frozenset()) -> Sampled:
    """Responses to each prompt of the request, those that are finished first coming first.

    Args:
        resolved: what vLLM loads.
        out: the lab's folder.
        finished: numbers of prompts that need no responses any more.

    Raises:
        UserError: vLLM ended without all of them.
    """
    import torch

    from vlnorm_verl.cpu import cpu_environment

    missing = len(request.prompts) - len(finished)
    if not missing:
        return
    on_gpu = torch.cuda.is_available()
    asked = {
        "engine": {
            "model": resolved,
            "dtype": "auto" if on_gpu else "float32",
            "max_model_len": max(map(len, request.prompts)) + request.max_response_length,
            "seed": request.seed + len(finished),  # the noise of the first prompts is not to come again
            "enforce_eager": not on_gpu,  # without compiling, as the recipes for the CPU
        },
        "sampling": {
            "temperature": request.temperature,
            "top_p": 1.0,
            "max_tokens": request.max_response_length,
            "stop_token_ids": sorted(request.ends),
            "detokenize": False,
        },
        "prompts": [
            (number, tokens, count)
            for number, (tokens, count) in enumerate(zip(request.prompts, request.counts, strict=True))
            if number not in finished
        ],
    }
    with tempfile.TemporaryFile("w+") as stdin, (out / LOG).open("wb") as log:
        json.dump(asked, stdin)
        stdin.seek(0)
        with subprocess.Popen(
            [sys.executable, "-m", __name__],
            env={**os.environ, **({} if on_gpu else cpu_environment())},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process:
            assert process.stdout is not None
            try:
                for line in itertools.islice(process.stdout, missing):
                    missing -= 1
                    number, tokens = json.loads(line)
                    yield number, tokens
            except BaseException:  # a call that is stopped does not wait for vLLM
                process.terminate()
                raise
    if missing:
        raise UserError(
            f"--engine vllm: vLLM ended with exit code {process.returncode}, see {out / LOG}; or take transformers"
        )


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints

    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    asked = json.load(sys.stdin)
    engine = LLM(**asked["engine"]).llm_engine
    for number, tokens, count in asked["prompts"]:
        sampling = SamplingParams(n=count, output_kind=RequestOutputKind.FINAL_ONLY, **asked["sampling"])
        engine.add_request(str(number), TokensPrompt(prompt_token_ids=tokens), sampling)
    while engine.has_unfinished_requests():
        for output in engine.step():
            finished = [list(completion.token_ids) for completion in output.outputs]
            print(json.dumps([int(output.request_id), finished]), file=answers, flush=True)


if __name__ == "__main__":
    main()
