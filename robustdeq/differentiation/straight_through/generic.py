"""What any call does to carriers, where no rule speaks of it in particular."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from robustdeq.differentiation.straight_through.call import Call, quiet
from robustdeq.differentiation.straight_through.graph import splice
from robustdeq.differentiation.straight_through.tracker import Entry, Tracker

FRESH = frozenset((
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like",
    "randint_like", "new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided",
    "empty_strided", "isnan", "isinf", "isfinite", "isreal", "isposinf", "isneginf", "detach",
    "data.get", "grad.get", "normal", "uniform", "zero", "fill", "random", "exponential",
    "cauchy", "geometric", "log_normal", "autograd.grad", "numpy", "__array__", "tolist", "item",
    "__float__", "new",
))  # fmt: skip
"""Results that owe nothing to the values of their arguments, or that rules decline on purpose."""

_SAME = frozenset(("to", "long", "int", "detach", "data.get"))
_UNRELATED = FRESH - _SAME
_RESHAPING = _SAME | frozenset((
    "unsqueeze", "squeeze", "view", "reshape", "expand", "expand_as", "flatten", "unflatten",
    "clone", "contiguous", "view_as", "reshape_as", "repeat_interleave", "movedim", "transpose",
    "permute", "t", "narrow",
))  # fmt: skip
_RANDOM = frozenset((
    "dropout", "dropout1d", "dropout2d", "dropout3d", "rrelu", "bernoulli", "multinomial",
))  # fmt: skip


def generic(tracker: Tracker, call: Call) -> Any:
    """The call, with the gradient of its carriers in what it returns or writes into."""
    entries = list(tracker.entries(call.args, call.kwargs)) if tracker.table else []
    if call.name.in_place and tracker.table:
        tracker.written(call.args[0])
    if entries:
        return _substituted(tracker, call, entries)
    out = _run(tracker, call)
    if isinstance(out, Tensor) and not out.requires_grad and torch.is_grad_enabled():
        return inherited(tracker, call, out)
    return out


def _run(tracker: Tracker, call: Call) -> Any:
    """The call; where autograd alone forbids it, as the model makes it: without a graph."""
    try:
        return call.run()
    except RuntimeError:
        if not any(tracker.carries(value) for value in call.args):
            raise
    detached = tuple(v.detach() if isinstance(v, Tensor) else v for v in call.args)
    with torch.no_grad():
        out = replace(call, args=detached).run()
    return next((v for v, d in zip(call.args, detached, strict=True) if out is d), out)


def inherited(tracker: Tracker, call: Call, out: Tensor) -> Tensor:
    """A same-shaped result without a gradient takes that of the argument it came from."""
    name = call.name.base
    if out.dtype == torch.bool or name in FRESH or id(out) in tracker.table:
        return out
    for value in call.args:
        if not isinstance(value, Tensor) or not value.requires_grad or value.shape != out.shape:
            continue
        if value is out or not tracker.intercepts(name, value):
            return out
        return tracker.give(out, value)
    return out


def _substituted(tracker: Tracker, call: Call, entries: list[Entry]) -> Any:
    if call.name.base in _UNRELATED:
        return call.run()
    if len(entries) == 1 and entries[0].choose and call.name.base in _RESHAPING:
        return _reshaped(tracker, call, entries[0])
    soft = call.softened(entries)
    if soft is None:
        return _run(tracker, call)
    carrier = _value_or_none(tracker, soft)
    hard = _run(tracker, call)
    return _joined(tracker, call, hard, carrier, entries)


def _value_or_none(tracker: Tracker, soft: Call) -> Any:
    state = torch.get_rng_state() if soft.name.base in _RANDOM else None
    try:
        out = soft.run()
        return soft.args[0] if soft.name.base == "__setitem__" else out
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        tracker.note(f"{soft.name.base} takes no carriers ({type(error).__name__}).")
        return None
    finally:
        if state is not None:
            torch.set_rng_state(state)


def _joined(tracker: Tracker, call: Call, hard: Any, soft: Any, entries: list[Entry]) -> Any:
    if call.name.in_place:
        target = call.args[0]
        carrier = _matching(target, soft, entries)
        if carrier is not None:
            tracker.attach(target, carrier)
        return hard
    if isinstance(hard, (tuple, list)):
        soft = soft if isinstance(soft, (tuple, list)) else [None] * len(hard)
        parts = [_joined(tracker, call, h, s, entries) for h, s in zip(hard, soft, strict=True)]
        return _as(type(hard), parts)
    if not isinstance(hard, Tensor):
        return hard
    carrier = _matching(hard, soft, entries)
    return hard if carrier is None else tracker.give(hard, carrier)


def _as(kind: Any, parts: list[Any]) -> Any:
    return kind(parts) if kind in (tuple, list) or hasattr(kind, "n_fields") else kind(*parts)


def _matching(hard: Tensor, soft: Any, entries: list[Entry]) -> Tensor | None:
    """What was computed from carriers, or a same-shaped one of them."""
    if isinstance(soft, Tensor) and soft.requires_grad and soft.shape == hard.shape:
        return soft
    for entry in () if hard.requires_grad else entries:
        if entry.tensor.shape == hard.shape and hard.dtype != torch.bool:
            return entry.number()
    return None


def _reshaped(tracker: Tracker, call: Call, entry: Entry) -> Any:
    """An index that is reshaped keeps its weights."""
    hard = quiet(call)

    def choose() -> Tensor | None:
        assert entry.choose is not None
        weights = entry.choose(*entry.sources)
        if weights is None:
            return None
        moved: Tensor = torch.vmap(_first_moved(call), in_dims=-1, out_dims=-1)(weights)
        return moved

    def build() -> Tensor | None:
        number = entry.number()
        return None if number is None else _first_moved(call)(number).to(number.dtype)

    if hard.is_floating_point():
        number = build()
        return hard if number is None else splice(hard, number)
    tracker.remember(hard, entry.site, (), build, choose)
    return hard


def _first_moved(call: Call) -> Any:
    if call.name.base in _SAME:
        return lambda first: first
    return lambda first: call.func(first, *call.args[1:], **call.kwargs)
