"""Whether solves and adjoint solves reach what they solve for, at clean and at attacked points."""

from __future__ import annotations

import torch

from robustdeq.evaluation.gate.examined import FEW, SEED, Examined
from robustdeq.evaluation.gate.losses import margin
from robustdeq.evaluation.gate.rows import Row, measured, skipped
from robustdeq.evaluation.judge import seeded, worst_solve
from robustdeq.shapes import Images, PerSample

UNCONVERGED = 1e-3
"""Relative residual above which a solve has not found its fixed point."""
ADJOINT = 1e-2
"""Relative residual above which an adjoint solve has not found the gradient."""
_NAMES = ("unconverged_clean", "unconverged_adversarial", "adjoint_unconverged")


def convergence(exam: Examined) -> list[Row]:
    """Shares of samples whose solves end above the tolerances."""
    if not exam.target.iterates:
        return [skipped(name, "the model has no solve") for name in _NAMES]
    points = {"clean": exam.few, "adversarial": exam.escalation.x[:FEW]}
    forward = [_forward(exam, f"unconverged_{name}", x) for name, x in points.items()]
    return [*forward, _adjoint(exam, list(points.values()))]


def _forward(exam: Examined, name: str, x: Images) -> Row:
    tolerance = float(getattr(exam.target.model, "solver").tolerance)  # noqa: B009 - of any module
    if tolerance == 0:
        return skipped(name, "a fixed number of steps is the model's definition")
    with seeded(SEED, x.device), torch.no_grad():
        residual, _ = worst_solve(exam.target(x).solves, len(x))
    if residual is None:
        return skipped(name, "the model made no solve")
    bound = max(UNCONVERGED, 10 * tolerance)
    detail = f"largest residual {float(residual.max()):.2g}, bound {bound:.2g}"
    return measured(name, _above(residual, bound), len(x), detail)


def _adjoint(exam: Examined, points: list[Images]) -> Row:
    name = "adjoint_unconverged"
    found = [part for x in points if (part := _adjoint_residual(exam, x)) is not None]
    if not found:
        return skipped(name, "the model's own gradient solves no adjoint equation")
    residual = torch.cat(found)
    detail = f"largest residual {float(residual.max()):.2g}, bound {ADJOINT:.2g}"
    return measured(name, _above(residual, ADJOINT), len(residual), detail)


def _adjoint_residual(exam: Examined, x: Images) -> PerSample | None:
    x = x.detach().clone().requires_grad_()
    with seeded(SEED, x.device), torch.enable_grad():
        output = exam.target(x)
        loss = margin(output.logits, exam.labels).sum()
        torch.autograd.grad(loss, x, allow_unused=True)
    residuals = [
        solve.adjoint.residual
        for solve in output.solves
        if solve.adjoint is not None and solve.adjoint.residual is not None
    ]
    whole = [residual for residual in residuals if len(residual) == len(x)]
    return torch.stack(whole).amax(0) if whole else None


def _above(residual: PerSample, bound: float) -> float:
    return float((residual > bound).float().mean())
