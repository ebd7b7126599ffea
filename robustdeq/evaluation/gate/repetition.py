"""Whether the same question gets the same answer: randomness, and state kept between calls."""

from __future__ import annotations

import torch

from robustdeq.evaluation.gate.examined import (
    SAME,
    SEED,
    Examined,
    asked_after_another,
    gap,
    seeded_logits,
)
from robustdeq.evaluation.gate.rows import Row, measured, skipped
from robustdeq.evaluation.judge import seeded
from robustdeq.shapes import Images
from robustdeq.targets import Target

SEEDS = 8
"""Seeds that a few samples are asked under: a random depth can come out equal twice."""
ROUNDS = 12
"""Equal questions after which a model that keeps state has settled into a cycle."""


def is_randomized(target: Target, x: Images) -> bool:
    """Whether passes over the same input, under several seeds, differ by more than rounding.

    A model that keeps state between calls differs as well; it is asked two questions in turn until
    its answers repeat, and is randomized only if they never do, or if the seed then matters.
    """
    whole = [seeded_logits(target, x, seed) for seed in (1, 2)]
    few = [seeded_logits(target, x[:SEEDS], seed) for seed in range(3, 3 + SEEDS)]
    if all(gap(part[0], other) <= SAME for part in (whole, few) for other in part[1:]):
        return False
    settled = [asked_after_another(target, x, SEED) for _ in range(ROUNDS)]
    if gap(settled[-1], settled[-2]) > SAME:
        return True
    others = [asked_after_another(target, x, seed) for seed in range(2, 2 + SEEDS)]
    return any(gap(settled[-1], other) > SAME for other in others)


def randomness(exam: Examined) -> list[Row]:
    """The track of the model, as a row."""
    detail = "logits depend on the random seed, so the model is judged by draws"
    value = float(exam.randomized)
    return [measured("randomized", value, len(exam.few), detail if exam.randomized else "")]


def memory(exam: Examined) -> list[Row]:
    """Whether logits depend on the calls before: on the last, or on any since the beginning.

    Also whether an answer is kept for a tensor that has been written into since.
    """
    x = exam.few
    after = asked_after_another(exam.target, x, SEED)
    if exam.randomized and gap(after, asked_after_another(exam.target, x, SEED)) > SAME:
        # Not even equal questions in a row get equal answers.
        return [skipped("keeps_state", "randomized by a generator that no seed reaches")]
    again = exam.logits(x)
    apart = max(gap(after, again), gap(exam.first, again), _stale(exam), exam.drift)
    return [measured("keeps_state", apart, len(x))]


def _stale(exam: Examined) -> float:
    """How far the answer is from the right one for a tensor that was asked about before."""
    tensor, other = exam.few.clone(), 1.0 - exam.few
    with seeded(SEED, tensor.device), torch.no_grad():
        exam.target(tensor)
    with seeded(SEED, tensor.device), torch.no_grad():
        answer = exam.target(tensor.copy_(other)).logits
    return gap(exam.logits(other), answer)
