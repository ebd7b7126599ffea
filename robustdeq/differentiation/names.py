"""The names of gradients in suites, records and tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from robustdeq.differentiation.bpda import BPDA
from robustdeq.differentiation.expectation import Expectation, Smoothed
from robustdeq.differentiation.finite_difference import NES, FiniteDifference
from robustdeq.differentiation.module_gradient import ModuleGradient
from robustdeq.differentiation.straight_through import StraightThrough
from robustdeq.equilibrium import (
    Backprop,
    Honest,
    Implicit,
    Intermediate,
    OneStep,
    Phantom,
    SimultaneousAdjoint,
    SolveGradient,
    Unrolled,
)
from robustdeq.errors import UsageError

Gradient = Honest | SolveGradient | ModuleGradient
WHITE_BOX_PROTOCOL = "white_box_protocol"
"""The word that stands for `white_box_protocol()` in a list of gradients."""


class _Kind(NamedTuple):
    """A kind of gradient: what it takes, as messages show it, how it is made, where it is biased.

    `make` is given the arguments as texts; a ValueError or TypeError means that they do not parse.
    """

    takes: str
    make: Callable[..., Gradient]
    bias: str


def _implicit(tolerance: str | None = None) -> Gradient:
    return Implicit() if tolerance is None else Implicit(tolerance=float(tolerance))


def _phantom(steps: str, damping: str = "1") -> Gradient:
    return Phantom(int(steps), float(damping))


def _intermediate(state: str, steps: str, damping: str = "1") -> Gradient:
    return Intermediate(int(state), int(steps), float(damping))


def _simultaneous(damping: str = "1") -> Gradient:
    return SimultaneousAdjoint(float(damping))


def _bpda(module: str, surrogate: str | None = None) -> Gradient:
    return BPDA(module, surrogate)


def _nes(samples: str = "32", sigma: str = "0.05") -> Gradient:
    return NES(int(samples), float(sigma))


def _finite_difference(sigma: str = "0.03") -> Gradient:
    return FiniteDifference(float(sigma))


def _eot(draws: str, inner: str = "") -> Gradient:
    return Expectation(int(draws), _word(inner, "straight_through"))


def _smoothed(draws: str, sigma: str, inner: str = "") -> Gradient:
    return Smoothed(int(draws), float(sigma), _word(inner, "straight_through"))


def _straight_through(mode: str = "") -> Gradient:
    if mode not in ("", "double", "bypass"):
        raise ValueError
    return StraightThrough(double=mode == "double", bypass=mode == "bypass")


def _word(text: str, word: str) -> bool:
    """Whether an optional last word is there."""
    if text not in ("", word):
        raise ValueError
    return text == word


_KINDS: Mapping[str, _Kind] = {
    "honest": _Kind(
        "", Honest, "The model's own backward pass: right as far as the model does not mask it."
    ),
    "implicit": _Kind(
        "[TOLERANCE]",
        _implicit,
        "The gradient of the exact fixed point, not of a solve that stops short of it.",
    ),
    "one_step": _Kind(
        "", OneStep, "Takes the cell's Jacobian in its state as 0: all memory of the solve is lost."
    ),
    "phantom": _Kind(
        "STEPS[,DAMPING]", _phantom, "Takes what the state was before its last STEPS as constant."
    ),
    "unrolled": _Kind(
        "STEPS",
        lambda steps: Unrolled(int(steps)),
        "The gradient of STEPS plain steps: exact for models that are these, else another solve's.",
    ),
    "backprop": _Kind("", Backprop, ""),
    "intermediate": _Kind(
        "STATE,STEPS[,DAMPING]",
        _intermediate,
        "The gradient STEPS after an intermediate state, not the one that is read out, and all "
        "before that state taken as constant.",
    ),
    "simultaneous_adjoint": _Kind(
        "[DAMPING]",
        _simultaneous,
        "An adjoint cut off after as many steps as the solve took, its Jacobians those of states "
        "on the way; it diverges where the cell is no contraction.",
    ),
    "bpda": _Kind(
        "SUBMODULE[,PACKAGE.MODULE:FUNCTION]",
        _bpda,
        "Wrong by as much as the submodule differs from the identity or surrogate in its place.",
    ),
    "nes": _Kind(
        "[SAMPLES[,SIGMA]]",
        _nes,
        "Unbiased but for curvature over SIGMA, and noisy: cosine about sqrt(SAMPLES / pixels).",
    ),
    "finite_difference": _Kind(
        "[SIGMA]",
        _finite_difference,
        "Curvature over SIGMA, one-sided where pixels are 0 or 1; rounding at small SIGMA.",
    ),
    "eot": _Kind(
        "DRAWS[,straight_through]",
        _eot,
        "The loss of the mean logits over DRAWS, not the mean loss; noisy at few draws.",
    ),
    "smoothed": _Kind(
        "DRAWS,SIGMA[,straight_through]",
        _smoothed,
        "The gradient of the model blurred by SIGMA, on purpose; noisy at few draws.",
    ),
    "straight_through": _Kind(
        "[double|bypass]",
        _straight_through,
        "Wrong by as much as the steps that mask differ from the identity put in their place.",
    ),
}

BIAS: Mapping[str, str] = {name: kind.bias for name, kind in _KINDS.items()}
"""Where each kind of gradient is biased, in one sentence; empty where it is exact."""


def parse_gradient(text: str) -> Gradient:
    """Read `honest`, `phantom(5,0.5)`, `bpda(purifier.net,package.module:function)` and the like.

    Raises:
        UsageError: for another name or other arguments.
    """
    match = re.fullmatch(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*", text)
    try:
        if match is None or match[1] not in _KINDS:
            raise ValueError
        inside = (match[2] or "").strip()
        parts = [part.strip() for part in inside.split(",")] if inside else []
        if not all(parts):
            raise ValueError
        return _KINDS[match[1]].make(*parts)
    except (ValueError, TypeError):
        known = ", ".join(f"{n}({k.takes})" if k.takes else n for n, k in _KINDS.items())
        raise UsageError(f"gradient {text!r} does not parse; write one of {known}.") from None


def white_box_protocol() -> tuple[str, ...]:
    """The 144 intermediate gradients of Yang et al. 2022: 8 states, 1 to 9 steps, 2 dampings."""
    return tuple(
        str(Intermediate(state, steps, damping))
        for state in range(1, 9)
        for steps in range(1, 10)
        for damping in (0.5, 1.0)
    )


def expand_gradients(names: Sequence[str]) -> tuple[str, ...]:
    """Names of gradients, with the word `white_box_protocol` replaced by the 144 that it means."""
    sets = {WHITE_BOX_PROTOCOL: white_box_protocol()}
    return tuple(name for text in names for name in sets.get(text, (text,)))
