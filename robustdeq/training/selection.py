"""Which weights of a training are kept: the last, or the best on images held out for that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

from robustdeq.datasets import Slice
from robustdeq.errors import UsageError
from robustdeq.randomness import derived_seed
from robustdeq.targets import Target
from robustdeq.training._inner import Ascent, random_start
from robustdeq.training.task import Task, constrain, model_state, restore_model

LOOKS = 20
"""How often in a training the held-out images are looked at."""
STEPS, STEP_SIZE = 10, 0.25
"""The PGD by which weights are compared; one short attack ranks, it does not judge."""
BATCH = 250


def held_out(data: Slice, count: int, seed: int) -> tuple[Slice, Slice]:
    """A training split without `count` random images, and those images.

    Raises:
        UsageError: if that leaves no images on either side.
    """
    if not 0 <= count < len(data):
        raise UsageError(
            f"--validation is {count}; give 0 to {len(data) - 1} of the {len(data)} images."
        )
    order = np.random.default_rng(derived_seed(seed, "validation")).permutation(len(data))
    return data.take(np.sort(order[count:])), data.take(np.sort(order[:count]))


class Selection:
    """Scores a model on held-out training images now and then, and keeps the best weights.

    The score is the accuracy under a short PGD through the training view, or the clean accuracy
    for a recipe without attacks. Of equal scores the later one is kept.
    """

    def __init__(self, task: Task, data: Slice, steps: int) -> None:
        self.task = task
        self.interval = max(steps // LOOKS, 1)
        self.x = torch.from_numpy(data.images).to(task.device).float() / 255.0
        self.y = torch.from_numpy(data.labels).to(task.device)
        self.best, self.step, self.kept = -1.0, 0, model_state(task.model)

    def due(self, step: int, steps: int) -> bool:
        """Whether it is time to look."""
        return step % self.interval == 0 or step == steps

    def look(self, step: int) -> float:
        """Score the model as it is, and keep it if none was better."""
        score = self._score()
        if score >= self.best:
            self.best, self.step, self.kept = score, step, model_state(self.task.model)
        return score

    def restore_best(self) -> None:
        """Put the kept weights into the model."""
        restore_model(self.task.model, self.kept)

    def _score(self) -> float:
        model, target = self.task.model, self.task.target()
        before = model_state(model)
        # What is kept is what would be deployed: with its constraints met tightly.
        constrain(model, iterations=200)
        try:
            right = [
                self._correct(target, self.x[k : k + BATCH], self.y[k : k + BATCH])
                for k in range(0, len(self.x), BATCH)
            ]
        finally:
            restore_model(model, before)
        return sum(right) / len(self.x)

    def _correct(self, target: Target, x: torch.Tensor, y: torch.Tensor) -> int:
        if self.task.recipe.adversarial:
            generator = torch.Generator().manual_seed(derived_seed(self.task.seed, "look"))
            x = Ascent(STEPS, STEP_SIZE)(
                target,
                x,
                self.task.threat,
                lambda logits: F.cross_entropy(logits, y, reduction="none"),
                random_start(x, self.task.threat, generator),
            ).x
        with torch.no_grad():
            return int((target(x).logits.argmax(1) == y).sum())

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"best": self.best, "step": self.step, "kept": self.kept}

    def restore(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint."""
        self.best, self.step = float(state["best"]), int(state["step"])
        self.kept = dict(state["kept"])
