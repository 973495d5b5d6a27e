"""Which extra of the package a command needs: `pip install '.[report]'` in its checkout."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from vlnorm_verl.files import UserError

# What the code of an extra imports, beside what verl itself requires, which is always there.
MODULES = {
    "recipes": ("cachetools", "fastapi", "huggingface_hub", "msgspec", "psutil", "transfer_queue", "uvicorn"),
    "report": ("jinja2", "matplotlib", "msgspec", "scipy"),
    "lab": ("jinja2", "matplotlib", "msgspec", "scipy"),
    "math": ("sympy",),
}


def missing(extra: str) -> list[str]:
    """The modules of an extra that are not there."""
    return [name for name in MODULES[extra] if importlib.util.find_spec(name) is None]


def how(extra: str) -> str:
    return f"pip install '.[{extra}]' in a checkout of vlnorm-verl"


def require(extra: str) -> None:
    """Before long work: are the modules of an extra there?

    Raises:
        UserError: with what to install.
    """
    if names := missing(extra):
        raise UserError(f"not installed: {', '.join(names)}. To install: {how(extra)}")


@contextmanager
def named_if_missing() -> Iterator[None]:
    """An import that fails inside for want of an extra is a UserError that names the extra.

    Raises:
        UserError: with what to install. Any other import that fails is what it was.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        for extra in ("recipes", "math"):  # a command that needs another one asks `require` first
            if (error.name or "").partition(".")[0] in MODULES[extra]:
                require(extra)
        raise
