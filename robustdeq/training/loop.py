"""The training loop: seeded, checkpointed, and bounded in time if wanted."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustdeq.datasets import DataSpec, Slice
from robustdeq.equilibrium import EquilibriumClassifier, Honest, Value, parse_gradient
from robustdeq.errors import CaseError
from robustdeq.interfaces import Defense, Recipe, option
from robustdeq.randomness import derived_seed
from robustdeq.targets import Target
from robustdeq.threats import Threat


@dataclass(frozen=True)
class Progress:
    """Where a training stands: steps taken of how many, and the loss of the last."""

    step: int
    steps: int
    loss: float


def train(
    defense: Defense,
    recipe: Recipe,
    data: Slice,
    threat: Threat,
    *,
    seed: int,
    device: torch.device,
    minutes: float | None = None,
    checkpoint: Path | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> tuple[nn.Module, bool]:
    """Train a defense on a split; returns the model and whether the training was completed.

    The same arguments give the same weights on one machine and torch version. With `minutes`, the
    loop stops at that time and leaves a checkpoint; called again, it goes on from there.

    Raises:
        CaseError: if the loss stops being finite.
    """
    torch.manual_seed(derived_seed(seed, "initialization"))
    model = defense.build(data.spec, device)
    run = _Run(model, recipe, data, threat, seed, device)
    if checkpoint is not None and checkpoint.exists():
        run.restore(checkpoint)
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    model.train()
    while run.step < run.steps:
        if deadline is not None and time.monotonic() > deadline:
            break
        loss = run.advance()
        if run.step % 20 == 0 or run.step == run.steps:
            _refuse_divergence(loss, run)
            report(Progress(run.step, run.steps, float(loss)))
            if checkpoint is not None and run.step % 200 == 0:
                run.save(checkpoint)
    complete = run.step == run.steps
    if checkpoint is not None and not complete:
        run.save(checkpoint)
    elif checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    _constrain(model, iterations=200)
    return model.eval(), complete


class _Run:
    """The state of one training: everything a checkpoint must hold."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        data: Slice,
        threat: Threat,
        seed: int,
        device: torch.device,
    ) -> None:
        self.model, self.recipe, self.threat, self.seed = model, recipe, threat, seed
        self.device = device
        self.images = torch.from_numpy(data.images).to(device)
        self.labels = torch.from_numpy(data.labels).to(device)
        self.per_epoch = max(len(data) // recipe.batch_size, 1)
        self.steps, self.step = recipe.epochs * self.per_epoch, 0
        self.generator = torch.Generator().manual_seed(derived_seed(seed, "noise"))
        self.target = _training_view(model, recipe, data.spec)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=recipe.learning_rate, total_steps=self.steps + 1, pct_start=0.1
        )

    def advance(self) -> torch.Tensor:
        """One optimizer step; returns the loss."""
        rows = self._batch()
        x = self.images[rows].float() / 255.0
        loss = self.recipe.loss(
            self.target, x, self.labels[rows], self.threat, self.step / self.steps, self.generator
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimizer.step()
        self.schedule.step()
        _constrain(self.model)
        self.step += 1
        return loss.detach()

    def _batch(self) -> torch.Tensor:
        """The rows of this step, from the epoch's own shuffle: resuming needs no history."""
        epoch, position = divmod(self.step, self.per_epoch)
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "shuffle", epoch))
        order = torch.randperm(len(self.labels), generator=generator)
        size = self.recipe.batch_size
        return order[position * size : (position + 1) * size].to(self.device)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        torch.save(
            {
                "step": self.step,
                "model": self.model.state_dict(),
                "buffers": dict(self.model.named_buffers()),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "generator": self.generator.get_state(),
            },
            temporary,
        )
        temporary.replace(path)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            CaseError: if it belongs to another model, or cannot be read.
        """
        try:
            held: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
            self.model.load_state_dict(held["model"])
            for name, buffer in self.model.named_buffers():
                buffer.copy_(held["buffers"][name])
            self.optimizer.load_state_dict(held["optimizer"])
            self.schedule.load_state_dict(held["schedule"])
            self.generator.set_state(held["generator"].cpu())
            self.step = int(held["step"])
        except Exception as cause:
            raise CaseError(f"checkpoint {path} does not fit this training; delete it.") from cause


def _training_view(model: nn.Module, recipe: Recipe, spec: DataSpec) -> Target:
    """The target that the recipe differentiates: its own estimator and step limit, if any."""
    gradient = parse_gradient(str(option(recipe, "gradient", "honest")))
    steps = int(option(recipe, "solver_steps", 0))
    if not isinstance(model, EquilibriumClassifier):
        return Target(model, spec.classes, gradient=gradient)
    solver = model.solver.with_steps(steps) if steps else None
    value: Value = "deployed" if isinstance(gradient, Honest) else "surrogate"
    return Target(model, spec.classes, gradient=gradient, value=value, solver=solver)


def _constrain(model: nn.Module, iterations: int = 3) -> None:
    constrain = getattr(model, "constrain", None)
    if callable(constrain):
        constrain(iterations)


def _refuse_divergence(loss: torch.Tensor, run: _Run) -> None:
    if not torch.isfinite(loss):
        raise CaseError(
            f"training diverged at step {run.step} of {run.steps} (the loss is {float(loss)}); "
            "lower the learning rate."
        )
