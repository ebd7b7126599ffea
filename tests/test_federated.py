from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from robustdeq.datasets import DataSpec, Slice, load_slice
from robustdeq.errors import CaseError, UsageError
from robustdeq.randomness import derived_seed
from robustdeq.registry import load, parameters_of
from robustdeq.targets import Target
from robustdeq.threats import Threat
from robustdeq.training.checkpoint import Checkpoint
from robustdeq.training.federated.client import Report, State, Update, Work, run_client, sent
from robustdeq.training.federated.fusion import DELTA, client_weight, fused
from robustdeq.training.federated.partition import Partition, dealt
from robustdeq.training.federated.recipe import Federated
from robustdeq.training.federated.server import FederatedAveraging, exchanged
from robustdeq.training.loop import train
from robustdeq.training.task import Task, constrain, training_view

CPU = torch.device("cpu")
THREAT = Threat.parse("Linf:0.05")
REPORT = Report(0, 10, 8, 1.0, 0.09, 1.0, 1.0)


def recipe(**changes: Any) -> Federated:
    local = {"steps": 2} | changes.pop("local", {})
    settings: dict[str, Any] = {"rounds": 4, "local_epochs": 1, "clients": 4, "parameters": local}
    return Federated(**settings | changes)


def task(chosen: Federated, images: int = 128, defense: str = "deq", **parameters: Any) -> Task:
    data = load_slice("digits", "train").take(slice(images))
    torch.manual_seed(0)
    model = load("defense", defense, {"width": 16, "inner": 16, **parameters}).build(data.spec, CPU)
    return Task(model, chosen, data, THREAT, 0, CPU)


def finished(server: FederatedAveraging) -> list[dict[str, Tensor | float]]:
    return [server.advance() for _ in range(server.steps - server.step)]


def distance(a: State, b: State) -> float:
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


class DiesAt:
    """A client's part that raises for some clients, from a round on."""

    def __init__(self, *clients: int, rounds: range = range(1000)) -> None:
        self.clients, self.rounds = clients, rounds

    def __call__(self, task: Task, work: Work, state: State) -> Update:
        if work.client in self.clients and work.round in self.rounds:
            raise RuntimeError("battery empty")
        return run_client(task, work, state)


# The partition.


@given(
    labels=st.lists(st.integers(0, 9), min_size=1, max_size=300),
    clients=st.integers(1, 20),
    partition=st.sampled_from(["iid", "dirichlet"]),
    concentration=st.floats(1e-3, 100.0),
    seed=st.integers(0, 100),
)
def test_every_image_is_dealt_to_one_client_and_none_has_none(
    labels: list[int], clients: int, partition: Partition, concentration: float, seed: int
) -> None:
    held = np.array(labels, dtype=np.int64)
    if len(held) < clients:
        with pytest.raises(UsageError, match="at most that many"):
            dealt(held, clients, partition, concentration, seed)
        return
    parts = dealt(held, clients, partition, concentration, seed)
    assert len(parts) == clients
    assert min(len(part) for part in parts) >= 1
    assert sorted(np.concatenate(parts)) == list(range(len(held)))
    again = dealt(held, clients, partition, concentration, seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    if partition == "iid":
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_small_concentration_is_skewed() -> None:
    labels = load_slice("digits", "train").labels

    def top_share(partition: Partition, concentration: float) -> float:
        parts = dealt(labels, 8, partition, concentration, 0)
        return float(np.mean([np.bincount(labels[p]).max() / len(p) for p in parts]))

    assert top_share("dirichlet", 0.1) > 0.4
    assert top_share("dirichlet", 1e4) < 0.2
    assert top_share("iid", 0.1) < 0.2
    assert not np.array_equal(dealt(labels, 8, "iid", 1, 0)[0], dealt(labels, 8, "iid", 1, 1)[0])


# The mean.


def test_the_four_weights() -> None:
    assert client_weight("samples", REPORT, 8.0) == 10
    assert client_weight("steps", REPORT, 8.0) == 80
    assert client_weight("residual", REPORT, 8.0) == pytest.approx(10 / (0.09 + DELTA))
    reports = [REPORT._replace(samples=n, steps=k) for n, k in ((10, 4), (20, 8), (5, 16))]
    weights = np.array([client_weight("softmax", r, 8.0) for r in reports])
    softmax = np.exp([0.5, 1.0, 2.0]) / np.exp([0.5, 1.0, 2.0]).sum()
    expected = np.array([10, 20, 5]) * softmax
    assert weights / weights.sum() == pytest.approx(expected / expected.sum())


def test_the_mean_is_the_one_by_hand_and_its_divisor_the_true_sum() -> None:
    states = [
        {"w": torch.tensor([1.0, 2.0]), "count": torch.tensor(3)},
        {"w": torch.tensor([5.0, -2.0]), "count": torch.tensor(4)},
    ]
    mean = fused(states, [3.0, 1.0])
    assert mean["w"].tolist() == [(3 * 1 + 5) / 4, (3 * 2 - 2) / 4]
    assert mean["w"].dtype == torch.float32
    assert mean["count"].item() == 3
    same = fused([states[0]] * 3, [0.1, 0.2, 0.4])
    assert torch.equal(same["w"], states[0]["w"])
    with pytest.raises(CaseError, match="sum to 0"):
        fused(states, [0.0, 0.0])


# Clients.


@pytest.mark.parametrize("gradient", ["honest", "phantom(2,1)"])
def test_one_client_is_local_training(gradient: str) -> None:
    chosen = recipe(
        rounds=3, local_epochs=2, clients=1, client_steps=(5,), local={"gradient": gradient}
    )
    server = FederatedAveraging(task(chosen, images=80))
    finished(server)
    alone = task(chosen, images=80)
    by_hand(alone, chosen)
    assert distance(sent(server.model), sent(alone.model)) < 1e-6


def by_hand(alone: Task, chosen: Federated) -> None:
    """The same training without clients or server, on the whole split."""
    model, data = alone.model, alone.data
    x, y = torch.from_numpy(data.images).float() / 255, torch.from_numpy(data.labels)
    local = load("recipe", "pgd_at", chosen.parameters)
    steps = "unrolled(5)" if chosen.gradient == "honest" else chosen.gradient
    through = load("recipe", "pgd_at", {**chosen.parameters, "gradient": steps})
    for number in range(3):
        directions(model)
        rate = local.learning_rate * (1 + math.cos(math.pi * number / 3)) / 2
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=local.weight_decay)
        noise = torch.Generator().manual_seed(derived_seed(0, "noise", number, 0))
        target = training_view(model, through, data.spec, 5)
        for k in range(2 * 3):
            shuffle = torch.Generator().manual_seed(derived_seed(0, "shuffle", number, 0, k // 3))
            rows = torch.tensor_split(torch.randperm(80, generator=shuffle), 3)[k % 3]
            progress = (number + k / 6) / 3
            loss = local.loss(target, x[rows], y[rows], THREAT, progress, noise)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            constrain(model)
        constrain(model, 200)


def directions(model: nn.Module) -> None:
    """Power iterations as a freshly built model has them: clients keep none between rounds."""
    fresh = task(recipe()).model
    for (_, mine), (_, new) in zip(model.named_buffers(), fresh.named_buffers(), strict=True):
        mine.copy_(new)


def test_a_clients_part_is_pure() -> None:
    server = FederatedAveraging(task(recipe()))
    work, state = server.plan()[1], sent(server.model)
    before = copy.deepcopy(state)
    first = run_client(server.fresh, work, state)
    torch.manual_seed(99)
    second = run_client(server.fresh, work, state)
    assert distance(first.state, second.state) == 0
    assert first.report == second.report
    assert distance(state, before) == distance(sent(server.fresh.model), before) == 0
    assert distance(first.state, before) > 0


@pytest.mark.parametrize("local", [{}, {"gradient": "phantom(2,1)"}])
def test_nfe_and_convergence_grow_with_k(local: dict[str, Any]) -> None:
    chosen = recipe(client_steps=(2, 4, 8, 16), rounds=1, local=local)
    row = finished(FederatedAveraging(task(chosen)))[0]
    forward = [float(row[f"nfe_forward_k{k}"]) for k in (2, 4, 8, 16)]
    # From the tolerance on, a solver takes no more steps.
    assert forward[0] < forward[1] < min(forward[2:])
    residuals = [float(row[f"residual_k{k}"]) for k in (2, 4, 8, 16)]
    assert residuals[0] > residuals[1] > max(residuals[2:])
    # Two steps of PGD and one of training, K each; the residual costs K more.
    expected = 4 * 2 if not local else 3 * (2 + 2) + 2
    assert forward[0] == expected
    assert row["nfe_backward_k2"] == 3 * 2


def test_models_that_do_not_iterate_can_be_trained_too() -> None:
    (row,) = finished(FederatedAveraging(task(recipe(rounds=1), defense="feedforward")))
    assert row["residual_k4"] == 0
    assert math.isfinite(float(row["loss"]))


# Rounds.


@pytest.mark.parametrize("weighting", ["samples", "steps", "softmax", "residual"])
def test_four_clients_give_the_weighted_mean_and_always_the_same(weighting: Any) -> None:
    chosen = recipe(rounds=2, weighting=weighting, partition="dirichlet", concentration=1.0)
    servers = [FederatedAveraging(task(chosen)) for _ in range(2)]
    server = servers[0]
    updates = [run_client(server.fresh, work, sent(server.model)) for work in server.plan()]
    weights = [client_weight(weighting, u.report, 8.0) for u in updates]
    model = copy.deepcopy(server.model)
    model.load_state_dict(fused([u.state for u in updates], weights))
    constrain(model, 200)
    server.advance()
    assert distance(sent(server.model), sent(model)) == 0
    for each in servers:
        finished(each)
    assert distance(sent(servers[0].model), sent(servers[1].model)) == 0


def test_constraints_hold_after_the_mean() -> None:
    def expands(task: Task, work: Work, state: State) -> Update:
        grown = {name: 3 * value for name, value in state.items()}
        return Update(grown, REPORT._replace(client=work.client))

    server = FederatedAveraging(task(recipe(rounds=1)), expands)
    finished(server)
    model: Any = server.model
    assert max(model.residual.norms()) <= 1 + 1e-4


def test_bytes_are_those_sent_down_and_up() -> None:
    server = FederatedAveraging(task(recipe(participation=0.5)))
    count = sum(p.numel() for p in server.model.parameters())
    assert exchanged(sent(server.model)) == count  # power iterations stay where they are
    rows = finished(server)
    assert [row["bytes_round"] for row in rows] == [2 * 2 * count * 4] * 4
    assert rows[-1]["bytes"] == 4 * 2 * 2 * count * 4


def test_participants_change_from_round_to_round_and_not_from_run_to_run() -> None:
    def drawn() -> list[list[int]]:
        server = FederatedAveraging(task(recipe(rounds=8, clients=8, participation=0.5)))
        rounds = []
        for server.step in range(8):
            rounds.append([work.client for work in server.plan()])
        return rounds

    rounds = drawn()
    assert rounds == drawn()
    assert all(len(set(clients)) == 4 for clients in rounds)
    assert len({tuple(clients) for clients in rounds}) > 1


# Failures.


def test_a_client_that_dies_is_left_out_of_its_round_alone() -> None:
    chosen = recipe(rounds=3)
    server = FederatedAveraging(task(chosen), DiesAt(2, rounds=range(1, 2)))
    first = server.advance()
    alive = [w for w in server.plan() if w.client != 2]
    updates = [run_client(server.fresh, work, sent(server.model)) for work in alive]
    model = copy.deepcopy(server.model)
    model.load_state_dict(
        fused([u.state for u in updates], [float(u.report.samples) for u in updates])
    )
    constrain(model, 200)
    second = server.advance()
    assert distance(sent(server.model), sent(model)) == 0
    third = server.advance()
    assert [row["failed_clients"] for row in (first, second, third)] == [0, 1, 0]
    # It was sent the model, and sent none back.
    assert second["bytes_round"] == 7 / 8 * float(first["bytes_round"])


def test_a_client_that_diverges_is_left_out() -> None:
    class Diverges(DiesAt):
        def __call__(self, task: Task, work: Work, state: State) -> Update:
            if work.client in self.clients:
                state = {name: value * math.nan for name, value in state.items()}
            return run_client(task, work, state)

    server = FederatedAveraging(task(recipe(rounds=1)), Diverges(0))
    (row,) = finished(server)
    assert row["failed_clients"] == 1
    assert all(bool(torch.isfinite(v).all()) for v in server.model.state_dict().values())


def test_if_all_clients_die_the_first_cause_is_told() -> None:
    server = FederatedAveraging(task(recipe()), DiesAt(*range(4), rounds=range(1, 9)))
    server.advance()
    with pytest.raises(CaseError, match=r"all 4 clients .* round 2 of 4; .*battery empty"):
        server.advance()


# Through the loop that all trainings share.


class StopError(Exception):
    pass


def test_a_training_cut_short_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    chosen = recipe(rounds=5, participation=0.5)
    data = load_slice("digits", "train").take(slice(128))
    plugin = load("defense", "deq", {"width": 16, "inner": 16})

    def trained(**options: Any) -> Any:
        return train(plugin, chosen, data, THREAT, seed=0, device=CPU, **options)

    def stop(progress: Any) -> None:
        if progress.step == 3:
            raise StopError

    whole = trained()
    path = tmp_path / "w.checkpoint"
    checkpoint = Checkpoint(path, "mine")
    checkpoint.written = -math.inf  # due at once, and so after the first round
    with pytest.raises(StopError):
        trained(checkpoint=checkpoint, report=stop)
    held: Any = Checkpoint(path, "mine").read(CPU)
    assert held["trainer"]["step"] == 1
    resumed = trained(checkpoint=Checkpoint(path, "mine"))
    assert resumed.complete
    assert distance(sent(whole.model), sent(resumed.model)) == 0
    assert whole.log == resumed.log
    assert whole.log[-1]["bytes"] == 5 * 2 * 2 * 4 * exchanged(sent(whole.model))


def test_federated_training_learns_digits() -> None:
    data = load_slice("digits", "train").take(slice(512))
    plugin = load("defense", "deq", {"width": 32, "inner": 32, "gain": 0.8})
    local = {"steps": 1, "gradient": "phantom(2,1)"}
    chosen = recipe(rounds=10, client_steps=(2, 4, 8), local=local)
    trained = train(plugin, chosen, data, THREAT, seed=0, device=CPU)
    test = load_slice("digits", "test")
    assert clean_accuracy(trained.model, test) > 0.7
    classes = [name for name in trained.log[-1] if name.startswith("accuracy_class_")]
    assert len(classes) == 10


def clean_accuracy(model: nn.Module, data: Slice) -> float:
    x, y = torch.from_numpy(data.images).float() / 255, torch.from_numpy(data.labels)
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


# The plugins.


def test_the_recipe_says_all_of_its_local_recipe() -> None:
    chosen = recipe(base="trades", local={"beta": 3.0})
    local = parameters_of(chosen)["parameters"]
    assert local["beta"] == 3.0
    assert local == parameters_of(load("recipe", "trades", local))
    assert Federated(base="trades", parameters=local).parameters == local
    assert (chosen.batch_size, chosen.learning_rate) == (32, 0.016)
    assert Federated(parameters={"batch_size": 7}).batch_size == 7
    assert chosen.adversarial
    assert not Federated(base="clean").adversarial


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "'rounds'"),
        ({"clients": 0}, "'clients'"),
        ({"client_steps": ()}, "'client_steps'"),
        ({"client_steps": (4, 0)}, "'client_steps'"),
        ({"temperature": 1e-9}, "'temperature'"),
        ({"participation": 1.5}, "'participation'"),
        ({"base": "pgd_ta"}, "did you mean"),
        ({"parameters": {"step": 3}}, "did you mean 'steps'"),
    ],
)
def test_wrong_parameters_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Federated(**changes)


def test_one_weights_file_can_be_deployed_at_every_length() -> None:
    plugin = load("defense", "federated", {"width": 16, "inner": 16, "steps": 3})
    trained = plugin.trained_as()
    assert (trained.steps, trained.width) == (0, 16)
    spec = DataSpec("digits", 10, 1, 8, 8)
    short, whole = plugin.build(spec, CPU), trained.build(spec, CPU)
    short.load_state_dict(whole.state_dict())
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    output = Target(short, 10)(x)
    assert output.solves[0].steps.tolist() == [3] * 4
    z = torch.zeros(4, 16)
    for step in range(3):
        z = whole.cell(z, whole.embed(x), step)
    assert torch.allclose(output.logits, whole.readout(z), atol=1e-6)
    assert not torch.allclose(output.logits, whole(x), atol=1e-6)
    with pytest.raises(UsageError, match="0 or more"):
        load("defense", "federated", {"steps": -1})
