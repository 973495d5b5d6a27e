"""Which extra of the package a command needs: `pip install 'vlnorm-verl[report]'`."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vlnorm_verl.files import UserError

# By command, its extra. The others need the first.
EXTRAS = {"report": "report", "lab": "lab"}
# What the code of an extra imports, beside what verl itself requires, which is always there.
MODULES = {
    "recipes": (
        "cachetools",
        "fastapi",
        "huggingface_hub",
        "msgspec",
        "psutil",
        "transfer_queue",
        "uvicorn",
    ),
    "report": ("jinja2", "matplotlib", "msgspec", "scipy"),
    "lab": ("jinja2", "matplotlib", "msgspec", "scipy"),
    "math": ("sympy",),
}


def require(extra: str) -> None:
    """Before long work: are the modules of an extra there?

    Raises:
        UserError: with what to install.
    """
    if missing := [name for name in MODULES[extra] if importlib.util.find_spec(name) is None]:
        raise UserError(f"not installed: {', '.join(missing)}. To install: pip install 'vlnorm-verl[{extra}]'")


@contextmanager
def named_if_missing(context: Any) -> Iterator[None]:
    """An import that fails inside for want of an extra is a UserError that names the extra.

    Args:
        context: of the command line; its sub-command is asked for when an import has failed.

    Raises:
        UserError: with what to install. Any other import that fails is what it was.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        needed = EXTRAS.get(context.invoked_subcommand, "recipes")
        for extra in (needed, "math"):
            if (error.name or "").partition(".")[0] in MODULES[extra]:
                require(extra)
        raise
