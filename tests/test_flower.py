from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from test_federated import DiesAt, distance, finished, recipe, task

from robustdeq.errors import CaseError, UsageError
from robustdeq.training.federated import flower
from robustdeq.training.federated.client import sent
from robustdeq.training.federated.server import FederatedAveraging

HAS_FLOWER = all(importlib.util.find_spec(name) is not None for name in ("flwr", "ray"))
needs_flower = [
    pytest.mark.federated,
    pytest.mark.skipif(not HAS_FLOWER, reason="needs the extra [federated]: flwr and ray"),
    # Ray's and Flower's own; ours are errors in the other tests.
    pytest.mark.filterwarnings("ignore"),
]


def marked(test: Any) -> Any:
    for mark in needs_flower:
        test = mark(test)
    return test


@marked
def test_the_simulation_agrees_with_the_reference() -> None:
    settings: dict[str, Any] = {"rounds": 3, "weighting": "residual", "partition": "dirichlet"}
    reference = FederatedAveraging(task(recipe(**settings)))
    simulated = recipe(**settings, engine="flower").trainer(
        task(recipe(**settings, engine="flower"))
    )
    assert isinstance(simulated, flower.FlowerAveraging)
    path = os.environ.get("PYTHONPATH")
    rows = finished(reference)
    row = simulated.advance()
    assert simulated.step == simulated.steps == 3
    assert distance(sent(reference.model), sent(simulated.model)) <= 1e-6
    assert row["bytes"] == rows[-1]["bytes"]
    assert row["loss"] == pytest.approx(rows[-1]["loss"], rel=1e-5)
    assert os.environ.get("PYTHONPATH") == path


@marked
def test_a_client_that_dies_does_not_end_the_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left out of one round's mean, also where the training goes on from a checkpoint."""
    monkeypatch.setattr(flower, "SECONDS", 0.0)  # a simulation for each round
    dies = DiesAt(1, rounds=range(1, 2))
    reference = FederatedAveraging(task(recipe(rounds=2)), dies)
    first = flower.FlowerAveraging(task(recipe(rounds=2)), dies)
    first.advance()
    assert first.step == 1
    second = flower.FlowerAveraging(task(recipe(rounds=2)), dies)
    second.restore(first.state())
    row = second.advance()
    expected = finished(reference)[-1]
    assert row["failed_clients"] == expected["failed_clients"] == 1
    assert row["bytes"] == expected["bytes"]
    assert distance(sent(reference.model), sent(second.model)) <= 1e-6


@marked
def test_if_all_clients_die_the_first_cause_is_told() -> None:
    simulated = flower.FlowerAveraging(task(recipe()), DiesAt(*range(4)))
    with pytest.raises(CaseError, match=r"all 4 clients failed in round 1 .*battery empty"):
        simulated.advance()


@pytest.mark.skipif(HAS_FLOWER, reason="Flower is installed")
def test_without_flower_the_remedy_is_told() -> None:
    with pytest.raises(UsageError, match=r'pip install "robustdeq\[federated\]"'):
        recipe(engine="flower").trainer(task(recipe(engine="flower")))


def test_threads_of_this_process_are_as_the_workers() -> None:
    """Ray gives a worker one thread; sums of floats then agree to the last bit."""
    assert torch.get_num_threads() == 1
