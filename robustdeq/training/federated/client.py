"""A client's part of a round: from the global model to its own, and a report on it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustdeq.equilibrium import EquilibriumClassifier, Honest, Unrolled, metered
from robustdeq.errors import CaseError
from robustdeq.randomness import derived_seed
from robustdeq.targets import Target
from robustdeq.training.federated.partition import Rows
from robustdeq.training.task import CLIPPING, Task, constrain

State = dict[str, Tensor]
"""A model as it is sent: its `state_dict`, on the CPU. Buffers that are no part of the weights,
such as where power iterations stand, stay where they are."""
BATCH = 500


@dataclass(frozen=True)
class Work:
    """What a client is asked to do in one round; with the task and the model, all that decides.

    Attributes:
        rounds: of the whole training, counted from 0.
        rows: the client's images.
        steps: iterations of the solver that it affords.
        epochs: passes over its images.
    """

    client: int
    round: int
    rounds: int
    rows: Rows
    steps: int
    epochs: int
    learning_rate: float


class Report(NamedTuple):
    """What a client tells of its round.

    Attributes:
        samples: images that it holds.
        steps: iterations of the solver that it affords.
        loss: mean over its optimizer steps.
        residual: mean relative residual of its model on its images after those iterations; 0 for
            models that do not iterate.
        nfe_forward: evaluations of the cell per image and pass, the residual's included.
        nfe_backward: vector-Jacobian products per image and pass.
    """

    client: int
    samples: int
    steps: int
    loss: float
    residual: float
    nfe_forward: float
    nfe_backward: float


class Update(NamedTuple):
    """A client's model after its round."""

    state: State
    report: Report


RunClient = Callable[[Task, Work, State], Update]


def run_client(task: Task, work: Work, state: State) -> Update:
    """Train a copy of `task.model`, set to `state`, on the client's images.

    A pure function: the same arguments give the same update in whichever process.

    Raises:
        CaseError: if the weights stop being finite.
    """
    local = replace(task, model=copy.deepcopy(task.model))
    local.model.load_state_dict(state)
    local.model.train()
    images = torch.from_numpy(task.data.images[work.rows]).to(task.device)
    labels = torch.from_numpy(task.data.labels[work.rows]).to(task.device)
    with metered() as meter:
        loss = _descend(local, work, images, labels)
        residual = _residual(local, work.steps, images)
    trained = sent(local.model)
    if not all(bool(torch.isfinite(v).all()) for v in trained.values() if v.is_floating_point()):
        raise CaseError(
            f"client {work.client} diverged in round {work.round + 1}; lower the learning rate."
        )
    visits = len(work.rows) * work.epochs
    forward, backward = meter.forward / visits, meter.backward / visits
    return Update(
        trained,
        Report(work.client, len(work.rows), work.steps, loss, residual, forward, backward),
    )


def sent(model: nn.Module) -> State:
    """A model as it is sent."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def client_view(task: Task, steps: int) -> Target:
    """The task's model through its recipe's estimator, with the iterations of one client.

    Where the recipe wants the honest gradient, a client propagates back through the very
    iterations that it makes: the implicit gradient is that of a fixed point it does not reach.
    A phantom gradient takes its own steps after those.
    """
    view = task.target(steps)
    if isinstance(view.gradient, Honest) and view.iterates:
        return view.through(Unrolled(steps), "surrogate")
    return view


def _descend(task: Task, work: Work, images: Tensor, labels: Tensor) -> float:
    """Local training; the mean loss."""
    recipe, parameters = task.recipe, list(task.model.parameters())
    # A fresh one every round: moments of a model that has since been averaged would mislead.
    optimizer = torch.optim.AdamW(
        parameters, lr=work.learning_rate, weight_decay=recipe.weight_decay
    )
    target = client_view(task, work.steps)
    seed = derived_seed(task.seed, "noise", work.round, work.client)
    generator = torch.Generator().manual_seed(seed)
    batches = list(_batches(task, work))
    losses = []
    for k, rows in enumerate(batches):
        rows = rows.to(task.device)
        progress = (work.round + k / len(batches)) / work.rounds
        with task.arithmetic():
            x = task.batch(images[rows], work.round, work.client, k)
            loss = recipe.loss(target, x, labels[rows], task.threat, progress, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIPPING)
        optimizer.step()
        constrain(task.model)
        losses.append(float(loss.detach()))
    return math.fsum(losses) / len(losses)


def _batches(task: Task, work: Work) -> Iterator[Tensor]:
    """Positions among the client's images, in parts of nearly equal size: none is left out."""
    count = len(work.rows)
    for epoch in range(work.epochs):
        seed = derived_seed(task.seed, "shuffle", work.round, work.client, epoch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        yield from torch.tensor_split(order, math.ceil(count / task.recipe.batch_size))


@torch.no_grad()
def _residual(task: Task, steps: int, images: Tensor) -> float:
    model = task.model
    if not isinstance(model, EquilibriumClassifier):
        return 0.0
    target = task.target().through(Honest(), solver=model.solver.with_steps(steps))
    found = []
    for part in images.split(BATCH):
        solves = target(part.float() / 255.0).solves
        found += [solve.residual for solve in solves[-1:]]
    return float(torch.cat(found).double().mean()) if found else 0.0
