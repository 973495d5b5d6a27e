"""Puts wrappers around verl's names when verl imports their modules.

Loading the plugin costs nothing in processes that never train: wrapt's post-import hooks wait for verl. A function gets
its wrapper as its own code (`replace`), so that whoever took the function out of its module before has it too. What a
release lacks is logged as a WARNING and leaves stock verl as it was; a config that asks for one of our modes is then
refused with the names that are missing.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import types
from collections.abc import Callable, Mapping
from typing import Any

import wrapt

from vlnorm_verl.plugin import names, releases
from vlnorm_verl.plugin.names import MODE_KEY, VerlName, verl_version

logger = logging.getLogger(__name__)

Wrapper = Callable[[Any], Any]  # makes what replaces a function of verl's
_wrappers: dict[tuple[str, str], Wrapper] = {}  # by module and name
# What became of each module of NAMES that verl has imported: None if all is there, else what is lacking.
_outcome: dict[str, str | None] = {}


def wrap_on_import(wrappers: Mapping[tuple[str, str], Wrapper]) -> None:
    """Have every name of NAMES checked, and wrapped by `wrappers`, as soon as verl imports its module."""
    _wrappers.update(wrappers)
    for module_name in dict.fromkeys(name.module for name in names.NAMES):
        wrapt.register_post_import_hook(_apply, module_name)


def _apply(module: types.ModuleType) -> None:
    """Check the names of a module that verl has just imported; wrap them if all are as expected, else none."""
    relied_on = [name for name in names.NAMES if name.module == module.__name__]
    try:
        problems = [text for name in relied_on if (text := problem(module, name))]
        if not problems:
            for name in relied_on:
                _wrap(module, name)
    except Exception as error:  # the import of verl must go on; whoever asks for our modes is told in require_installed
        problems = [f"{module.__name__}: {type(error).__name__}: {error}"]
    _outcome[module.__name__] = "; ".join(problems) or None
    if problems:
        logger.warning("vlnorm-verl cannot extend this release of verl: it lacks %s", "; ".join(problems))


def problem(module: types.ModuleType, name: VerlName) -> str | None:
    """What a module of verl lacks of a name; None: nothing."""
    value: Any = module
    for part in name.name.split("."):
        value = getattr(value, part, None)
    if value is None:
        return f"{name.module}.{name.name} ({name.why})"
    missing = [p for p in name.parameters if p not in inspect.signature(value).parameters]
    return f"{', '.join(missing)} of {name.module}.{name.name} ({name.why})" if missing else None


def _wrap(module: types.ModuleType, name: VerlName) -> None:
    wrapper = _wrappers.get((name.module, name.name))
    if wrapper is None:
        return
    *owners, attribute = name.name.split(".")
    owner = functools.reduce(getattr, owners, module)
    value = getattr(owner, attribute)
    if isinstance(value, types.FunctionType) and value.__closure__ is None:
        replace(value, wrapper)
    else:  # of a fork or a user, or with super(): whoever took it out of its module keeps what it has
        setattr(owner, attribute, wrapper(value))


def _call(*args: Any, **kwargs: Any) -> Any:
    return _slot(*args, **kwargs)  # type: ignore[name-defined]  # noqa: F821


def replace(function: types.FunctionType, wrapper: Wrapper) -> None:
    """Makes `function` do what `wrapper` makes of it, for everybody who holds it, under whatever name.

    A module that verl imports before the plugin may have said `from verl.trainer.ppo.core_algos import agg_loss`.
    """
    stock = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    functools.update_wrapper(stock, function)
    del stock.__wrapped__  # type: ignore[attr-defined]
    stock.__kwdefaults__ = function.__kwdefaults__
    slot = f"_vlnorm_verl_{function.__name__}"  # in the globals of the function's own module, with which code runs
    function.__globals__[slot] = wrapper(stock)
    function.__code__ = _call.__code__.replace(co_names=(slot,), co_name=function.__name__)
    function.__defaults__ = function.__kwdefaults__ = None
    function.__wrapped__ = stock  # type: ignore[attr-defined]


def lacking() -> list[str]:
    """What the installed verl lacks of the names that every run needs."""
    needed = dict.fromkeys(name.module for name in names.NAMES if name.needed)
    for module_name in needed:
        try:
            importlib.import_module(module_name)
        except ImportError as error:
            _outcome[module_name] = f"{module_name} ({error})"
    return [reason for name in needed if (reason := _outcome.get(name, f"{name} not patched"))]


def require_installed(mode: object) -> None:
    """Raises RuntimeError if a name that every run needs is not there, or the plugin is not loaded."""
    if missing := lacking():
        raise RuntimeError(
            f"{MODE_KEY}={mode!r} is not available: vlnorm-verl did not get into the installed verl "
            f"{verl_version()}, which lacks: {'; '.join(missing)}. {releases.how_to_load()}"
        )
