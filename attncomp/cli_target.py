"""Loading what a command works on: ``FILE.py:FACTORY``, where the factory returns a model and its arguments."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from attncomp.errors import TargetError
from attncomp.policy_reader import nearest

_SHAPE = "Return (model, args) or (model, args, kwargs), as in: return model, (input_ids,), {}"


def load_target(target: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Import the file, call the factory, and check what it returns.

    The file's folder is first on `sys.path` while it is imported and called, so that it can import its neighbours.

    Raises:
        TargetError: the text is no target, the file or factory is missing or fails, or the result has the wrong shape.
    """
    name, separator, function = target.rpartition(":")
    if not separator or not function.isidentifier() or not name.endswith(".py"):
        raise TargetError(f'"{target}" is not FILE.py:FACTORY', fix="Write it as in examples/model.py:build")
    path = Path(name).expanduser().absolute()
    if not path.is_file():
        raise TargetError("there is no such file", where=name, fix="Check the path")
    folder = str(path.parent)
    sys.path.insert(0, folder)
    try:
        result = _call(_factory(_import(path, name), name, function), path, name, function)
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
    return _checked(result, f"{name}:{function}")


def _import(path: Path, name: str) -> ModuleType:
    # A name of its own, so that a file called like an installed package does not take that package's place.
    spec = importlib.util.spec_from_file_location(f"attncomp_target_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise TargetError("the file can't be imported", where=name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise _raised(error, path, name, "importing the file failed") from error
    return module


def _factory(module: ModuleType, name: str, function: str) -> object:
    factory = vars(module).get(function)
    if factory is None:
        functions = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        raise TargetError(
            f'the file has no function "{function}"',
            where=name,
            fix=f"{nearest(function, functions)}Its functions are {', '.join(functions) or 'none'}",
        )
    return factory


def _call(factory: object, path: Path, name: str, function: str) -> object:
    where = f"{name}:{function}"
    if not callable(factory):
        raise TargetError(f'"{function}" is a {type(factory).__name__}, not a function', where=where)
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise TargetError(f"the factory can't be called without arguments: {error}", where=where) from error
    except ValueError:  # a callable without a signature, such as a built-in: the call will tell
        pass
    try:
        return factory()
    except (Exception, SystemExit) as error:
        raise _raised(error, path, name, f'the factory "{function}" failed') from error


def _checked(result: object, where: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    if not isinstance(result, (tuple, list)) or len(result) not in (2, 3):
        size = f" of {len(result)}" if isinstance(result, (tuple, list)) else ""
        raise TargetError(f"the factory returned a {type(result).__name__}{size}", where=where, fix=_SHAPE)
    model, args, kwargs = (*result, {})[:3]
    if not callable(model):
        raise TargetError(f"the model is a {type(model).__name__}, which can't be called", where=where, fix=_SHAPE)
    if not isinstance(args, (tuple, list)):
        raise TargetError(f"args must be a tuple, not a {type(args).__name__}", where=where, fix=_SHAPE)
    if not isinstance(kwargs, dict) or not all(isinstance(key, str) for key in kwargs):
        what = "with keys that are no strings" if isinstance(kwargs, dict) else f"not a {type(kwargs).__name__}"
        raise TargetError(f"kwargs must be a dict of names, {what}", where=where, fix=_SHAPE)
    return model, tuple(args), kwargs


def _raised(error: BaseException, path: Path, name: str, what: str) -> TargetError:
    """The user's exception, at the last line of the user's file that it passed."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        line = error.lineno
    else:
        frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
        line = frames[-1] if frames else None
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return TargetError(f"{what}: {said}", where=f"{name}:{line}" if line else name)
