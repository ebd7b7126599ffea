"""The ways in which a user's run can go wrong, each one sentence long."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from robustdeq.texts import one_line


class RobustDEQError(Exception):
    """Base of every error that is shown to the user as one sentence."""


class UsageError(RobustDEQError):
    """What was asked for cannot be started: exit code 2."""


class CaseError(RobustDEQError):
    """One row cannot be computed; the others go on: exit code 1."""


class StorageError(RobustDEQError):
    """Results cannot be kept, so that the run cannot go on: exit code 1."""


class DamagedError(UsageError):
    """A file is not as it was written: which, why in words, and what to do, as parts of a sentence.

    Its exit code is that of wrong usage where nothing can be computed in the file's place.
    """

    def __init__(self, path: Path, cause: str, remedy: str) -> None:
        super().__init__(path, cause, remedy)
        self.path, self.cause, self.remedy = path, cause, remedy

    def __str__(self) -> str:
        return f"{self.path} is damaged ({self.cause}); {self.remedy}"


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not registered, with the nearest known names.

    Example: ``unknown("attack", "pdg", ["pgd"])`` says "did you mean 'pgd'?".
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(names) or 'none'}."
    return UsageError(f"unknown {kind} {name!r}; {hint}")


def sentence(error: BaseException) -> str:
    """The first line of what an exception says, with its type where it is not one of ours."""
    text = one_line(error, 400) or "no message"
    return text if isinstance(error, RobustDEQError) else f"{type(error).__name__}: {text}"
