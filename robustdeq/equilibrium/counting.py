"""Counts function evaluations of cells (NFE), wherever in the code they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from robustdeq.equilibrium._trust import trusted


@dataclass
class Meter:
    """Sample-weighted counts: one evaluation of a batch of B rows adds B.

    `forward` counts evaluations, `backward` vector-Jacobian products through one. Inside a solve a
    sample is charged until its own stop: rows that only wait for their companions cost nothing, so
    the counts do not depend on how samples are batched.
    """

    forward: int = 0
    backward: int = 0


_METERS: ContextVar[tuple[Meter, ...]] = ContextVar("robustdeq_meters", default=())
_INSIDE: ContextVar[bool] = ContextVar("robustdeq_inside_counted", default=False)


class charged:  # noqa: N801 - reads as a statement
    """Within the block an evaluation counts for so many rows, whatever it is given."""

    rows: int | None = None  # for all threads: autograd runs hooks in threads of its own

    def __init__(self, rows: int) -> None:
        self.inner = rows

    def __enter__(self) -> None:
        self.outer, charged.rows = charged.rows, self.inner

    def __exit__(self, *_: object) -> None:
        charged.rows = self.outer


@contextmanager
def metered() -> Iterator[Meter]:
    """Count everything evaluated inside the block, also by blocks nested in it."""
    meter = Meter()
    token = _METERS.set((*_METERS.get(), meter))
    try:
        yield meter
    finally:
        _METERS.reset(token)


def counted(function: Callable[..., Tensor], argument: int = 0) -> Callable[..., Tensor]:
    """`function`, with each call and each backward pass through its result counted.

    Args:
        function: returns a tensor with the batch first.
        argument: which positional argument carries the batch.
    """

    def call(*args: Any, **kwargs: Any) -> Tensor:
        meters = _METERS.get()
        # A cell that calls its parent class's cell is one evaluation, not two.
        if not meters or _INSIDE.get():
            return function(*args, **kwargs)
        token = _INSIDE.set(True)
        try:
            out = function(*args, **kwargs)
        finally:
            _INSIDE.reset(token)
        _count(meters, out, rows=_rows(args, argument, out))
        return out

    call.__name__ = getattr(function, "__name__", "cell")
    call.__doc__ = function.__doc__
    call.__wrapped__ = function  # type: ignore[attr-defined]
    return call


def count_unless_counted(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`model(x)`, counted as one evaluation unless cells inside it counted their own."""
    meters = _METERS.get()
    if not meters:
        return model(x)
    before = meters[0].forward
    out = model(x)
    if meters[0].forward == before:
        _count(meters, out, rows=len(x))
    return out


def _rows(args: tuple[Any, ...], argument: int, out: Tensor) -> int:
    batch = args[argument] if len(args) > argument else out
    return int(batch.shape[0]) if isinstance(batch, Tensor) and batch.dim() else 1


def _count(meters: tuple[Meter, ...], out: Tensor, rows: int) -> None:
    for meter in meters:
        meter.forward += rows if charged.rows is None else charged.rows
    if isinstance(out, Tensor) and out.requires_grad:

        def on_backward(gradient: Tensor) -> Tensor:
            for meter in meters:
                meter.backward += rows if charged.rows is None else charged.rows
            return gradient

        # The meters are captured here because autograd may run hooks in another thread.
        with trusted():
            out.register_hook(on_backward)
