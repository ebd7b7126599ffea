"""Where the core switches gradients off on purpose, and where a model's own code begins again.

A gradient that undoes masking (`robustdeq.differentiation.StraightThrough`) watches a forward pass.
Solves must not be watched, since they detach by design; the cells that they call must be. Nothing
here has an effect outside of such a pass.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor


class Watch(Protocol):
    """What watches a forward pass."""

    def paused(self) -> AbstractContextManager[None]:
        """Within the block nothing is changed."""
        ...

    def resumed(self, *given: Tensor) -> AbstractContextManager[None]:
        """Within the block, which lies in a paused one, everything is watched again.

        Args:
            given: what the code in the block is given, besides what depends on the input.
        """
        ...

    def estimator(self, gradient: Any) -> Any:
        """The estimator to drive a solve with in place of the model's own."""
        ...

    def carried(self, states: tuple[Tensor, ...], z: Tensor) -> tuple[Tensor, ...]:
        """Kept states, which carry no gradient, with that of the answer `z`."""
        ...


WATCH: ContextVar[Watch | None] = ContextVar("robustdeq_watch", default=None)


def trusted() -> AbstractContextManager[None]:
    """Within the block the core is at work: what it detaches is meant."""
    watch = WATCH.get()
    return nullcontext() if watch is None else watch.paused()


def foreign(*given: Tensor) -> AbstractContextManager[None]:
    """Within the block, inside a trusted one, a model's own code is at work; see `Watch`."""
    watch = WATCH.get()
    # A solve without a graph has no gradient to keep.
    if watch is None or not torch.is_grad_enabled():
        return nullcontext()
    return watch.resumed(*given)
