"""The residual along the deployed solver's steps, at clean inputs and at examples that broke them.

An attack that drives a model where its solver no longer converges breaks the solver rather than
the classifier: the two curves show which it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustdeq.equilibrium import Drive, EquilibriumClassifier, relative_residual
from robustdeq.equilibrium.solution import Cell, Injection, Problem
from robustdeq.evaluation.judge import seeded
from robustdeq.records import Record, broken
from robustdeq.shapes import Images

SAMPLES = 64
"""Most samples of a chunk that are traced: the first ones that fell, else the first ones."""
_QUANTILES = {"low": 0.1, "median": 0.5, "high": 0.9}


def trace_rows(
    model: EquilibriumClassifier, x: Images, records: Sequence[Record], seed: int
) -> list[dict[str, Any]]:
    """Rows for `records.trace_frame`: the residual's quantiles per step, of a chunk's samples.

    The clean inputs and the examples are those of the same samples, so that the curves can be
    compared; where nothing has fallen, there are clean inputs alone. A sample whose solve has
    stopped keeps its last residual.

    Args:
        x: the chunk's clean images.
        records: the chunk's, with pixels.
        seed: of the draws of a randomized model.
    """
    fallen = dict(sorted(_examples(records, x).items())[:SAMPLES])
    if not fallen:
        return list(_rows("clean", residuals(model, x[:SAMPLES], seed)))
    held = torch.stack(list(fallen.values()))
    clean = residuals(model, x[list(fallen)], seed)
    return [*_rows("clean", clean), *_rows("adversarial", residuals(model, held, seed))]


@torch.no_grad()
def residuals(model: EquilibriumClassifier, x: Images, seed: int) -> list[NDArray[np.float64]]:
    """Relative residuals (steps, batch) of each solve of a forward pass, NaN once it has stopped.

    Solves over another number of rows than the batch are left out.
    """
    drive = _Recorder(model)
    with seeded(seed, x.device):
        model.predict(x, drive)
    return [np.stack(steps) for steps, rows in drive.told if rows == len(x)]


class _Recorder(Drive):
    """A deployed solve whose every evaluation is told."""

    def __init__(self, model: EquilibriumClassifier) -> None:
        super().__init__(model.solver, model.gradient, model.start)
        self.told: list[tuple[list[NDArray[np.float64]], int]] = []

    def _problem(self, cell: Cell, injection: Injection, start: Tensor | None) -> Problem:
        problem = super()._problem(cell, injection, start)
        steps: list[NDArray[np.float64]] = []
        self.told.append((steps, len(problem.start)))
        return _Told(problem.cell, problem.injection, problem.start, problem.warm, steps)


@dataclass(frozen=True)
class _Told(Problem):
    """A problem that keeps the residual of each of its evaluations."""

    steps: list[NDArray[np.float64]] = field(default_factory=list)

    def __call__(self, z: Tensor, step: int, rows: Tensor | None = None) -> Tensor:
        fz = super().__call__(z, step, rows)
        found = np.full(len(self.start), np.nan)
        at = slice(None) if rows is None else rows.cpu().numpy()
        found[at] = relative_residual(fz, z).double().cpu().numpy()
        self.steps.append(found)
        return fz


def _rows(point: str, solves: Sequence[NDArray[np.float64]]) -> Iterator[dict[str, Any]]:
    for number, steps in enumerate(solves):
        held = pd.DataFrame(steps).ffill().to_numpy()
        for step, values in enumerate(held, 1):
            quantiles = {name: float(np.quantile(values, q)) for name, q in _QUANTILES.items()}
            row = {"point": point, "solve": number, "step": step, "n": len(values)}
            yield row | quantiles


def _examples(records: Sequence[Record], x: Images) -> dict[int, Tensor]:
    """Per row of the chunk, the example that first broke it."""
    found: dict[int, Tensor] = {}
    for record in records:
        if record.meta.kind != "attack":
            continue
        for row in np.flatnonzero(broken(record.rows).to_numpy(dtype=bool)):
            if int(row) not in found:
                pixels = np.frombuffer(record.rows["adversarial"].iloc[row], dtype="<f4")
                found[int(row)] = torch.from_numpy(pixels.copy()).reshape(x.shape[1:]).to(x)
    return found
