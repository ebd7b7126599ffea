"""Round trips through NumPy and through numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustdeq.differentiation._straight_call import Call, Rule, called
from robustdeq.differentiation._straight_tracker import Tracker

_RELATED = 0.3
"""Correlation from which what comes back is taken to be made of what went out."""


def _exported(tracker: Tracker, call: Call) -> Any:
    """The real values; remembered, so that they find their gradient when they come back."""
    x = call.args[0]
    if not tracker.carries(x):
        return NotImplemented
    name = "numpy" if call.name.base == "__array__" else call.name.base
    site = tracker.site(name)
    if site is not None and not tracker.admits(site):
        return call.func(x.detach(), *call.args[1:], **call.kwargs)
    carrier = tracker.carrier(x)
    if carrier is not None:
        tracker.exports.append((x.detach().clone(), carrier, site))
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
    for value, carrier, _ in reversed(tracker.exports):
        slope = _slope(value, out)
        if slope:
            return tracker.give(out.detach(), (carrier * slope).reshape(out.shape))
    return out


def _stacked(tracker: Tracker, call: Call, data: Any) -> Tensor | None:
    """A list of scalar tensors."""
    flat = isinstance(data, (list, tuple)) and all(isinstance(item, Tensor) for item in data)
    if not flat or not any(item.requires_grad for item in data):
        return None
    if any(item.dim() for item in data) or not tracker.intercepts(call.name.base):
        return None
    dtype = call.kwargs.get("dtype") or data[0].dtype
    return tracker.give(torch.stack([item.detach() for item in data]).to(dtype), torch.stack(data))


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
