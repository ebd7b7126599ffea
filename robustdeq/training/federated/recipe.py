"""Federated training of equilibrium models (Gkillas, Ampeliotis and Berberidis 2023)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from robustdeq.errors import UsageError
from robustdeq.interfaces import About
from robustdeq.registry import plugin_class
from robustdeq.shapes import Images, Labels
from robustdeq.targets import Target
from robustdeq.threats import Threat
from robustdeq.training.composition import Around
from robustdeq.training.federated.fusion import Weighting
from robustdeq.training.federated.partition import Partition
from robustdeq.training.task import Task, Trainer

Engine = Literal["in_process", "flower"]
_SUITED = {"batch_size": 32, "learning_rate": 0.016}
"""Of a local recipe that is told no other: a client has few images, and the mean of models moves
less than each of them."""


@dataclass(frozen=True, kw_only=True)
class Federated(Around):
    """Rounds of local training, with a weighted mean of the clients' models after each.

    Client i affords `client_steps[i % len(client_steps)]` iterations of the solver. Its optimizer
    is a fresh AdamW in every round; the learning rate falls as a cosine over the rounds.

    Attributes:
        base: name of the local recipe.
        parameters: of the local recipe; its `epochs` and `solver_steps` have no effect, and its
            `batch_size` and `learning_rate` are 32 and 0.016 by default.
        rounds: of broadcast, local training and fusion.
        local_epochs: passes over its own images that a client makes in a round.
        clients: number of clients, at least 1.
        client_steps: solver iterations that the clients afford, in turn.
        weighting: what a client weighs in the mean; see `fusion.client_weight`.
        temperature: of the softmax weighting, in iterations.
        partition: how the images are dealt to the clients; see `partition.dealt`.
        concentration: of the Dirichlet partition; smaller is more skewed.
        participation: share of the clients that take part in a round.
        engine: "in_process", or "flower" for Flower's simulation (extra [federated]).
    """

    about: ClassVar[About] = About(
        "Deep Equilibrium Models Meet Federated Learning",
        "Alexandros Gkillas, Dimitris Ampeliotis, Kostas Berberidis",
        "EUSIPCO 2023",
        "https://arxiv.org/abs/2305.18646",
        claimed="Equilibrium models in federated learning cut communication, as the shared layer "
        "is small, and let devices spend different numbers of fixed-point iterations; a weighted "
        "average at the server reflects the differing quality of the clients' models (abstract).",
        reproduced="Only the abstract was at hand: the weights of the average, the architecture "
        "and all figures are unknown to us. Four weightings are offered to be compared, around "
        "any local recipe, adversarial ones included; partitions, schedule and cells are ours.",
    )
    prefix: ClassVar[str] = "Gkillas2023Deep"

    base: str = "pgd_at"
    parameters: dict[str, Any] = field(default_factory=dict)
    rounds: int = 40
    local_epochs: int = 3
    clients: int = 8
    client_steps: tuple[int, ...] = (4, 8, 16)
    weighting: Weighting = "samples"
    temperature: float = 8.0
    partition: Partition = "iid"
    concentration: float = 0.1
    participation: float = 1.0
    engine: Engine = "in_process"

    def __post_init__(self) -> None:
        _check(self)
        object.__setattr__(self, "parameters", self._suited())
        super().__post_init__()

    def _suited(self) -> dict[str, Any]:
        known = {member.name for member in fields(plugin_class("recipe", self.base))}
        suited = {name: value for name, value in _SUITED.items() if name in known}
        return {**suited, **self.parameters}

    @property
    def epochs(self) -> int:
        """Passes over the training split, if all clients take part in all rounds."""
        return self.rounds * self.local_epochs

    def loss(
        self,
        target: Target,
        x: Images,
        y: Labels,
        threat: Threat,
        progress: float,
        generator: torch.Generator,
    ) -> Tensor:
        """That of the local recipe; see `robustdeq.interfaces.Recipe`."""
        return self.local.loss(target, x, y, threat, progress, generator)

    def trainer(self, task: Task) -> Trainer:
        """The server; see `robustdeq.interfaces.Recipe`."""
        # Here, since the servers import this class, and Flower is an extra.
        if self.engine == "flower":
            from robustdeq.training.federated.flower import FlowerAveraging

            return FlowerAveraging(task)
        from robustdeq.training.federated.server import FederatedAveraging

        return FederatedAveraging(task)


_RULES: dict[str, tuple[str, Callable[[Federated], bool]]] = {
    "rounds": ("at least 1", lambda r: r.rounds >= 1),
    "local_epochs": ("at least 1", lambda r: r.local_epochs >= 1),
    "clients": ("at least 1", lambda r: r.clients >= 1),
    "client_steps": (
        "whole numbers of at least 1, such as [4, 8, 16]",
        lambda r: bool(r.client_steps) and all(type(k) is int and k >= 1 for k in r.client_steps),
    ),
    # Else the exponentials of the softmax overflow.
    "temperature": (
        "at least 1/500 of the most client_steps",
        lambda r: 500 * r.temperature >= max(r.client_steps),
    ),
    "concentration": ("more than 0", lambda r: r.concentration > 0),
    "participation": ("more than 0 and at most 1", lambda r: 0 < r.participation <= 1),
}


def _check(recipe: Federated) -> None:
    for name, (wanted, holds) in _RULES.items():
        if not holds(recipe):
            raise UsageError(
                f"parameter {name!r} of recipe 'federated' is {getattr(recipe, name)!r}; "
                f"give {wanted}."
            )
