"""Federated averaging in one process: the reference that other engines must agree with."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from robustdeq.errors import CaseError, sentence
from robustdeq.randomness import derived_seed
from robustdeq.targets import Target
from robustdeq.training.federated.client import (
    Report,
    RunClient,
    State,
    Work,
    run_client,
    sent,
)
from robustdeq.training.federated.fusion import client_weight, fused
from robustdeq.training.federated.partition import dealt
from robustdeq.training.federated.recipe import Federated
from robustdeq.training.task import Task, Trainer, constrain, model_state, restore_model

LOOKS = 20
"""How often in a training the accuracy of each class is measured."""
LOOKED_AT = 1000
"""On so many training images."""


class Failure(NamedTuple):
    """A client that did not come back from a round, and why."""

    client: int
    cause: str


class FederatedAveraging(Trainer):
    """FedAvg: broadcast, local training of the round's clients, weighted mean, constraints.

    One `advance` is one round. A client that fails is left out of that round's mean.

    Args:
        run_client: a client's part; another one stands for clients that fail or cheat.
    """

    def __init__(self, task: Task, run_client: RunClient = run_client) -> None:
        assert isinstance(task.recipe, Federated)
        self.task, self.model, self.recipe = task, task.model, task.recipe
        self.run_client = run_client
        # What clients copy: untouched by training, so that a client's part is a pure function.
        self.fresh = replace(task, model=copy.deepcopy(task.model))
        recipe, labels = self.recipe, task.data.labels
        self.parts = dealt(
            labels, recipe.clients, recipe.partition, recipe.concentration, task.seed
        )
        self.steps, self.step, self.bytes = recipe.rounds, 0, 0.0

    def advance(self) -> dict[str, Tensor | float]:
        """See `Trainer.advance`; one round."""
        state, reports, states, failures = sent(self.model), [], [], []
        for work in self.plan():
            try:
                update = self.run_client(self.fresh, work, state)
            except Exception as cause:  # whatever it is: the others go on
                failures.append(Failure(work.client, sentence(cause)))
                continue
            states.append(update.state)
            reports.append(update.report)
        self.require(reports, failures)
        self.adopt(fused(states, [weight_in(self.task, report) for report in reports]))
        return self.account(reports, failures)

    def plan(self) -> list[Work]:
        """The round's clients, drawn from (seed, round), and what each is to do."""
        recipe, number = self.recipe, self.step
        random = np.random.default_rng(derived_seed(self.task.seed, "participants", number))
        count = max(round(recipe.participation * recipe.clients), 1)
        chosen = np.sort(random.choice(recipe.clients, count, replace=False)).tolist()
        return [
            Work(
                client=client,
                round=number,
                rounds=recipe.rounds,
                rows=self.parts[client],
                steps=recipe.client_steps[client % len(recipe.client_steps)],
                epochs=recipe.local_epochs,
                learning_rate=self.learning_rate,
            )
            for client in chosen
        ]

    @property
    def learning_rate(self) -> float:
        """Of this round: a cosine over the rounds."""
        return self.recipe.learning_rate * (1 + math.cos(math.pi * self.step / self.steps)) / 2

    def require(self, reports: Sequence[Report], failures: Sequence[Failure]) -> None:
        """Refuse to go on without any client.

        Raises:
            CaseError: with the first cause.
        """
        if not reports:
            raise CaseError(
                f"all {len(failures)} clients failed in round {self.step + 1} of {self.steps}; "
                f"client {failures[0].client}: {failures[0].cause}"
            )

    def adopt(self, state: State) -> None:
        """Take a mean as the global model, and restore the constraints that averaging breaks."""
        self.model.load_state_dict(state)
        constrain(self.model, iterations=200)

    def account(
        self, reports: Sequence[Report], failures: Sequence[Failure]
    ) -> dict[str, Tensor | float]:
        """Close the round; returns what is to be logged of it."""
        rate = self.learning_rate
        self.step += 1
        # Down to all of the round's clients, up from those that came back.
        transfers = len(failures) + 2 * len(reports)
        traffic = 4.0 * transfers * exchanged(self.model.state_dict())
        self.bytes += traffic
        return {
            "loss": _mean((r.loss, r.samples) for r in reports),
            "learning_rate": rate,
            "participants": float(len(reports) + len(failures)),
            "failed_clients": float(len(failures)),
            "bytes_round": traffic,
            "bytes": self.bytes,
            "nfe_forward": _mean((r.nfe_forward, r.samples) for r in reports),
            "nfe_backward": _mean((r.nfe_backward, r.samples) for r in reports),
            **self._by_steps(reports),
            **self._by_class(),
        }

    def _by_steps(self, reports: Sequence[Report]) -> dict[str, float]:
        """Share of the mean, residual and NFE of the clients that afford K iterations."""
        whole = math.fsum(weight_in(self.task, r) for r in reports)
        columns: dict[str, float] = {}
        for steps in sorted({r.steps for r in reports}):
            group = [r for r in reports if r.steps == steps]
            columns |= {
                f"share_k{steps}": math.fsum(weight_in(self.task, r) for r in group) / whole,
                f"residual_k{steps}": _mean((r.residual, r.samples) for r in group),
                f"nfe_forward_k{steps}": _mean((r.nfe_forward, r.samples) for r in group),
                f"nfe_backward_k{steps}": _mean((r.nfe_backward, r.samples) for r in group),
            }
        return columns

    @torch.no_grad()
    def _by_class(self) -> dict[str, float]:
        """Accuracy of each class now and then: weights by K can erase those of weak clients."""
        if self.step % max(self.steps // LOOKS, 1) and self.step < self.steps:
            return {}
        data = self.task.data.take(slice(LOOKED_AT))
        images = torch.from_numpy(data.images).to(self.task.device).float() / 255.0
        target = Target(self.model, data.spec.classes)
        right = (target(images).logits.argmax(1).cpu().numpy() == data.labels).astype(float)
        return {
            f"accuracy_class_{label}": float(right[data.labels == label].mean())
            for label in np.unique(data.labels).tolist()
        }

    def state(self) -> dict[str, Any]:
        """See `Trainer.state`; all else follows from seed and round."""
        return {"step": self.step, "model": model_state(self.model), "bytes": self.bytes}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Trainer.restore`."""
        restore_model(self.model, state["model"])
        self.step, self.bytes = int(state["step"]), float(state["bytes"])


def weight_in(task: Task, report: Report) -> float:
    """What a client weighs in a task's mean."""
    recipe = task.recipe
    assert isinstance(recipe, Federated)
    return client_weight(recipe.weighting, report, recipe.temperature)


def exchanged(state: Mapping[str, Tensor]) -> int:
    """Floating-point numbers in a model as it is sent."""
    return sum(value.numel() for value in state.values() if value.is_floating_point())


def _mean(pairs: Iterable[tuple[float, int]]) -> float:
    """The mean of values over images."""
    values = list(pairs)
    return math.fsum(v * n for v, n in values) / sum(n for _, n in values)
