"""Sampling by vLLM, in a process of its own, so that its memory is free again for the gradients.

The process reads what is asked for as JSON and writes each response as a line of JSON when it is finished. What vLLM
prints goes to the lab's vllm.log.

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
from vlnorm_verl.lab.engines import Request, Sampled, prompt_of_each, seed_of

LOG = "vllm.log"


def responses(resolved: str, request: Request, out: Path, finished: Set[int] = frozenset()) -> Sampled:
    """Responses to the prompts of the request, those that are finished first coming first.

    Args:
        resolved: what vLLM loads.
        out: the lab's folder.
        finished: numbers of prompts that need no responses any more.

    Raises:
        UserError: vLLM ended without all of them.
    """
    import torch

    from vlnorm_verl.cpu import cpu_environment

    places = [(place, number) for place, number in enumerate(prompt_of_each(request.counts)) if number not in finished]
    missing = len(places)
    if not missing:
        return
    on_gpu = torch.accelerator.is_available()
    asked = {
        "engine": {
            "model": resolved,
            "dtype": "auto" if on_gpu else "float32",
            "max_model_len": max(map(len, request.prompts)) + request.max_response_length,
            "enforce_eager": not on_gpu,  # without compiling, as the recipes for the CPU
        },
        "sampling": {
            "temperature": request.temperature,
            "top_p": 1.0,
            "max_tokens": request.max_response_length,
            "stop_token_ids": sorted(request.ends),
            "detokenize": False,
        },
        "prompts": request.prompts,
        # Each response has a seed of its own. One that a stop cut off comes again then, and the prompts that were
        # finished before it, those with short responses, are not too many.
        "places": [(place, number, seed_of(request.seed, place)) for place, number in places],
    }
    with tempfile.TemporaryFile("w+") as stdin, (out / LOG).open("wb") as log:
        json.dump(asked, stdin)
        stdin.seek(0)
        with subprocess.Popen(
            [sys.executable, "-m", __name__],
            env={
                **os.environ,
                **({} if on_gpu else cpu_environment()),
                # vLLM's engine in a process of its own would outlive this one's SIGTERM, and keep the GPU's memory.
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                # It compiles at the start, for which a GPU node may lack CUDA's toolkit, and takes no seeds.
                "VLLM_USE_FLASHINFER_SAMPLER": "0",
            },
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process:
            assert process.stdout is not None
            try:
                for line in itertools.islice(process.stdout, missing):
                    missing -= 1
                    place, tokens = json.loads(line)
                    yield place, tokens
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
    for place, number, seed in asked["places"]:
        sampling = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, seed=seed, **asked["sampling"])
        engine.add_request(str(place), TokensPrompt(prompt_token_ids=asked["prompts"][number]), sampling)
    while engine.has_unfinished_requests():
        for output in engine.step():
            print(json.dumps([int(output.request_id), list(output.outputs[0].token_ids)]), file=answers, flush=True)


if __name__ == "__main__":
    main()
