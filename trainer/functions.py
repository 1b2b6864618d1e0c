"""A person's own Python function, named `module:function` on the command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.faults import ConfigFault, first_line


def load_function(flag: str, name: str) -> Callable[..., Any]:
    """The function that `module:function` names; modules of the working directory are found.

    Raises `ConfigFault` for another form, a module that does not import, or no such function in it.
    """
    module_name, tied, function_name = name.partition(":")
    if not tied or not module_name or not function_name:
        raise ConfigFault(f"{flag} {name}: must be module:function")
    if "" not in sys.path:  # an installed command does not look into the working directory
        sys.path.insert(0, "")
    module_name = module_name.removesuffix(".py")
    _forget_namesake(module_name)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module may raise anything when it is imported
        raise ConfigFault(f"{flag} {name}: `{module_name}` does not import: {first_line(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigFault(f"{flag} {name}: `{module_name}` has no function `{function_name}`")
    return function


def _forget_namesake(module_name: str) -> None:
    """Forget a module of the same name that was imported from elsewhere than the working directory."""
    here = Path(*module_name.split(".")).with_suffix(".py").resolve()
    known = getattr(sys.modules.get(module_name), "__file__", None)
    if here.is_file() and known and Path(known).resolve() != here:
        del sys.modules[module_name]
        importlib.invalidate_caches()
