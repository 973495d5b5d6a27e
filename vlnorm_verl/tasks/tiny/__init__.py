"""A tiny CountDown task and a warm-started 0.3 M model: what the real stack is trained and tested on without a GPU.

``countdown`` the task and its reward; ``boxed`` the same under the reward of Math; ``data`` its files; ``model``
tokenizer and architecture; ``warmstart`` the command that made ``weights/``. Nothing is imported here: the reward
workers need neither torch nor transformers.
"""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""The shipped warm start, a Hugging Face model directory (see weights/warmstart.json for how it was made)."""
