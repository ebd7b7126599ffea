"""Comparisons, and what their booleans then select or multiply."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustdeq.differentiation.straight_through.call import Call, Rule, constant, quiet
from robustdeq.differentiation.straight_through.graph import join, row_scale, weighted
from robustdeq.differentiation.straight_through.tracker import Entry, Tracker

_KINK = 1.5
"""Jump over distance up to which a selection is taken for continuous: relu as x * (x > 0)."""


def _compared(tracker: Tracker, call: Call) -> Any:
    """A boolean with the carrier of a sigmoid of the difference, built when it is used."""
    a, b = call.args[0], call.argument(1, "other", 0)
    if not (tracker.carries(a) or tracker.carries(b)) or call.name.in_place:
        return NotImplemented
    out = call.run()
    if not isinstance(out, Tensor) or out.dtype != torch.bool:
        return out
    base = call.name.base
    choice = _choice_equals(tracker, a, b) if base in ("eq", "ne") else None
    if choice is not None:
        entry, value = choice
        tracker.remember(out, entry.site, (), lambda: _chosen(entry, value, base == "ne"))
        return out

    def build(a: Any, b: Any) -> Tensor | None:
        return _surrogate(base, _operand(tracker, a) - _operand(tracker, b))

    def gap(a: Any, b: Any) -> Tensor:
        difference: Tensor = _operand(tracker, a) - _operand(tracker, b)
        return difference.detach().abs()

    tracker.remember(out, tracker.site(base), (a, b), build, gap=gap)
    return out


def _operand(tracker: Tracker, value: Any) -> Any:
    carrier = tracker.carrier(value) if isinstance(value, Tensor) else None
    return value if carrier is None else carrier


def _surrogate(base: str, difference: Tensor) -> Tensor:
    """A heavy-tailed sigmoid (Zenke and Ganguli 2018) as wide as the operands are apart."""
    width = row_scale(difference)
    if base in ("eq", "ne", "isclose"):
        bump = 1 / (1 + (difference / width).square())
        return -bump if base == "ne" else bump
    sign = 1.0 if base in ("gt", "ge") else -1.0
    return 0.5 * sign * difference / (width + difference.abs())


def _choice_equals(tracker: Tracker, a: Any, b: Any) -> tuple[Entry, Any] | None:
    for index, value in ((a, b), (b, a)):
        entry = tracker.entry(index)
        if entry is not None and entry.choose is not None and not tracker.carries(value):
            return entry, value
    return None


def _chosen(entry: Entry, value: Any, negated: bool) -> Tensor | None:
    """The weight of class `value` in what an index chooses."""
    index = torch.as_tensor(value, device=entry.tensor.device).long()
    weights = entry.weights(max(int(index.max()) + 1, 2))
    if weights is None:
        return None
    shape = torch.broadcast_shapes(entry.tensor.shape, index.shape)
    weights = weights.expand(*shape, weights.shape[-1])
    picked = weights.gather(-1, index.expand(shape)[..., None].clamp_min(0)).squeeze(-1)
    return -picked if negated else picked


def _is_kink(entry: Entry, jump: Tensor) -> bool:
    """Whether a selection jumps by no more than the distance to where it switches."""
    if entry.gap is None:
        return False
    gap = entry.gap(*entry.sources)
    return bool((jump.detach().abs() <= _KINK * gap + 1e-12).all())


def _selected(tracker: Tracker, call: Call) -> Any:
    """`where`: its own gradient in what it selects, and the mask's times the jump."""
    if len(call.args) + len(call.kwargs) < 3:
        return NotImplemented
    mask = call.args[0]
    a, b = call.argument(1, "input"), call.argument(2, "other")
    if call.func is torch.Tensor.where:
        mask, a = a if isinstance(a, Tensor) else mask, call.args[0]
    return _between(tracker, call, mask, a, b)


def _between(tracker: Tracker, call: Call, mask: Any, a: Any, b: Any) -> Any:
    entry = tracker.entry(mask)
    if entry is None:
        return NotImplemented
    one, other = (_operand(tracker, value) for value in (a, b))
    like = torch.zeros((), dtype=tracker.dtype, device=mask.device)
    jump = constant(one, like) - constant(other, like)
    if _is_kink(entry, jump):
        return call.run()
    carrier = entry.number()
    if carrier is None:
        return NotImplemented
    hard = quiet(call)
    inner = torch.where(mask, one, other)
    soft = weighted(carrier, jump) + inner.to(tracker.dtype)
    return tracker.give(hard, soft)


def _filled(tracker: Tracker, call: Call) -> Any:
    x, mask, value = call.args[0], call.argument(1, "mask"), call.argument(2, "value")
    return _between(tracker, call, mask, value, x)


def _multiplied(tracker: Tracker, call: Call) -> Any:
    """A product with a comparison that makes a kink and no jump is left as it is."""
    if not tracker.table or len(call.args) < 2:
        return NotImplemented
    for mask, value in (call.args[:2], call.args[1::-1]):
        entry = tracker.entry(mask)
        if entry is None or entry.gap is None or not isinstance(value, Tensor):
            continue
        if value.requires_grad and _is_kink(entry, value):
            return call.run()
    return NotImplemented


def _taken(tracker: Tracker, call: Call) -> Any:
    """x[mask] and `masked_select`: what is taken weighs as much as its mask."""
    x, mask = call.args[0], call.argument(1, "mask")
    entry = tracker.entry(mask)
    if entry is None or mask.dtype != torch.bool or not x.is_floating_point():
        return NotImplemented
    carrier, out = entry.number(), call.run()
    if carrier is None:
        return out
    inside = carrier[mask]
    missing = out.dim() - inside.dim()
    return join(out, weighted(inside.view(*inside.shape, *[1] * missing), out))


def _put(tracker: Tracker, call: Call) -> Any:
    """x[mask] = value."""
    target, mask, value = call.args
    entry = tracker.entry(mask)
    single = not isinstance(value, Tensor) or value.numel() == 1
    if entry is None or mask.dtype != torch.bool or not single:
        return _put_into_integers(tracker, call)
    wide = mask.view(*mask.shape, *[1] * (target.dim() - mask.dim()))
    number = entry.number()
    if number is None:
        return NotImplemented
    tracker.written(target)
    one = constant(value, target) if not tracker.carries(value) else _operand(tracker, value)
    before = tracker.carrier(target)
    before = target.detach().to(number.dtype) if before is None else before
    jump = one.detach() - before.detach()
    soft = torch.where(wide, one.to(before.dtype), before)
    soft = soft + weighted(number.view(wide.shape), jump)
    _quietly(call)
    tracker.attach(target, soft)
    return None


def _quietly(call: Call) -> None:
    detached = [v.detach() if isinstance(v, Tensor) else v for v in call.args]
    with torch.no_grad():
        call.func(*detached, **call.kwargs)


def _put_into_integers(tracker: Tracker, call: Call) -> Any:
    """Floats written into integers are rounded."""
    target, index, value = call.args
    carries = isinstance(value, Tensor) and value.requires_grad
    if target.is_floating_point() or not carries or not tracker.intercepts("__setitem__", value):
        return NotImplemented
    before = tracker.carrier(target)
    soft = target.to(tracker.dtype) if before is None else before.clone()
    soft[index] = value
    _quietly(call)
    tracker.give(target, soft)
    return None


def _copied(tracker: Tracker, call: Call) -> Any:
    """Floats copied into integers; asked for out of place, hence the value is the source's."""
    target, value = call.args[0], call.argument(1, "src")
    carries = isinstance(value, Tensor) and value.requires_grad
    if target.is_floating_point() or not carries or not tracker.intercepts("copy_", value):
        return NotImplemented
    call.func(target, value.detach())
    return tracker.give(target, value)


def _reduced(tracker: Tracker, call: Call) -> Any:
    """`any` and `all` of booleans, and their count."""
    entry = tracker.entry(call.args[0] if call.args else None)
    if entry is None:
        return NotImplemented
    out = call.run()
    if isinstance(out, Tensor):
        function = {"any": torch.amax, "all": torch.amin}.get(call.name.base, torch.sum)

        def build() -> Tensor | None:
            number = entry.number()
            return None if number is None else function(number, *call.args[1:], **call.kwargs)

        tracker.remember(out, None, (), build)
    return out


def _gotten(tracker: Tracker, call: Call) -> Any:
    return _taken(tracker, call) if tracker.table else NotImplemented


def _set(tracker: Tracker, call: Call) -> Any:
    discrete = tracker.table or not call.args[0].is_floating_point()
    return _put(tracker, call) if discrete else NotImplemented


COMPARING: dict[str, Rule] = {
    **dict.fromkeys(("gt", "ge", "lt", "le", "eq", "ne", "isclose"), _compared),
    **dict.fromkeys(("any", "all", "count_nonzero"), _reduced),
    "where": _selected,
    "masked_fill": _filled,
    "masked_select": _gotten,
    "mul": _multiplied,
    "copy": _copied,
    "__getitem__": _gotten,
    "__setitem__": _set,
}
