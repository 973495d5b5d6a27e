"""vLLM in a process of its own: reads a request, writes the responses to each prompt as one line of JSON.

Started by `vlnorm_verl.lab.rollouts`:

    python -m vlnorm_verl.lab.vllm_engine request.json responses.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(request_path: Path, responses_path: Path) -> None:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    request = json.loads(request_path.read_text(encoding="utf-8"))
    llm = LLM(**request["engine"])
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=ids) for ids in request["prompts"]],
        [SamplingParams(n=count, **request["sampling"]) for count in request["counts"]],
        use_tqdm=False,
    )
    with responses_path.open("w", encoding="utf-8") as file:
        for output in outputs:
            file.write(json.dumps([list(completion.token_ids) for completion in output.outputs]) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
