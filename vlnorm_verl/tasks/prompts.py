"""The paper's two prompts, to the character. Pure Python: safe to import anywhere.

The templates are data of the authors' repository (github.com/zerolllin/Delta-L-Normalization):
``examples/data_preprocess/countdown.py`` (template ``base``) and ``open_reasoner_zero_nochat.py``. The base models
have no chat template, so each prompt is the complete text that the model continues. Three details that an editor
would "repair" and that are kept, because they change the tokens:

- nothing follows ``<think>``: no newline, no blank;
- the Math template has a blank before its empty line (``... </answer>. \\n\\nUser:``);
- the Math prompt is NOT Open-Reasoner-Zero's own: case, tags and line breaks differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

COUNTDOWN_TEMPLATE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer.\n"
    "User: Using the numbers {numbers}, create an equation that equals {target}. You can use basic arithmetic "
    "operations (+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. And "
    "return the final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>.\n"
    "Assistant: Let me solve this step by step.\n"
    "<think>"
)

MATH_TEMPLATE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
    "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. \n"
    "\n"
    "User: You must put your answer inside <answer> </answer> tags, i.e.,\n"
    "<answer> answer here </answer>. And your final answer will be extracted automatically by the \\boxed{} tag.\n"
    "{question}\n"
    "Assistant: <think>"
)


def countdown_prompt(numbers: Iterable[int], target: int) -> str:
    """The CountDown prompt; the numbers read ``[44, 19, 35]``."""
    return COUNTDOWN_TEMPLATE.format(numbers=[int(n) for n in numbers], target=target)


def math_prompt(question: str) -> str:
    """The Math prompt. The question is taken as it is: its braces, blanks and line breaks stay."""
    return MATH_TEMPLATE.replace("{question}", question)


def template_sha256(template: str) -> str:
    """What the manifest records, so that data made with other prompts is noticed."""
    return hashlib.sha256(template.encode()).hexdigest()
