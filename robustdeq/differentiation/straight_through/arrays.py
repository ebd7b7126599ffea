"""Round trips through NumPy and through numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustdeq.differentiation.straight_through.call import Call, Rule, called
from robustdeq.differentiation.straight_through.tracker import Export, Tracker

_RELATED = 0.3
"""Correlation from which what comes back is taken to be made of what went out."""


def _exported(tracker: Tracker, call: Call) -> Any:
    """The real values; remembered, so that they find their gradient when they come back."""
    x = call.args[0]
    if not tracker.carries(x):
        return NotImplemented
    name = "numpy" if call.name.base == "__array__" else call.name.base
    site = tracker.site(name)
    # Single numbers mostly decide what to do next, and never come back.
    carrier = tracker.carrier(x)
    if name not in ("item", "__float__") and not tracker.admits(site, carrier):
        carrier = None
    if carrier is not None:
        returned = site if name in ("item", "__float__") else None
        tracker.exports.append((x.detach().clone(), carrier, returned))
    return call.func(x.detach(), *call.args[1:], **call.kwargs)


def imported(tracker: Tracker, call: Call, data: Any) -> Any:
    """A tensor made of an array or of numbers, with the gradient of what these were made of."""
    nested = _stacked(tracker, call, data)
    if nested is not None:
        return nested
    if not tracker.exports:
        return NotImplemented
    out = call.run()
    if not isinstance(out, Tensor):
        return out
    for value, carrier, site in (*reversed(tracker.exports), *_gathered(tracker, out.numel())):
        slope = _slope(value, out)
        if slope and tracker.admits(site, carrier):
            return tracker.give(out.detach(), (carrier * slope).reshape(out.shape))
    tracker.note("numbers were made into a tensor that resembles nothing that left the graph.")
    return out


def _stacked(tracker: Tracker, call: Call, data: Any) -> Tensor | None:
    """A list of scalar tensors."""
    flat = isinstance(data, (list, tuple)) and all(isinstance(item, Tensor) for item in data)
    if not flat or not any(item.requires_grad for item in data):
        return None
    if any(item.dim() for item in data):
        return None
    soft = torch.stack(data)
    if not tracker.intercepts(call.name.base, soft):
        return None
    return tracker.give(soft.detach().to(call.kwargs.get("dtype") or soft.dtype), soft)


def _gathered(tracker: Tracker, count: int) -> list[Export]:
    """The last single numbers together: what a loop over pixels leaves."""
    single = [export for export in tracker.exports if export[0].numel() == 1]
    if count < 2 or len(single) < count:
        return []
    values, carriers, sites = zip(*single[-count:], strict=True)
    return [(_joined(values), _joined(carriers), sites[0])]


def _joined(scalars: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([scalar.reshape(1) for scalar in scalars])


def _slope(before: Tensor, after: Tensor) -> float:
    """How what came back follows what went out; 0 where it does not."""
    if before.numel() != after.numel():
        return 0.0
    a, b = before.double().flatten(), after.detach().double().flatten()
    if len(a) == 1:
        return 1.0 if bool(torch.isclose(a, b, rtol=1e-6)) else 0.0
    a, b = a - a.mean(), b - b.mean()
    size, cross = float(a @ a), float(a @ b)
    if size == 0.0 or abs(cross) < _RELATED * (size * float(b @ b)) ** 0.5:
        return 0.0
    slope = cross / size
    # Rounding alone leaves a slope near 1, which is then meant to be 1.
    return 1.0 if 0.5 < slope < 2.0 else slope


def from_array(tracker: Tracker, function: Any, array: np.ndarray[Any, Any]) -> Any:
    """`torch.from_numpy`, which no mode sees."""
    out = imported(tracker, called(function, (array,), {}), array)
    return function(array) if out is NotImplemented else out


def _wrapped(tracker: Tracker, call: Call) -> Any:
    """What a NumPy function makes of a tensor."""
    return imported(tracker, call, call.args[1])


ARRAYS: dict[str, Rule] = {
    **dict.fromkeys(("numpy", "__array__", "tolist", "item", "__float__"), _exported),
    "__array_wrap__": _wrapped,
}
