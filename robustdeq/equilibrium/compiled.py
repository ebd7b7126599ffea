"""Models whose stem, cell and readout torch.compile has made kernels of."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from robustdeq.equilibrium.joint import Dynamics
from robustdeq.equilibrium.lockstep import Lockstep
from robustdeq.equilibrium.memory_format import SAMPLES, near
from robustdeq.equilibrium.model import EquilibriumClassifier
from robustdeq.equilibrium.solution import Injection, each_part
from robustdeq.shapes import Images, Logits

_FEWEST = 32
"""Rows are filled up to a power of two, and to this at least: on a GPU each number is recorded."""
_LOOKS = 3
"""A graph of kernels is recorded at the second call and replayed from the third on."""


class Compiled(EquilibriumClassifier):
    """A copy of a model, for searching: the same functions, in kernels of their own.

    On a GPU the kernels of a call are replayed as one CUDA graph. Weights take no gradients.

    Args:
        backend: of torch.compile; by default its own.
    """

    def __init__(self, model: EquilibriumClassifier, backend: str = "inductor") -> None:
        super().__init__(model.solver, model.gradient)
        self.model = copy.deepcopy(model).requires_grad_(False)
        # Counting is done here, for the rows that are asked for.
        cell = inspect.unwrap(type(model).cell)
        inner = self.model

        def step(z: Tensor, injection: Injection) -> Tensor:
            found: Tensor = cell(inner, z, injection, 0)
            return found

        on_gpu = backend == "inductor" and any(p.is_cuda for p in model.parameters())
        options: dict[str, Any] = {"mode": "reduce-overhead"} if on_gpu else {}
        self._format = _format(inner)
        self._embed = torch.compile(inner.embed, backend=backend, **options)
        self._step = torch.compile(step, backend=backend, **options)
        self._readout = torch.compile(inner.readout, backend=backend, **options)

    def start(self, injection: Injection) -> Tensor:
        """See `EquilibriumClassifier`."""
        return self.model.start(injection)

    def embed(self, x: Images) -> Injection:
        """See `EquilibriumClassifier`."""
        return each_part(partial(_own, count=len(x)), self._embed(self._filled(x)))

    def cell(self, z: Tensor, injection: Injection, step: int) -> Tensor:
        """See `EquilibriumClassifier`; all steps are alike, as for all that is iterated jointly."""
        return _own(self._step(self._filled(z), each_part(self._filled, injection)), len(z))

    def readout(self, z: Tensor) -> Logits:
        """See `EquilibriumClassifier`."""
        return _own(self._readout(self._filled(z)), len(z))

    def _filled(self, part: Tensor) -> Tensor:
        """With the last row repeated, and in one order in memory: each other would be compiled."""
        missing = max(_FEWEST, 1 << (len(part) - 1).bit_length()) - len(part)
        if missing and len(part):
            part = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])])
        return part.contiguous(memory_format=self._format) if part.dim() == 4 else part.contiguous()


def compiled(
    dynamics: Dynamics, x: Images, build: Callable[[EquilibriumClassifier], Compiled] = Compiled
) -> EquilibriumClassifier:
    """A copy of a model with compiled parts; `benchmarks/looks.py` measures whether it is quicker.

    The model itself where it cannot be compiled, or where logits or gradients of the copy are
    others by more than rounding: it is for searching, never for judging.

    Args:
        x: images on which the two are compared; the first few are taken.
        build: makes the copy.
    """
    try:
        with warnings.catch_warnings():
            # Tracing looks at the gradients of whatever it is given.
            warnings.filterwarnings("ignore", message="The .grad attribute")
            # What was compiled for other models counts towards torch's limit of variants.
            torch.compiler.reset()
            twin = build(dynamics.model)
            alike = _alike(dynamics, replace(dynamics, model=twin), x)
    except Exception:  # no compiler on this machine, or whatever a stranger's model makes of it
        return dynamics.model
    return twin if alike else dynamics.model


def _alike(one: Dynamics, other: Dynamics, x: Images) -> bool:
    """Whether looks show the same, of few samples and of many, which are kernels of their own."""
    few = x[:SAMPLES]
    many = few.repeat(_FEWEST, 1, 1, 1)
    return all(near(*looks) for rows in (few, many) for looks in _looks(one, other, rows))


def _looks(one: Dynamics, other: Dynamics, x: Images) -> list[tuple[Tensor, Tensor]]:
    state, shown = one.start(x), []
    for _ in range(_LOOKS):
        expected, found = (
            Lockstep(dynamics).look(x, state, lambda logits: logits.logsumexp(1))
            for dynamics in (one, other)
        )
        shown += [(expected.logits, found.logits), (expected.gradient, found.gradient)]
        shown += [(expected.state.z, found.state.z)]
        state = expected.state
    return shown


def _format(model: EquilibriumClassifier) -> torch.memory_format:
    """That of a model's convolutions."""
    last = torch.channels_last
    kernels = [p for p in model.parameters() if p.dim() == 4]
    kept = kernels and all(p.is_contiguous(memory_format=last) for p in kernels)
    return last if kept else torch.contiguous_format


def _own(part: Tensor, count: int) -> Tensor:
    """The rows that were asked for, in memory of their own: a graph's is used again."""
    return part[:count].clone()
