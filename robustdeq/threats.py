"""Threat models: what an adversary may do to an image in [0, 1]."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

import torch
from torch import Tensor

from robustdeq.errors import UsageError
from robustdeq.shapes import Images, PerSample

# What float32 arithmetic alone can add: AutoAttack's own excess was measured at 2e-9 (Linf) to
# 1.5e-6 (L1); anything above these is a violation, not rounding.
ROUNDING = 1e-6

# Fraction() alone would read "1e999999999" and try to hold it.
_RADIUS = re.compile(
    r"[+-]?(\d{1,9}(\.\d{0,18})?|\.\d{1,18})(e[+-]?\d{1,2})?|[+-]?\d{1,9}/\d{1,9}", re.IGNORECASE
)


class Norm(StrEnum):
    """The norms that bound a perturbation."""

    LINF = "Linf"
    L2 = "L2"


class Violation(StrEnum):
    """Why a candidate is not an admissible input."""

    NONE = ""
    NONFINITE = "nonfinite"
    BOX = "outside_box"
    BALL = "outside_ball"


@dataclass(frozen=True)
class Threat:
    """A ball of radius `epsilon` in `norm`, intersected with the box [0, 1].

    `epsilon` is kept as an exact fraction, so that 8/255 is never mistaken for 0.031.
    """

    norm: Norm
    epsilon: Fraction

    def __post_init__(self) -> None:
        if self.epsilon < 0:
            raise UsageError(
                f"threat {self.norm}:{self.epsilon} has a negative radius; give one of at least 0."
            )

    @classmethod
    def parse(cls, text: str) -> Threat:
        """Read `Linf:8/255`, `L2:0.5` and the like.

        Raises:
            UsageError: if the text is not NORM:RADIUS with a known norm and a radius of at least 0.
        """
        advice = "write a norm (Linf or L2), a colon and a radius, as in Linf:8/255 or L2:0.5."
        norm, colon, radius = str(text).strip().partition(":")
        known = {member.value.lower(): member for member in Norm}
        if not colon or norm.strip().lower() not in known:
            raise UsageError(f"threat {text!r} does not parse; {advice}")
        number = re.sub(r"\s+", "", radius)
        if not _RADIUS.fullmatch(number):
            raise UsageError(f"threat {text!r} does not parse; {advice}")
        try:
            return cls(known[norm.strip().lower()], Fraction(number))
        except ZeroDivisionError:
            raise UsageError(f"threat {text!r} divides by zero; {advice}") from None

    def __str__(self) -> str:
        return f"{self.norm}:{_radius_text(self.epsilon)}"

    @property
    def eps(self) -> float:
        """The radius as a float."""
        return float(self.epsilon)

    def distance(self, x: Images, other: Images) -> PerSample:
        """Norm of `other - x` per sample, in float64 so that rounding cannot hide an excess."""
        delta = (other.double() - x.double()).flatten(1)
        if self.norm is Norm.LINF:
            return delta.abs().amax(1)
        length: Tensor = torch.linalg.vector_norm(delta, dim=1)
        return length

    def project(self, x: Images, candidate: Images) -> Images:
        """The admissible point near `candidate`: into the ball around `x`, then into the box.

        Clipping to the box moves every pixel towards `x` (itself in the box), so the result stays
        in the ball.
        """
        delta = candidate - x
        if self.norm is Norm.LINF:
            delta = delta.clamp(-self.eps, self.eps)
        else:
            length = torch.linalg.vector_norm(delta.flatten(1), dim=1).clamp_min(1e-12)
            delta = delta * _per_sample((self.eps / length).clamp_max(1.0), delta)
        return (x + delta).clamp(0.0, 1.0)

    def steepest(self, gradient: Images) -> Images:
        """The direction of unit norm that increases a loss fastest; 0 where the gradient is 0."""
        if self.norm is Norm.LINF:
            return gradient.sign()
        length = torch.linalg.vector_norm(gradient.flatten(1), dim=1).clamp_min(1e-30)
        return gradient / _per_sample(length, gradient)

    def random_offset(self, uniform: Images, radial: PerSample) -> Images:
        """A random point of the ball around 0, from `uniform` in [-1, 1] and `radial` in [0, 1].

        Linf: uniform in the cube. L2: a random direction, at a radius uniform in [0, epsilon].
        """
        if self.norm is Norm.LINF:
            return self.eps * uniform
        normal = torch.erfinv(uniform.clamp(-0.9999999, 0.9999999))
        return self.eps * _per_sample(radial, normal) * self.steepest(normal)

    def violations(self, x: Images, candidate: Images) -> list[Violation]:
        """Per sample, the first rule that `candidate` breaks: finite, in the box, in the ball."""
        flat = candidate.flatten(1)
        finite = flat.isfinite().all(1)
        boxed = (flat.amin(1) >= -ROUNDING) & (flat.amax(1) <= 1.0 + ROUNDING)
        near = self.distance(x, candidate) <= self.eps * (1.0 + 1e-6) + ROUNDING
        return [
            Violation.NONFINITE
            if not f
            else Violation.BOX
            if not b
            else Violation.BALL
            if not n
            else Violation.NONE
            for f, b, n in zip(finite.tolist(), boxed.tolist(), near.tolist(), strict=True)
        ]


def _per_sample(values: PerSample, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def _radius_text(epsilon: Fraction) -> str:
    """One text per value: a short decimal where there is one, else k/255, else p/q."""
    if (epsilon * 1000).denominator == 1:
        return f"{float(epsilon):g}"
    if 255 % epsilon.denominator == 0:
        return f"{epsilon * 255}/255"
    return str(epsilon)
