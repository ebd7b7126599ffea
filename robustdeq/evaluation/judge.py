"""The judge: the deployed predictor alone decides what is robust.

Cold start, deployed solver and tolerance, per-sample stopping, float32 that no setting of torch
replaces by less; no gradient, no attack's opinion.
There is no way to hand it a warm start.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from robustdeq.arithmetic import exact_float32
from robustdeq.equilibrium import Solve
from robustdeq.randomness import derived_seed
from robustdeq.shapes import Counts, Images, Labels, Logits, Mask, PerSample
from robustdeq.targets import Target

DRAWS = 32
"""Draws per sample by which a randomized model is judged."""


class Judgment(NamedTuple):
    """What the judge found, per sample.

    Attributes:
        prediction: predicted class; -1 where a logit is not finite, which is never correct.
        correct: the prediction is the label; for randomized models, more than half of the draws.
        votes: share of draws that are right (0 or 1 for deterministic models).
        residual, steps: of the deployed solves, the worst; None for models without.
    """

    prediction: Labels
    correct: Mask
    votes: PerSample
    residual: PerSample | None
    steps: Counts | None


class Judge:
    """Scores inputs for one model.

    Args:
        scope: seeds the draws of a randomized model together with the sample's index, so that
            anyone can replay them.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: int,
        *,
        scope: str,
        randomized: bool = False,
        batch_size: int | None = None,
    ) -> None:
        self.target = Target(model, classes, batch_size=batch_size)
        self.scope, self.randomized = scope, randomized

    @torch.no_grad()
    def __call__(self, x: Images, y: Labels, indices: Sequence[int]) -> Judgment:
        """Judge inputs `x` with labels `y`; `indices` are their places in the data set."""
        with exact_float32():
            return self._by_draws(x, y, indices) if self.randomized else self._at_once(x, y)

    def _at_once(self, x: Images, y: Labels) -> Judgment:
        logits, solves = self.target(x)
        prediction = predictions(logits)
        correct = prediction == y
        return Judgment(prediction, correct, correct.double(), *worst_solve(solves, len(x)))

    def _by_draws(self, x: Images, y: Labels, indices: Sequence[int]) -> Judgment:
        drawn = torch.stack([self._draws(x[k : k + 1], i) for k, i in enumerate(indices)])
        votes = (drawn == y[:, None]).double().mean(1)
        prediction = drawn.mode(dim=1).values
        return Judgment(prediction, votes > 0.5, votes, None, None)

    def _draws(self, x: Images, index: int) -> Tensor:
        """`DRAWS` predictions of one input, from a generator that belongs to its index."""
        drawn = []
        for draw in range(DRAWS):
            with seeded(derived_seed(self.scope, index, draw), x.device):
                drawn.append(predictions(self.target(x).logits))
        return torch.cat(drawn)


def predictions(logits: Logits) -> Labels:
    """The largest logit's class; -1 where any logit is not finite."""
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)


def worst_solve(solves: Sequence[Solve], batch: int) -> tuple[PerSample | None, Counts | None]:
    """Largest residual and sum of steps over the solves of a forward pass, per sample.

    A solve over a multiple of the batch (copies of each input) counts for all samples alike.
    """
    if not solves:
        return None, None
    residuals, steps = [], []
    for solve in solves:
        whole = len(solve.residual) == batch
        residuals.append(solve.residual if whole else solve.residual.max().expand(batch))
        steps.append(solve.steps if whole else solve.steps.max().expand(batch))
    return torch.stack(residuals).amax(0), torch.stack(steps).sum(0)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """All global generators seeded inside the block, and restored after it."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
