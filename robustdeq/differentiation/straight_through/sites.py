"""Where in a model's own code a call was made, and how often."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch

import robustdeq


@dataclass(frozen=True)
class Interception:
    """A call that would have cut or bent the gradient, and that was given another backward pass.

    Attributes:
        operation: what was called, as in "detach", "round" or "autograd.Function Quantize".
        file: where, as the file's name with its parent folder.
        line: the line of the first frame that is neither torch's nor the core's.
        count: how often in one forward pass.
    """

    operation: str
    file: str
    line: int
    count: int = 1


class Site(tuple[str, str, int]):
    """Operation, file and line; what a call is told apart by."""

    __slots__ = ()


_ROOTS = tuple(str(Path(str(m.__file__)).resolve().parent) + "/" for m in (torch, np))
_CORE = str(Path(robustdeq.__file__).resolve().parent) + "/"
_PLUGINS = (_CORE + "defenses/", _CORE + "attacks/")
_GRAD_MODE = torch.no_grad.__enter__.__code__.co_filename
_GLUE = ("/contextlib.py", "/functools.py", "/copy.py", "/collections/__init__.py")
_CHECKERS = ("/jaxtyping/", "/beartype/")


@cache
def is_foreign(filename: str) -> bool:
    """Whether a file holds a model's code, not torch's, NumPy's or the core's."""
    if filename.startswith("<"):
        return not filename.startswith(("<frozen", "<@"))
    path = str(Path(filename).resolve())
    if path.startswith(_CORE):
        return path.startswith(_PLUGINS)
    foreign = not path.startswith(_ROOTS) and not path.endswith(_GLUE)
    return foreign and not any(part in path for part in _CHECKERS)


def short(filename: str) -> str:
    """The file's name with its parent folder."""
    return "/".join(Path(filename).parts[-2:])


def calling_site(operation: str, boundary: CodeType) -> Site:
    """The innermost frame of a model's own code, or else of torch's, above `boundary`."""
    frame: FrameType | None = sys._getframe(1)
    inner: FrameType | None = None
    while frame is not None and frame.f_code is not boundary:
        name = frame.f_code.co_filename
        if is_foreign(name):
            return Site((operation, short(name), frame.f_lineno))
        if inner is None and "torch/nn/modules/" in name and "/module.py" not in name:
            inner = frame
        frame = frame.f_back
    if inner is None:
        return Site((operation, "", 0))
    return Site((operation, short(inner.f_code.co_filename), inner.f_lineno))


def called_by_model(depth: int = 2) -> bool:
    """Whether the function that asks was called by a model's own code directly."""
    return is_foreign(sys._getframe(depth).f_code.co_filename)


def leaving_region(depth: int) -> bool:
    """Whether the frame `depth` levels up, or the one above it, is the end of a `no_grad`."""
    codes = [sys._getframe(depth + k).f_code for k in (1, 2)]
    return any(c.co_name == "__exit__" and c.co_filename == _GRAD_MODE for c in codes)


def entering_region(depth: int = 2) -> bool:
    """Whether the function that asks was called at the beginning of a `no_grad` not of the core."""
    frame = sys._getframe(depth)
    outer = frame.f_back
    if frame.f_code.co_filename != _GRAD_MODE or outer is None:
        return False
    return not outer.f_code.co_filename.startswith(_CORE + "differentiation/")


def definition_site(operation: str, function: Any) -> Site:
    """Where a function, or an object's class, is defined."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if code is None and callable(function):
        code = getattr(type(function).__call__, "__code__", None)
    if code is None:
        return Site((operation, "", 0))
    return Site((operation, short(code.co_filename), code.co_firstlineno))
