"""What a solve returns, and the map that it iterates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from robustdeq.equilibrium._trust import foreign
from robustdeq.shapes import Counts, PerSample, State

Injection = Tensor | tuple[Tensor, ...]
Cell = Callable[[Tensor, Injection, int], Tensor]


@dataclass
class AdjointTrace:
    """How the adjoint solve of an implicit gradient went; filled when a backward pass runs it.

    `residual` is the relative residual per sample and `steps` the vector-Jacobian products taken.
    """

    residual: PerSample | None = None
    steps: Counts | None = None


class Solve(NamedTuple):
    """The state a solver reached, with its evidence. Failure is data: nothing is raised.

    Attributes:
        z: state, (batch, *state).
        residual: relative residual |f(z) - z| / |f(z)| per sample, of the last evaluation;
            infinite where the cell returned a non-finite state.
        steps: evaluations of the cell spent on each sample until it stopped.
        states: z_0, z_1, ... where the caller asked for them, else empty.
        adjoint: the trace of the backward solve, where the gradient has one.
    """

    z: State
    residual: PerSample
    steps: Counts
    states: tuple[Tensor, ...] = ()
    adjoint: AdjointTrace | None = None


@runtime_checkable
class Map(Protocol):
    """A map on states, evaluated for all rows of the batch or for some of them."""

    def __call__(self, z: Tensor, step: int, rows: Tensor | None = None) -> Tensor:
        """f(z) at iteration `step`; `rows` are the batch rows that `z` holds, None for all."""
        ...


@dataclass(frozen=True)
class Problem:
    """A fixed-point problem z = cell(z, injection), with the state to start from."""

    cell: Cell
    injection: Injection
    start: State
    warm: bool = False

    def __call__(self, z: Tensor, step: int, rows: Tensor | None = None) -> Tensor:
        """The cell at `z`; see `Map`."""
        injection = self.injection if rows is None else take_rows(self.injection, rows)
        with foreign(z):
            return self.cell(z, injection, step)


def each_part(change: Callable[[Tensor], Tensor], injection: Injection) -> Injection:
    """An injection with its one tensor, or each of them, changed."""
    return change(injection) if isinstance(injection, Tensor) else tuple(map(change, injection))


def take_rows(injection: Injection, rows: Tensor) -> Injection:
    """Some rows of an injection."""
    return each_part(lambda part: part.index_select(0, rows), injection)


def join_rows(one: Injection, other: Injection) -> Injection:
    """The rows of two injections of one model, one after another."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.cat([one, other])
    return tuple(torch.cat([a, b]) for a, b in zip(one, other, strict=True))


def relative_residual(fz: Tensor, z: Tensor) -> PerSample:
    """|f(z) - z| / |f(z)| per sample; infinite where that is not a number."""
    # Not flattened: where the channels come last that would be a copy.
    dims = tuple(range(1, fz.dim()))
    gap = torch.linalg.vector_norm(fz - z, dim=dims)
    return residual_of(gap, torch.linalg.vector_norm(fz, dim=dims))


def residual_of(gap: PerSample, norm: PerSample) -> PerSample:
    """Gap / norm, 0 where both are 0 and infinite where that is not a number."""
    residual = gap / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return torch.nan_to_num(residual, nan=torch.inf, posinf=torch.inf)


def finite(values: Tensor) -> Tensor:
    """0 where a value is not finite."""
    return torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
