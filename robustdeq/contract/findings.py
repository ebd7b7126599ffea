"""What a contract test or an honesty check says of a plugin, in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from robustdeq.errors import sentence

Outcome = Literal["passed", "failed", "skipped", "info"]


@dataclass(frozen=True)
class Finding:
    """One test with its outcome.

    Attributes:
        name: what was tested, as in "batch_dependent".
        outcome: "info" is a measurement that is no verdict.
        detail: what was found, with its number.
        remedy: what to do about a failure.
    """

    name: str
    outcome: Outcome
    detail: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.outcome.upper() if self.outcome == 'failed' else self.outcome:8}{self.name}"
        text += f": {self.detail}" if self.detail else ""
        return f"{text} {self.remedy}" if self.remedy and self.outcome == "failed" else text


@dataclass(eq=False)
class Findings:
    """A list of findings that grows; what raises inside of a test fails it, and stops no other."""

    items: list[Finding] = field(default_factory=list)

    def note(self, name: str, wrong: str, remedy: str) -> None:
        """Passed where `wrong` is empty."""
        outcome: Outcome = "failed" if wrong else "passed"
        self.items.append(Finding(name, outcome, wrong, remedy if wrong else ""))

    def skip(self, name: str, reason: str) -> None:
        """A test that does not apply."""
        self.items.append(Finding(name, "skipped", reason))

    @contextmanager
    def guarded(self, name: str, remedy: str) -> Iterator[None]:
        """A block that stands for the test `name` if it raises."""
        try:
            yield
        except Exception as cause:
            self.note(name, sentence(cause), remedy)

    def run(self, name: str, remedy: str, test: Callable[[], str]) -> None:
        """One test, which returns what is wrong, or an empty text."""
        with self.guarded(name, remedy):
            self.note(name, test(), remedy)


def failures(findings: Iterable[Finding]) -> list[Finding]:
    """Those that failed."""
    return [finding for finding in findings if finding.outcome == "failed"]
