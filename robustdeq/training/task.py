"""What a training is given, and what the loop asks of the one that carries it out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustdeq.datasets import DataSpec, Slice
from robustdeq.differentiation import parse_gradient
from robustdeq.equilibrium import EquilibriumClassifier, Honest, Value
from robustdeq.interfaces import Recipe, option
from robustdeq.randomness import derived_seed
from robustdeq.suite import Augmentation
from robustdeq.targets import Target
from robustdeq.threats import Threat
from robustdeq.training._fields import Precision
from robustdeq.training.augmentation import augmented

CLIPPING = 5.0
"""Largest norm of a parameter gradient."""


@dataclass(frozen=True)
class Task:
    """A model to train with a recipe on a split; `seed` decides every random number.

    Attributes:
        precision: "bfloat16" runs forward passes under autocast; weights stay in float32.
        augmentation: what happens to images before they are trained on.
    """

    model: nn.Module
    recipe: Recipe
    data: Slice
    threat: Threat
    seed: int
    device: torch.device
    precision: Precision = "float32"
    augmentation: Augmentation = "none"

    def batch(self, images: Tensor, *place: object) -> Tensor:
        """A batch of uint8 images as they are trained on, in [0, 1].

        Args:
            place: where in the training it stands; decides its augmentation, with the seed.
        """
        x = images.float() / 255.0
        seed = derived_seed(self.seed, "augmentation", *place)
        return augmented(x, self.augmentation, torch.Generator().manual_seed(seed))

    def target(self, solver_steps: int | None = None) -> Target:
        """The view that the recipe differentiates.

        Args:
            solver_steps: step limit of the solver, in place of the recipe's own.
        """
        return training_view(self.model, self.recipe, self.data.spec, solver_steps)

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Autocast, where the precision asks for it."""
        enabled = self.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled):
            yield


class Trainer(ABC):
    """Carries out a training, step by step; `Descent` unless the recipe brings its own.

    A recipe brings its own with a method `trainer(task) -> Trainer`.

    Attributes:
        step: steps taken.
        steps: steps in all.
    """

    step: int
    steps: int

    @abstractmethod
    def advance(self) -> dict[str, Tensor | float]:
        """One step; returns what is to be logged of it, "loss" at least."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All that a checkpoint must hold: tensors, numbers, text, and lists and dicts of them."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""


def training_view(
    model: nn.Module, recipe: Recipe, spec: DataSpec, solver_steps: int | None = None
) -> Target:
    """A model through the recipe's own estimator and step limit, where it has them."""
    gradient = parse_gradient(str(option(recipe, "gradient", "honest")))
    steps = int(option(recipe, "solver_steps", 0)) if solver_steps is None else solver_steps
    if not isinstance(model, EquilibriumClassifier):
        return Target(model, spec.classes, gradient=gradient)
    solver = model.solver.with_steps(steps) if steps else None
    value: Value = "deployed" if isinstance(gradient, Honest) else "surrogate"
    return Target(model, spec.classes, gradient=gradient, value=value, solver=solver)


def constrain(model: nn.Module, iterations: int = 3) -> None:
    """Project a model's weights back to their constraints, where it has any."""
    project = getattr(model, "constrain", None)
    if callable(project):
        project(iterations)


def model_state(model: nn.Module) -> dict[str, Any]:
    """A copy of parameters and buffers, those that are no part of the weights included."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: value.detach().clone() for name, value in held.items()}


@torch.no_grad()
def restore_model(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write what `model_state` returned back into the model.

    Raises:
        KeyError: if a tensor is missing.
    """
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        value.copy_(state[name])
