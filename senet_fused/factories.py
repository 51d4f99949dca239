"""FILE.py:FACTORY, as a network is named on the command line: what a function, or class, in a file returns."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .arguments import RequestError

__all__ = ["factory_of_file"]


@contextlib.contextmanager
def factory_of_file(path: Path, name: str) -> Iterator[Callable[..., Any]]:
    """The function of this name, of a file that is run. Within the block its folder can be imported from.

    Raises:
        RequestError: there is no such file or function, or running the file fails.
    """
    if not path.is_file():
        raise RequestError(f"there is no file {path} (for the model {path}:{name})")
    spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", f"model of {path.resolve()}"), path)
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.modules[spec.name] = module  # as for an import: classes look their module up
    sys.path.insert(0, folder)
    try:
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise RequestError(f"running {path} failed: {type(error).__name__}: {error}") from error
        make = getattr(module, name, None)
        if not callable(make):
            own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            has = f"it has {', '.join(own)}" if own else "it has none"
            raise RequestError(f"{path} has no function {name!r} that returns a network; {has}")
        yield make
    finally:
        sys.path.remove(folder)
