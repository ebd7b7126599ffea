"""The names of gradients in suites, records and tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from robustdeq.differentiation.module_gradient import ModuleGradient
from robustdeq.equilibrium import Honest, Implicit, OneStep, Phantom, SolveGradient, Unrolled
from robustdeq.errors import UsageError

Gradient = Honest | SolveGradient | ModuleGradient

# Each kind with what it takes, as the error message shows it.
_KINDS: Mapping[str, tuple[str, Callable[..., Gradient]]] = {
    "honest": ("", Honest),
    "implicit": ("", Implicit),
    "one_step": ("", OneStep),
    "phantom": ("STEPS,DAMPING", lambda steps, damping=1.0: Phantom(_whole(steps), damping)),
    "unrolled": ("STEPS", lambda steps: Unrolled(_whole(steps))),
}


def parse_gradient(text: str) -> Gradient:
    """Read `honest`, `phantom(5,0.5)`, `unrolled(20)` and the like.

    Raises:
        UsageError: for another name or other arguments.
    """
    match = re.fullmatch(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*", text)
    try:
        if match is None or match[1] not in _KINDS:
            raise ValueError
        parts = [part.strip() for part in (match[2] or "").split(",")]
        return _KINDS[match[1]][1](*[_argument(part) for part in parts if part])
    except (ValueError, TypeError):
        known = ", ".join(f"{n}({a})" if a else n for n, (a, _) in _KINDS.items())
        raise UsageError(f"gradient {text!r} does not parse; write one of {known}.") from None


def expand_gradients(names: Sequence[str]) -> tuple[str, ...]:
    """Names of gradients, with named sets replaced by their members."""
    return tuple(names)


def _argument(text: str) -> Any:
    """A number, or else a word."""
    try:
        return float(text)
    except ValueError:
        return text


def _whole(number: float) -> int:
    if number != int(number):
        raise ValueError
    return int(number)
