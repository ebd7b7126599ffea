"""What a training recipe must keep to, on a small network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from robustdeq.contract.findings import Finding, Findings
from robustdeq.contract.form import form
from robustdeq.contract.practice import CPU, practice
from robustdeq.errors import RobustDEQError
from robustdeq.evaluation.judge import seeded
from robustdeq.interfaces import Recipe
from robustdeq.targets import Target
from robustdeq.threats import Threat

PROGRESS = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Ground:
    """A recipe, and whether it is tried on an equilibrium model."""

    recipe: Recipe
    iterates: bool


def recipe_findings(recipe: Recipe) -> list[Finding]:
    """All findings on a recipe."""
    found = Findings(form(recipe, "recipe"))
    ground = Ground(recipe, iterates=_refused(recipe))
    for name, (remedy, test) in TESTS.items():
        found.run(name, remedy, partial(test, ground))
    return found.items


def _refused(recipe: Recipe) -> bool:
    """Whether the recipe says that it is not for a plain network."""
    try:
        _descent(Ground(recipe, iterates=False), 0.5)
    except RobustDEQError:
        return True
    except Exception:
        return False  # the tests will name it
    return False


def _schedule(ground: Ground) -> str:
    recipe = ground.recipe
    for name in ("epochs", "batch_size", "learning_rate"):
        if not getattr(recipe, name, 0) > 0:
            return f"{name} is {getattr(recipe, name, None)}"
    return "" if recipe.weight_decay >= 0 else f"weight_decay is {recipe.weight_decay}"


def _loss(ground: Ground) -> str:
    """Scalar, finite, and with a gradient in the weights."""
    for progress in PROGRESS:
        loss, slopes = _descent(ground, progress)
        if loss.dim() or not bool(loss.isfinite()):
            return f"the loss at progress {progress} is {loss.tolist()}"
        if not any(bool(slope.abs().sum() > 0) for slope in slopes):
            return f"the loss at progress {progress} has no gradient in the weights"
    return ""


def _reproducible(ground: Ground) -> str:
    first, second = (_descent(ground, 0.5, disturb)[0] for disturb in (1, 2))
    return "" if torch.equal(first, second) else "equal generators give different losses"


def _untouched(ground: Ground) -> str:
    model, x, y = practice(iterates=ground.iterates)
    before = x.clone(), [p.detach().clone() for p in model.parameters()]
    model.train()
    ground.recipe.loss(Target(model, 10), x, y, Threat.parse("Linf:8/255"), 0.5, _generator())
    if not torch.equal(x, before[0]):
        return "it writes into the images"
    if any(not torch.equal(p, q) for p, q in zip(model.parameters(), before[1], strict=True)):
        return "it changes the weights, which is the trainer's work"
    if not all(p.requires_grad for p in model.parameters()):
        return "it leaves weights without gradients"
    return "" if model.training else "it leaves the model in eval mode"


def _descent(ground: Ground, progress: float, disturb: int = 1) -> tuple[Tensor, list[Tensor]]:
    model, x, y = practice(iterates=ground.iterates)
    threat = Threat.parse("Linf:8/255")
    with seeded(disturb, CPU):
        loss = ground.recipe.loss(Target(model.train(), 10), x, y, threat, progress, _generator())
    slopes = torch.autograd.grad(loss.sum(), list(model.parameters()), allow_unused=True)
    return loss.detach(), [slope for slope in slopes if slope is not None]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


TESTS: dict[str, tuple[str, Callable[[Ground], str]]] = {
    "schedule": ("Give positive epochs, batch_size and learning_rate.", _schedule),
    "loss": ("Return one finite number that depends on the weights.", _loss),
    "reproducible": ("Draw all random numbers from `generator`.", _reproducible),
    "arguments_untouched": ("Leave images, weights and mode as they are.", _untouched),
}
