"""Recipes that stand around another recipe and change how it is carried out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from robustdeq.errors import UsageError
from robustdeq.interfaces import Recipe, option
from robustdeq.registry import load, parameters_of
from robustdeq.shapes import Images, Labels
from robustdeq.targets import Target
from robustdeq.threats import Threat


@dataclass(frozen=True, kw_only=True)
class Around(ABC):
    """A recipe around the recipe `base`, from which it takes all that it does not change.

    The base's parameters are resolved to all of them, so that they stand in the metadata of the
    weights.
    """

    base: str = "pgd_at"
    parameters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        recipe = load("recipe", self.base, self.parameters)
        if option(recipe, "trainer", None) is not None:
            raise UsageError(
                f"recipe {self.base!r} brings a trainer of its own and cannot stand in another; "
                "give a base such as 'pgd_at', or put the other one inside it."
            )
        object.__setattr__(self, "parameters", parameters_of(recipe))

    @cached_property
    def local(self) -> Recipe:
        """The recipe inside."""
        return load("recipe", self.base, self.parameters)

    @property
    def adversarial(self) -> bool:
        """Whether the recipe inside is."""
        return self.local.adversarial

    @property
    def epochs(self) -> int:
        """Of the recipe inside."""
        return self.local.epochs

    @property
    def batch_size(self) -> int:
        """Of the recipe inside."""
        return self.local.batch_size

    @property
    def learning_rate(self) -> float:
        """Of the recipe inside."""
        return self.local.learning_rate

    @property
    def weight_decay(self) -> float:
        """Of the recipe inside."""
        return self.local.weight_decay

    @property
    def gradient(self) -> str:
        """Of the recipe inside."""
        return str(option(self.local, "gradient", "honest"))

    @property
    def solver_steps(self) -> int:
        """Of the recipe inside."""
        return int(option(self.local, "solver_steps", 0))

    @abstractmethod
    def loss(
        self,
        target: Target,
        x: Images,
        y: Labels,
        threat: Threat,
        progress: float,
        generator: torch.Generator,
    ) -> Tensor:
        """See `robustdeq.interfaces.Recipe`."""
