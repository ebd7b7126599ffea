"""Functions that are constant nearly everywhere: rounding, casts to integers, bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustdeq.differentiation.straight_through.call import Call, Rule, quiet
from robustdeq.differentiation.straight_through.graph import row_scale
from robustdeq.differentiation.straight_through.tracker import Tracker


def _first(tracker: Tracker, call: Call) -> Tensor | None:
    """The carrier of the first argument, where the call is intercepted."""
    x = call.args[0] if call.args else None
    if not isinstance(x, Tensor) or not tracker.carries(x):
        return None
    if not tracker.intercepts(call.name.base, x):
        return None
    return tracker.carrier(x)


def _rounded(tracker: Tracker, call: Call) -> Any:
    """The identity backward (Bengio et al. 2013, the straight-through estimator)."""
    carrier = _first(tracker, call)
    return NotImplemented if carrier is None else tracker.give(quiet(call), carrier)


def _restored(tracker: Tracker, call: Call) -> Any:
    """`dequantize`, which knows no backward pass."""
    carrier = tracker.carrier(call.args[0])
    return NotImplemented if carrier is None else tracker.give(quiet(call), carrier)


def _sign(tracker: Tracker, call: Call) -> Any:
    carrier = _first(tracker, call)
    if carrier is None:
        return NotImplemented
    if tracker.plan.double:
        carrier = carrier / (carrier.detach().abs() + row_scale(carrier))
    return tracker.give(quiet(call), carrier)


def _floor_divided(tracker: Tracker, call: Call) -> Any:
    if not any(tracker.carries(value) for value in call.args[:2]):
        return NotImplemented
    one, other = (_soft(tracker, value) for value in call.operands()[:2])
    quotient = one / other
    if not tracker.intercepts("floor_divide", quotient):
        return NotImplemented
    return tracker.give(quiet(call), quotient)


def _divided(tracker: Tracker, call: Call) -> Any:
    """Division with `rounding_mode`; without, it is none of ours."""
    if call.kwargs.get("rounding_mode") is None:
        return NotImplemented
    return _floor_divided(tracker, call)


def _soft(tracker: Tracker, value: Any) -> Any:
    carrier = tracker.carrier(value) if isinstance(value, Tensor) else None
    return value if carrier is None else carrier


def _remainder(tracker: Tracker, call: Call) -> Any:
    """Differentiated as it is, but remembered: x - x % q rounds."""
    x = call.operands()[0] if call.args else None
    if not isinstance(x, Tensor) or not tracker.carries(x):
        return NotImplemented
    entries = list(tracker.entries(call.args, call.kwargs))
    soft = call.softened(entries) if entries else None
    out = call.run() if soft is None else tracker.give(quiet(call), soft.run())
    tracker.remainders[id(out)] = (out, x)
    return out


def _difference(tracker: Tracker, call: Call) -> Any:
    if not tracker.remainders or len(call.args) < 2 or call.kwargs:
        return NotImplemented
    x, rest = call.operands()[:2]
    held = tracker.remainders.get(id(rest))
    if held is None or not isinstance(x, Tensor) or not tracker.carries(x):
        return NotImplemented
    if x.shape != held[1].shape or not torch.equal(x, held[1]):
        return NotImplemented
    carrier = tracker.carrier(x) if tracker.intercepts("remainder", x) else None
    return NotImplemented if carrier is None else tracker.give(quiet(call), carrier)


def _cast(tracker: Tracker, call: Call) -> Any:
    """Casts to integers; the carrier is built when something makes use of it."""
    x = call.args[0] if call.args else None
    if not isinstance(x, Tensor) or not x.requires_grad:
        return NotImplemented
    out = call.run()
    if isinstance(out, Tensor) and not out.requires_grad and out.shape == x.shape:
        tracker.remember(out, tracker.site(call.name.base), (x,), lambda source: source)
    return out


def _viewed(tracker: Tracker, call: Call) -> Any:
    """A view as another type: bits are no numbers, so the carrier is what they stand for."""
    kinds = (*call.args[1:], *call.kwargs.values())
    x = call.args[0] if call.args else None
    if not any(isinstance(kind, torch.dtype) for kind in kinds) or not tracker.carries(x):
        return NotImplemented
    assert isinstance(x, Tensor)
    carrier, out = tracker.carrier(x), quiet(call)
    if carrier is None or out.shape != x.shape or not tracker.intercepts("view", carrier):
        return NotImplemented
    return tracker.give(out, carrier)


def _combined_bits(tracker: Tracker, call: Call) -> Any:
    """On booleans the operation on probabilities; on integers the sum of what carries."""
    if not any(tracker.entry(value) for value in call.args[:2]):
        return NotImplemented
    carriers = [_soft(tracker, value) for value in call.args[:2]]
    if not any(_differentiable(carrier) for carrier in carriers):
        return NotImplemented
    out = quiet(call)
    if out.dtype == torch.bool:
        return tracker.give(out, _probability(call.name.base, *carriers))
    return tracker.give(out, torch.stack(torch.broadcast_tensors(*_soft_only(carriers))).sum(0))


def _soft_only(values: list[Any]) -> list[Tensor]:
    return [value for value in values if _differentiable(value)]


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _probability(operation: str, a: Any, b: Any) -> Tensor:
    a, b = (v.float() if isinstance(v, Tensor) and v.dtype == torch.bool else v for v in (a, b))
    both: Tensor = a * b
    if "and" in operation:
        return both
    either: Tensor = a + b
    return either - (2 if "xor" in operation else 1) * both


def _negated(tracker: Tracker, call: Call) -> Any:
    carrier = tracker.carrier(call.args[0]) if tracker.carries(call.args[0]) else None
    if carrier is None:
        return NotImplemented
    out = quiet(call)
    return tracker.give(out, 1 - carrier if out.dtype == torch.bool else -1 - carrier)


def _shifted(tracker: Tracker, call: Call) -> Any:
    x, places = call.operands()[:2]
    carrier = tracker.carrier(x) if tracker.carries(x) else None
    if carrier is None or tracker.carries(places):
        return NotImplemented
    sign = 1.0 if "left" in call.name.base else -1.0
    return tracker.give(quiet(call), carrier * 2.0 ** (sign * places))


def _bucketed(tracker: Tracker, call: Call) -> Any:
    """Bins as numbers: one per mean width of a bin."""
    bounds, x = call.args[:2] if call.name.base == "searchsorted" else call.args[1::-1]
    if not isinstance(x, Tensor) or not x.requires_grad or not len(bounds):
        return NotImplemented
    width = (bounds[..., -1:] - bounds[..., :1]).detach() / max(bounds.shape[-1] - 1, 1)
    slope = 1 / torch.where(width > 0, width, torch.ones_like(width))
    out = call.run()
    tracker.remember(out, tracker.site(call.name.base), (x,), lambda source: source * slope)
    return out


ROUNDING: dict[str, Rule] = {
    **dict.fromkeys(("round", "floor", "ceil", "trunc", "heaviside"), _rounded),
    **dict.fromkeys(
        (
            "fake_quantize_per_tensor_affine",
            "fake_quantize_per_channel_affine",
            "quantize_per_tensor",
        ),
        _rounded,
    ),
    **dict.fromkeys(("sign", "sgn"), _sign),
    **dict.fromkeys(("remainder", "fmod", "frac"), _remainder),
    **dict.fromkeys(
        ("to", "type", "int", "long", "short", "byte", "char", "bool", "type_as"), _cast
    ),
    **dict.fromkeys(("bitwise_and", "logical_and", "bitwise_or", "logical_or"), _combined_bits),
    **dict.fromkeys(("bitwise_xor", "logical_xor"), _combined_bits),
    **dict.fromkeys(("bitwise_left_shift", "bitwise_right_shift"), _shifted),
    **dict.fromkeys(("bucketize", "searchsorted"), _bucketed),
    "dequantize": _restored,
    "floor_divide": _floor_divided,
    "div": _divided,
    "sub": _difference,
    "view": _viewed,
    "bitwise_not": _negated,
    "logical_not": _negated,
}
