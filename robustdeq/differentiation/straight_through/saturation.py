"""Saturated functions and bounds, and random draws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from robustdeq.differentiation.straight_through.call import Call, Rule, quiet
from robustdeq.differentiation.straight_through.graph import by_sample, splice
from robustdeq.differentiation.straight_through.tracker import Tracker

_NEAR = 1e-6
"""Distance of an output from its limit of 1 at which it has no gradient to speak of."""


def _saturating(tracker: Tracker, call: Call) -> Any:
    """The function itself; at a smaller argument for samples that are saturated throughout."""
    x = call.args[0]
    if not isinstance(x, Tensor) or not x.requires_grad:
        return NotImplemented
    out = call.run()
    dim = _softmax_dim(call, x)
    flags = _saturated(call.name.base, out.detach(), dim)
    if flags is None or not bool((whole := by_sample(flags, tracker.batch)).any()):
        return out
    if not tracker.intercepts(call.name.base, x):
        return out
    smaller = replace(call, args=(x / _temperature(x.detach(), dim), *call.args[1:])).run()
    return splice(out.detach(), torch.where(whole, smaller, out))


def _softmax_dim(call: Call, x: Tensor) -> int | None:
    if "softmax" not in call.name.base:
        return None
    dim = call.argument(1, "dim")
    return dim if isinstance(dim, int) else x.dim() - 1


def _saturated(base: str, out: Tensor, dim: int | None) -> Tensor | None:
    """Which entries of the output are at their limit; whole rows of a softmax together."""
    if dim is not None:
        if out.dim() == 0 or out.shape[dim] < 2:
            return None
        top = out.amax(dim, keepdim=True)
        return (top >= (-_NEAR if "log" in base else 1 - _NEAR)).expand(out.shape)
    if base in ("tanh", "erf"):
        return out.abs() >= 1 - _NEAR
    if base == "sigmoid":
        return (out <= _NEAR) | (out >= 1 - _NEAR)
    return out.abs() <= _TINY.get(base, 0.0)


_TINY = {"exp": 1e-12, "log_sigmoid": 1e-12, "softplus": 1e-12}


def _temperature(x: Tensor, dim: int | None) -> Tensor:
    """What brings an argument to size 1: the spread of a row, or the mean size of a sample."""
    if dim is not None:
        gap = x.amax(dim, keepdim=True) - x
        finite = torch.where(gap.isfinite(), gap, torch.zeros_like(gap))
        return finite.mean(dim, keepdim=True).clamp_min(1.0)
    size = x.abs()
    if x.dim() > 1:
        size = size.flatten(1).mean(1).view(-1, *[1] * (x.dim() - 1))
    return size.clamp_min(1.0)


def _bounded(tracker: Tracker, call: Call) -> Any:
    """Bounds are kinks of honest models too: passed over only where a sample has no gradient."""
    x = call.args[0]
    if not isinstance(x, Tensor) or not x.requires_grad:
        return NotImplemented
    tracker.kinked = True
    if not tracker.plan.rescue or not tracker.intercepts(call.name.base, x):
        return NotImplemented
    return splice(quiet(call), x)


def _extremal(tracker: Tracker, call: Call) -> Any:
    """`minimum` and `maximum` against a constant are bounds."""
    x, other = call.args[0], call.argument(1, "other")
    if tracker.carries(x) == tracker.carries(other):
        return NotImplemented
    return _bounded(tracker, replace(call, args=(x, other)) if tracker.carries(x) else call)


def _drawn(tracker: Tracker, call: Call) -> Any:
    """A draw with the gradient of its mean."""
    x, p = call.args[0], call.argument(1, "p")
    mean = x if p is None else p
    if not isinstance(mean, Tensor) or not mean.requires_grad:
        return NotImplemented
    if not tracker.intercepts(call.name.base, mean):
        return NotImplemented
    if p is None:
        return splice(quiet(call), mean)
    # `bernoulli_`, asked for out of place: its draws are not those of `bernoulli`.
    return splice(x.detach().clone().bernoulli_(p.detach(), **call.kwargs), mean)


def _normal(tracker: Tracker, call: Call) -> Any:
    """Mean and standard deviation, with the noise held fast."""
    mean, std = call.argument(0, "mean"), call.argument(1, "std", 1.0)
    if call.name.in_place or not (tracker.carries(mean) or tracker.carries(std)):
        return NotImplemented
    out = quiet(call)
    noise = (out - mean) / std
    soft = mean + std * noise.detach()
    return splice(out, soft) if tracker.intercepts("normal", soft) else out


SATURATION: dict[str, Rule] = {
    **dict.fromkeys(
        ("sigmoid", "tanh", "softmax", "log_softmax", "exp", "erf", "log_sigmoid", "softplus"),
        _saturating,
    ),
    **dict.fromkeys(
        ("clamp", "clamp_min", "clamp_max", "hardtanh", "relu6", "hardsigmoid", "threshold"),
        _bounded,
    ),
    **dict.fromkeys(("minimum", "maximum", "fmin", "fmax"), _extremal),
}
DRAWING: dict[str, Rule] = {
    **dict.fromkeys(("bernoulli", "poisson"), _drawn),
    "normal": _normal,
}
