"""A user's own model: the function that builds it, in a Python file or a module. Runs the user's code.

A file is imported under a name made of its path and content: two files named `model.py` do not meet, an
edited file is read anew, and the same file keeps its classes. While user code runs its folder leads
`sys.path`, as for a script.
"""

import difflib
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

from doconv_convert.errors import DoconvError


def load_module(place: str) -> ModuleType:
    """Imports 'path/to/file.py' or 'package.module' (the working directory is searched too).

    Raises DoconvError where it is missing or its own code raises.
    """
    return _import_file(place) if place.endswith(".py") else _import_module(place)


def call_factory(place: str, factory: str, args: Mapping[str, Any]) -> object:
    """Calls `factory(**args)` of the module at `place`.

    Raises DoconvError where it is missing, no function, or raises.
    """
    text = f"{place}:{factory}"
    module = load_module(place)
    function = getattr(module, factory, None)
    if function is None:
        functions = [name for name, value in vars(module).items() if callable(value)]
        raise DoconvError(f"'{place}' has no factory '{factory}'{nearest(factory, functions)}")
    # an nn.Module is callable, but calling it is a forward
    if not callable(function) or (hasattr(function, "forward") and not isinstance(function, type)):
        kind = type(function).__name__
        raise DoconvError(f"'{text}' is of type {kind}, expected a function that returns the model")
    with _leading_path(_search_folder(place)), user_code(text):
        return function(**args)


@contextmanager
def user_code(text: str) -> Iterator[None]:
    """Around code that is not ours: what it raises, SystemExit too, becomes a DoconvError that names `text`.

    What it prints goes to stderr: stdout belongs to our own answers.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except DoconvError:
        raise
    except (Exception, SystemExit) as error:
        raise DoconvError(f"'{text}' raised {type(error).__name__}: {error}") from error


def nearest(name: str, names: Iterable[str]) -> str:
    """The words "; did you mean 'a' or 'b'?", or none where no name is near."""
    close = difflib.get_close_matches(name.lower(), sorted(names), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(one) for one in close)}?" if close else ""


def _import_file(place: str) -> ModuleType:
    path = Path(place).expanduser().resolve()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DoconvError(f"cannot read '{place}': {error.strerror}; give a Python file") from error
    digest = hashlib.sha256(os.fsencode(path) + b"\0" + content).hexdigest()[:16]
    name = f"doconv_source_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise DoconvError(f"cannot import '{place}': it is no Python file; give the path of one")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        with _leading_path(path.parent), user_code(place):
            spec.loader.exec_module(module)
    except DoconvError:
        del sys.modules[name]
        raise
    return module


def _import_module(place: str) -> ModuleType:
    importlib.invalidate_caches()
    with _leading_path(Path.cwd()), user_code(place):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise  # found, but it imports something that is missing
            raise DoconvError(
                f"no module '{error.name}' for '{place}': run from its folder or put it on PYTHONPATH"
            ) from error


def _search_folder(place: str) -> Path:
    return Path(place).expanduser().resolve().parent if place.endswith(".py") else Path.cwd()


@contextmanager
def _leading_path(folder: Path) -> Iterator[None]:
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path and str(folder) not in before:
            sys.path.remove(str(folder))
