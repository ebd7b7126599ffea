"""Either a result or a refusal in one line: what input from anywhere must lead to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from robustdeq.errors import RobustDEQError, sentence

T = TypeVar("T")


def attempt(call: Callable[[], T]) -> tuple[T | None, str]:
    """What a call gives, or the sentence that the command line would print; else it raises."""
    try:
        return call(), ""
    except RobustDEQError as refusal:
        said = sentence(refusal)
        if not said or not said.isprintable():
            raise AssertionError(f"this is no sentence: {said!r}") from refusal
        return None, said
