"""`--estimate`: what a suite costs if no sample falls, from a few timed batches and no attack."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from robustdeq.datasets import load_slice
from robustdeq.errors import RobustDEQError, sentence
from robustdeq.evaluation.chain import Subject
from robustdeq.evaluation.stages import Stage, attack_stages
from robustdeq.evaluation.subject import (
    build_subject,
    chunk_count,
    chunk_of,
    chunk_slice,
    pick_device,
    weights_source,
)
from robustdeq.interfaces import Budget, option
from robustdeq.suite import Case, Suite, attacks_of, expand
from robustdeq.targets import Target

REPEATS = 3


@dataclass(frozen=True)
class Estimate:
    """One row's cost if no sample falls, in seconds on one worker."""

    id: str
    threat: str
    chunks: int
    forward_ms: float
    gradient_ms: float
    seconds: float
    note: str = ""


def estimate_suite(suite: Suite, device_name: str, weights: Path | None = None) -> list[Estimate]:
    """Time a forward pass and a gradient of each model on one chunk, and multiply.

    Raises:
        UsageError: if data are missing.
    """
    device = pick_device(device_name)
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)  # as the workers run
    try:
        return [_estimate(suite, case, device, weights) for case in expand(suite)]
    finally:
        torch.set_num_threads(threads)


def _estimate(suite: Suite, case: Case, device: torch.device, weights: Path | None) -> Estimate:
    data = load_slice(case.dataset.name, "test", case.dataset.samples or None)
    chunks = chunk_count(len(data), case.chunk)
    try:
        source = weights_source(suite, weights)
        subject = build_subject(case, data.identity(), source, device, None)
        x = chunk_of(chunk_slice(data, 0, case.chunk), 0, device).x
        # At the edge of the ball, where solves take longer than at clean inputs.
        edge = case.threat.eps * torch.randn_like(x).sign()
        forward, gradient = _timed(subject, case.threat.project(x, x + edge))
    except RobustDEQError as cause:
        return Estimate(case.entry.id, str(case.threat), chunks, 0.0, 0.0, 0.0, sentence(cause))
    seconds = 0.0
    target = Target(subject.model, subject.classes)
    for stage in attack_stages(attacks_of(suite)):
        if stage.fits("deterministic", target):
            budget = _budget(stage, target)
            seconds += budget.forward * forward + budget.backward * max(gradient - forward, 0.0)
    return Estimate(
        case.entry.id, str(case.threat), chunks, 1e3 * forward, 1e3 * gradient, seconds * chunks
    )


def _budget(stage: Stage, target: Target) -> Budget:
    """The figure of what the attack comes to on this model; without one, a hundred gradients."""
    attack = option(stage.plugin, "resolved", lambda target: stage.plugin)(target)
    return Budget(*option(attack, "budget", lambda classes: Budget(100, 100))(target.classes))


def _timed(subject: Subject, x: torch.Tensor) -> tuple[float, float]:
    target = Target(subject.model, subject.classes)

    def forward() -> None:
        with torch.no_grad():
            target(x)

    def gradient() -> None:
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(target(leaf).logits.logsumexp(1).sum(), leaf)

    return _fastest(forward, x.device), _fastest(gradient, x.device)


def _fastest(action: Callable[[], None], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS + 1):
        begun = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return min(times[1:])
