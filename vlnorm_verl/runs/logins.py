"""Whether a logger of a run can log in where verl's driver runs, asked before anything is started.

Covered: wandb and SwanLab. Not covered: whether the server takes what is there.
"""

from __future__ import annotations

import os
from pathlib import Path

# What a logger needs: one of these variables, or another mode than online, or a login.
LOGINS = {
    "wandb": (("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"), "WANDB_MODE", ("offline", "disabled")),
    "swanlab": (("SWANLAB_API_KEY",), "SWANLAB_MODE", ("local", "offline", "disabled")),
}


def missing_logins(loggers: list[str]) -> list[str]:
    """What a logger of the run lacks in this process, each as a message."""
    given = os.environ.get
    problems = []
    for logger, (keys, mode, enough) in LOGINS.items():
        if logger not in loggers or any(map(given, keys)) or given(mode) in enough or has_login(logger):
            continue
        ways = f"{mode}={'|'.join(enough)}, or `{logger} login`"
        problems.append(f"logger {logger} needs {' or '.join(keys)} (or {ways})")
    return problems


def has_login(logger: str) -> bool:
    """Whether what `wandb login` or `swanlab login` writes is there. A server of one's own may have any name."""
    given = os.environ.get
    if logger == "swanlab":
        folders = ".swanlab", given("SWANLAB_ROOT") or given("SWANLAB_SAVE_DIR") or os.path.expanduser("~/.swanlab")
        return any(os.path.isfile(f"{folder}/.netrc") for folder in folders)
    file = Path(given("NETRC") or "~/.netrc").expanduser()
    own_server = given("WANDB_BASE_URL") or os.path.isfile(os.path.expanduser("~/.config/wandb/settings"))
    return file.is_file() and bool(own_server or "wandb" in file.read_text(errors="replace"))
