"""Honesty checks: whether a model's gradients and predictions can be taken at their word.

Each is a measurement with a threshold; a failed one is a flag in the row, with its number.
"""

from __future__ import annotations

from typing import Any

import torch

from robustdeq.evaluation.judge import predictions, seeded, worst_solve
from robustdeq.shapes import Images, Labels, Logits
from robustdeq.targets import Target

SAMPLES = 32
"""Samples that the costlier checks look at."""
UNCONVERGED = 1e-3
"""Relative residual above which a solve has not found its fixed point."""


def is_randomized(target: Target, x: Images) -> bool:
    """Whether two passes over the same input, under two seeds, differ by more than rounding."""
    first, second = (_seeded_logits(target, x, seed) for seed in (1, 2))
    return _gap(first, second) > 1e-5


def run_checks(target: Target, x: Images, y: Labels) -> list[dict[str, Any]]:
    """All checks of one model on clean inputs, as rows for `records.check_frame`."""
    x, y = x[:SAMPLES], y[:SAMPLES]
    rows = [_grad_mode(target, x), _batch(target, x), *_gradient(target, x, y)]
    with torch.no_grad():
        residual, _ = worst_solve(target(x).solves, len(x))
    tolerance = getattr(getattr(target.model, "solver", None), "tolerance", 0.0)
    if residual is not None and tolerance > 0:
        share = float((residual > max(UNCONVERGED, 10 * tolerance)).float().mean())
        rows.append(check("unconverged_clean", share, 0.01, len(x)))
    return rows


def check(name: str, value: float, threshold: float, n: int) -> dict[str, Any]:
    """A measurement as a row; NaN fails."""
    status = "passed" if value <= threshold else "failed"
    return {"name": name, "value": value, "threshold": threshold, "n": n, "status": status}


def _grad_mode(target: Target, x: Images) -> dict[str, Any]:
    """Logits with gradients enabled against logits without: an attack must see what is judged."""
    with seeded(1, x.device), torch.enable_grad():
        attacked = target(x.clone().requires_grad_()).logits.detach()
    return check(
        "grad_mode_changes_logits", _gap(attacked, _seeded_logits(target, x, 1)), 1e-5, len(x)
    )


def _batch(target: Target, x: Images) -> dict[str, Any]:
    """A sample alone against the same sample in its batch; only differing predictions count."""
    together = _seeded_logits(target, x, 1)
    alone = torch.cat([_seeded_logits(target, x[k : k + 1], 1) for k in range(len(x))])
    scale = together.abs().amax(1).clamp_min(1e-30)
    moved = (together - alone).abs().amax(1) / scale > 1e-5
    flipped = predictions(together) != predictions(alone)
    share = float((moved & flipped).float().mean()) if len(x) else 0.0
    far = float(((together - alone).abs().amax(1) / scale > 1e-3).float().mean())
    return check("batch_dependent", max(share, far), 0.0, len(x))


def _gradient(target: Target, x: Images, y: Labels) -> list[dict[str, Any]]:
    """Whether the margin's gradient exists, is finite, and is not exactly 0.

    The margin rather than cross-entropy, whose gradient vanishes in float32 for an honest model
    that is merely confident.
    """
    n = len(x)
    x = x.clone().requires_grad_()
    with seeded(1, x.device), torch.enable_grad():
        logits = target(x).logits
        own = logits.gather(1, y[:, None]).squeeze(1)
        others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
        try:
            (gradient,) = torch.autograd.grad((others - own).sum(), x)
        except RuntimeError:
            return [check("gradient_missing", 1.0, 0.0, n)]
    flat = gradient.flatten(1)
    finite = flat.isfinite().all(1)
    zero = (flat == 0).all(1)
    return [
        check("nonfinite_gradient", float((~finite).float().mean()), 0.0, n),
        check("zero_gradient", float(zero.float().mean()), 0.05, n),
    ]


def _seeded_logits(target: Target, x: Images, seed: int) -> Logits:
    with seeded(seed, x.device), torch.no_grad():
        return target(x).logits


def _gap(one: Logits, other: Logits) -> float:
    """Largest difference over the largest logit; infinite where not finite."""
    scale = one.abs().max().clamp_min(1e-30)
    gap = ((one - other).abs().max() / scale).item()
    return gap if gap == gap else float("inf")
