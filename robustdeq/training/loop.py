"""The training loop: seeded, logged, checkpointed, and bounded in time if wanted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robustdeq.datasets import Slice
from robustdeq.equilibrium import EquilibriumClassifier, Honest
from robustdeq.errors import CaseError
from robustdeq.interfaces import Defense, Recipe, option
from robustdeq.randomness import derived_seed
from robustdeq.suite import Augmentation
from robustdeq.threats import Threat
from robustdeq.training._fields import Precision
from robustdeq.training.checkpoint import Checkpoint
from robustdeq.training.descent import Descent
from robustdeq.training.history import Row
from robustdeq.training.selection import Selection, held_out
from robustdeq.training.task import Task, Trainer, constrain

LINES = 100
"""Rows of a log, about."""


@dataclass(frozen=True)
class Progress:
    """Where a training stands: steps taken of how many, and the loss of the last."""

    step: int
    steps: int
    loss: float


class Training(NamedTuple):
    """A trained model in eval mode, whether the training was completed, and its log.

    `selected` is the step whose weights these are.
    """

    model: nn.Module
    complete: bool
    log: list[Row]
    selected: int


def train(
    defense: Defense,
    recipe: Recipe,
    data: Slice,
    threat: Threat,
    *,
    seed: int,
    device: torch.device,
    validation: int = 0,
    precision: Precision = "float32",
    augmentation: Augmentation = "none",
    minutes: float | None = None,
    checkpoint: Checkpoint | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Training:
    """Train a defense on a split.

    The same arguments give the same weights on one machine and torch version, however often the
    training was interrupted and gone on with from its checkpoint.

    Args:
        validation: training images held out; the weights that do best on them are returned. With
            0 the last ones are.
        minutes: stop at that time, with the weights as they stand.

    Raises:
        CaseError: if the loss stops being finite, or the checkpoint is another training's.
    """
    torch.manual_seed(derived_seed(seed, "initialization"))
    model = defense.build(data.spec, device)
    kept, look = held_out(data, validation, seed)
    task = Task(model, recipe, kept, threat, seed, device, precision, augmentation)
    bring: Callable[[Task], Trainer] = option(recipe, "trainer", Descent)
    loop = _Loop(task, bring(task), look if validation else None, checkpoint)
    loop.resume()
    model.train()
    complete = loop.go(None if minutes is None else time.monotonic() + 60 * minutes, report)
    selected = loop.finish(complete)
    constrain(model, iterations=200)
    return Training(model.eval(), complete, loop.log, selected)


class _Loop:
    def __init__(
        self, task: Task, trainer: Trainer, look: Slice | None, checkpoint: Checkpoint | None
    ) -> None:
        self.task, self.trainer, self.checkpoint = task, trainer, checkpoint
        self.selection = None if look is None else Selection(task, look, trainer.steps)
        self.log: list[Row] = []
        self.interval = max(trainer.steps // LINES, 1)

    def go(self, deadline: float | None, report: Callable[[Progress], None]) -> bool:
        """Step until done or out of time; returns whether it is done."""
        trainer = self.trainer
        while trainer.step < trainer.steps:
            if deadline is not None and time.monotonic() > deadline:
                return False
            observed = trainer.advance()
            if trainer.step % self.interval == 0 or trainer.step == trainer.steps:
                row = self._observe(observed)
                report(Progress(trainer.step, trainer.steps, row["loss"]))
            if self.selection is not None and self.selection.due(trainer.step, trainer.steps):
                score = self.selection.look(trainer.step)
                self.log.append({"step": trainer.step, "validation": score})
            if self.checkpoint is not None and self.checkpoint.due:
                self.checkpoint.write(self._state())
        return True

    def _observe(self, observed: dict[str, Tensor | float]) -> Row:
        row = {"step": float(self.trainer.step), **{k: float(v) for k, v in observed.items()}}
        if not math.isfinite(row["loss"]):
            raise CaseError(
                f"training diverged at step {self.trainer.step} of {self.trainer.steps} (the loss "
                f"is {row['loss']}); lower the learning rate."
            )
        residual = self._residual()
        self.log.append(row if residual is None else {**row, "residual": residual})
        return row

    @torch.no_grad()
    def _residual(self) -> float | None:
        """Median relative residual of the *deployed* solver on a few training images."""
        if not isinstance(self.task.model, EquilibriumClassifier):
            return None
        images = torch.from_numpy(self.task.data.images[:32]).to(self.task.device).float() / 255.0
        target = self.task.target().through(Honest(), solver=self.task.model.solver)
        solves = target(images).solves
        return float(solves[-1].residual.median()) if solves else None

    def finish(self, complete: bool) -> int:
        """Choose the weights, and leave the checkpoint only where it is needed."""
        if self.checkpoint is not None:
            if complete:
                self.checkpoint.discard()
            else:
                self.checkpoint.write(self._state())
        if self.selection is None or not complete:
            return self.trainer.step
        self.selection.restore_best()
        return self.selection.step

    def _state(self) -> dict[str, Any]:
        return {
            "trainer": self.trainer.state(),
            "selection": None if self.selection is None else self.selection.state(),
            "log": self.log,
        }

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        held = None if self.checkpoint is None else self.checkpoint.read(self.task.device)
        if held is None:
            return
        self.trainer.restore(held["trainer"])
        if self.selection is not None:
            self.selection.restore(held["selection"])
        self.log = list(held["log"])
