"""Gradient descent on a recipe's loss: one optimizer, one model, one device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from robustdeq.equilibrium import metered
from robustdeq.randomness import derived_seed
from robustdeq.training.task import (
    CLIPPING,
    Task,
    Trainer,
    constrain,
    model_state,
    restore_model,
)


class Descent(Trainer):
    """AdamW on a one-cycle schedule that is counted in steps; gradients clipped."""

    def __init__(self, task: Task) -> None:
        self.task, self.model, recipe = task, task.model, task.recipe
        self.images = torch.from_numpy(task.data.images).to(task.device)
        self.labels = torch.from_numpy(task.data.labels).to(task.device)
        self.per_epoch = max(len(task.data) // recipe.batch_size, 1)
        self.steps, self.step = recipe.epochs * self.per_epoch, 0
        self.generator = torch.Generator().manual_seed(derived_seed(task.seed, "noise"))
        self.target = task.target()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=recipe.learning_rate, total_steps=self.steps + 1, pct_start=0.1
        )

    def advance(self) -> dict[str, Tensor | float]:
        """See `Trainer.advance`."""
        rows = self._batch()
        x, y = self.task.batch(self.images[rows], self.step), self.labels[rows]
        with metered() as meter, self.task.arithmetic():
            loss = self.task.recipe.loss(
                self.target, x, y, self.task.threat, self.step / self.steps, self.generator
            )
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIPPING)
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.schedule.step()
        constrain(self.model)
        self.step += 1
        return {
            "loss": loss.detach(),
            "gradient_norm": norm.detach(),
            "learning_rate": float(rate),
            "nfe_forward": meter.forward / len(x),
            "nfe_backward": meter.backward / len(x),
        }

    def _batch(self) -> Tensor:
        """The rows of this step, from the epoch's own shuffle: resuming needs no history."""
        epoch, position = divmod(self.step, self.per_epoch)
        generator = torch.Generator().manual_seed(derived_seed(self.task.seed, "shuffle", epoch))
        order = torch.randperm(len(self.labels), generator=generator)
        size = self.task.recipe.batch_size
        return order[position * size : (position + 1) * size].to(self.task.device)

    def state(self) -> dict[str, Any]:
        """See `Trainer.state`."""
        return {
            "step": self.step,
            "model": model_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Trainer.restore`."""
        restore_model(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"].cpu())
        self.step = int(state["step"])
