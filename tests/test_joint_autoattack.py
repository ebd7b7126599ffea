"""AutoAttack on carried states: the reference's verdicts at a fraction of its evaluations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attacked import BALL, Centered, attacked, contested
from robustdeq.attacks import _screen
from robustdeq.attacks._ascent import Lanes, LogitLoss, ascend
from robustdeq.attacks._screen import Screen, looked_at_once, unreliable
from robustdeq.attacks.autoattack import AutoAttack
from torch import Tensor, nn

import robustdeq
from robustdeq.datasets import load_slice
from robustdeq.equilibrium import (
    Anderson,
    Dynamics,
    EquilibriumClassifier,
    FixedPoint,
    Lockstep,
    metered,
)
from robustdeq.errors import UsageError
from robustdeq.evaluation import estimate
from robustdeq.randomness import SampleRandom
from robustdeq.suite import AttackEntry, adjusted, attacks_of, find_suite
from robustdeq.tables import tabulate, to_markdown
from robustdeq.targets import Target
from robustdeq.threats import Threat

JOINT = AutoAttack(engine="joint")


def digits(n: int) -> tuple[Tensor, Tensor]:
    part = load_slice("digits", "test", n)
    return torch.from_numpy(part.images).float() / 255, torch.from_numpy(part.labels)


@pytest.mark.parametrize(("text", "n"), [("Linf:3/16", 6), ("L2:0.5", 4)])
def test_the_verdict_is_the_reference_s(text: str, n: int) -> None:
    model, threat = robustdeq.load_model("Madry2018Towards_deq"), Threat.parse(text)
    x, y = digits(n)
    robust, cost = [], []
    for attack in (JOINT, AutoAttack()):
        with metered() as meter:
            found = attacked(attack, Target(model, 10), x, y, threat)
        with torch.no_grad():
            robust.append((model(found).argmax(1) == y) & (model(x).argmax(1) == y))
        cost.append(meter.forward + meter.backward)
    assert torch.equal(*robust)
    assert 0 < int(robust[0].sum()) < n
    assert cost[1] > 3 * cost[0]


BORDERLINE = [9, 32, 79, 99, 101, 165, 171, 194, 231, 278]
"""Of the first 300 images those that stand at Linf:0.184 and fall at Linf:0.191."""


def test_verdicts_at_the_boundary_are_the_reference_s() -> None:
    model, threat = robustdeq.load_model("Madry2018Towards_deq"), Threat.parse("Linf:3/16")
    x, y = (part[BORDERLINE] for part in digits(300))
    joint, reference = (
        model(attacked(attack, Target(model, 10), x, y, threat)).argmax(1) == y
        for attack in (JOINT, AutoAttack())
    )
    assert torch.equal(joint, reference)
    assert 0 < int(joint.sum()) < len(BORDERLINE)


def test_every_component_finds_and_signs() -> None:
    model = Centered()
    x, y = contested(model, 24)
    screen = Screen(Target(model, 4), Dynamics(model), x, y, BALL, 0, rerun=0.2, queries=200)
    out = screen.run()
    assert {"apgd-ce"} <= set(out.made_by) <= {"apgd-ce", "apgd-t", "fab-t", "square", ""}
    assert not any(BALL.violations(x, out.x))


def test_the_second_run_replays_the_starts_of_the_goals_that_it_keeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Centered(classes=8)
    x, y = contested(model, 24)
    runs: list[tuple[bool, Lanes]] = []

    def noted(objective: Any, rule: Any, steps: int, lanes: Lanes, ledger: Any) -> None:
        runs.append((isinstance(objective, LogitLoss), lanes))
        ascend(objective, rule, steps, lanes, ledger)

    monkeypatch.setattr(_screen, "ascend", noted)
    screen = Screen(Target(model, 8), Dynamics(model), x, y, BALL, 0, rerun=0.9, queries=99)
    screen.run()
    first: dict[tuple[int, int], Tensor] = {}
    second: dict[tuple[int, int], Tensor] = {}
    for again, lanes in runs:
        rows = zip(lanes.samples.tolist(), lanes.goals.tolist(), lanes.start, strict=True)
        for sample, goal, start in rows:
            (second if again else first).setdefault((sample, goal), start)
    targeted = {key: start for key, start in second.items() if key[1] >= 0}
    samples = {sample for sample, _ in targeted}
    assert samples
    for sample in samples:
        goals = [goal for own, goal in targeted if own == sample]
        led = screen.rivals.lead[sample].clone()
        led[int(y[sample])] = -torch.inf
        assert set(goals) == set(led.topk(3).indices.tolist())
    assert all(torch.equal(start, first[key]) for key, start in second.items())


def test_looks_take_fewer_rows_where_each_brings_much_of_its_own() -> None:
    small, large = Centered(), robustdeq.load_model("Madry2018Towards_deq", dataset="mnist")
    x, image = torch.rand(2, 1, 3, 3), torch.rand(2, 1, 28, 28)
    assert looked_at_once(Target(small, 4), Dynamics(small), x) == 256
    rows = looked_at_once(Target(large, 10), Dynamics(large), image)
    assert 32 <= rows < 128
    assert looked_at_once(Target(large, 10, batch_size=7), Dynamics(large), image) == 7


def test_rows_of_one_look_change_no_candidate() -> None:
    model = Centered()
    x, y = contested(model, 24)
    some, all_ = (
        Screen(
            Target(model, 4, batch_size=n), Dynamics(model), x, y, BALL, 0, rerun=0.2, queries=99
        )
        for n in (5, None)
    )
    torch.testing.assert_close(some.run().x, all_.run().x, rtol=0, atol=1e-6)


def test_the_estimate_counts_the_reference_where_it_takes_the_engine_s_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(estimate, "_timed", lambda subject, x: (1.0, 3.0))
    chosen = replace(find_suite("digits"), attacks=())
    seconds: dict[tuple[str, str], float] = {}
    for engine in ("joint", "reference"):
        some = adjusted(chosen, 4, None, "Madry.*(deq|feedforward)", autoattack=engine)
        rows = estimate.estimate_suite(some, "cpu")
        seconds |= {(engine, row.id.rpartition("_")[2]): row.seconds for row in rows}
    assert seconds["joint", "feedforward"] == seconds["reference", "feedforward"] > 0
    assert seconds["joint", "deq"] < 0.5 * seconds["reference", "deq"]


def test_more_updates_cost_more_and_end_at_the_same_verdict() -> None:
    model = Centered()
    x, y = contested(model, 24)
    robust, cost = [], []
    for updates in (1, 3):
        with metered() as meter:
            found = attacked(
                AutoAttack(engine="joint", updates=updates), Target(model, 4), x, y, BALL
            )
        with torch.no_grad():
            robust.append(model(found).argmax(1) == y)
        cost.append(meter.backward)
    assert torch.equal(*robust)
    assert 1.5 * cost[0] < cost[1]


class TwoBasins(EquilibriumClassifier):
    """z = tanh(4 z + u): two states answer to a small u, and 0 leads to the one of u's sign.

    A state that is carried stays in its basin while u changes its sign; the cold one does not.
    """

    def __init__(self) -> None:
        super().__init__(FixedPoint(tolerance=1e-6, max_steps=200))
        self.gain = nn.Parameter(torch.tensor(4.0))

    def embed(self, x: Tensor) -> Tensor:
        return x.flatten(1).mean(1, keepdim=True) - 0.5

    def cell(self, z: Tensor, injection: Tensor, step: int) -> Tensor:
        return torch.tanh(self.gain * z + injection)

    def readout(self, z: Tensor) -> Tensor:
        return torch.cat([z, -z], 1)


def test_a_model_with_two_basins_is_judged_cold() -> None:
    model, threat = TwoBasins(), Threat.parse("Linf:0.1")
    x = torch.linspace(0.35, 0.65, 24).view(-1, 1, 1, 1).expand(-1, 1, 3, 3).contiguous()
    y = model(x).argmax(1).detach()
    target = Target(model, 2)
    # The carried state follows its basin, wherever the input goes.
    lockstep = Lockstep(Dynamics(model))
    settled = lockstep.settled(x)
    assert torch.equal(lockstep.glance(1 - x, settled, 50).logits.argmax(1), y)
    assert torch.equal(model(1 - x).argmax(1), 1 - y)
    # What it finds is real all the same, and no more than is there.
    found = Screen(target, Dynamics(model), x, y, threat, 0, rerun=0.0, queries=300).run().x
    assert not any(threat.violations(x, found))
    fooled = model(found).argmax(1) != y
    reachable = (x.flatten(1).mean(1) - 0.5).abs() < 0.1
    assert not bool((fooled & ~reachable).any())


class Expanding(TwoBasins):
    """A deployed solver with mixing finds a fixed point that plain steps run away from."""

    def __init__(self) -> None:
        super().__init__()
        self.solver = Anderson(tolerance=1e-5, max_steps=60)

    def cell(self, z: Tensor, injection: Tensor, step: int) -> Tensor:
        return -1.6 * z + injection + 0.1 * torch.tanh(self.gain * z)


def test_a_model_whose_plain_steps_do_not_settle_falls_back_and_says_so() -> None:
    model = Expanding()
    x, y = contested_by(model)
    assert "still moves" in unreliable(Lockstep(Dynamics(model)), x, y)
    entry = AttackEntry(attack="autoattack", parameters={"engine": "joint"})
    reference = AttackEntry(attack="autoattack")
    joint, plain = (
        robustdeq.evaluate(model, x, y, threat="Linf:0.06", attacks=[e]) for e in (entry, reference)
    )
    assert joint.autoattack_engine == plain.autoattack_engine == "reference"
    assert joint.autoattack_acc == plain.autoattack_acc
    assert any("joint engine left out" in flag for flag in joint.flags)
    assert torch.equal(joint.adversarials, plain.adversarials)


def test_without_a_fallback_a_model_is_left_alone_and_has_no_figure_of_it() -> None:
    model = Expanding()
    x, y = contested_by(model)
    entry = AttackEntry(attack="autoattack", parameters={"engine": "joint", "fallback": False})
    verdict = robustdeq.evaluate(model, x, y, threat="Linf:0.02", attacks=[entry])
    assert verdict.autoattack_acc is None
    assert any("joint engine left out" in flag for flag in verdict.flags)
    explicit = nn.Sequential(nn.Flatten(), nn.Linear(25, 2))
    assert not AutoAttack(engine="joint", fallback=False).fits(Target(explicit, 2))


def test_the_adaptive_battery_screens_with_other_random_numbers() -> None:
    entries = [
        e.parameters for e in attacks_of(adjusted(find_suite("digits"), None, "adaptive"))
        if e.attack == "autoattack" and e.parameters["engine"] == "joint"
    ]  # fmt: skip
    assert [(p["fallback"], p["draw"]) for p in entries] == [(False, 100)]
    model, threat = Centered(), BALL
    x, y = contested(model, 12)
    one, other, again = (
        AutoAttack(engine="joint", draw=draw).run(
            Target(model, 4), x, y, threat, SampleRandom(0, "t", range(12))
        ).x
        for draw in (0, 1, 0)
    )  # fmt: skip
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def contested_by(model: nn.Module) -> tuple[Tensor, Tensor]:
    x = torch.linspace(0.47, 0.53, 2).view(-1, 1, 1, 1).expand(-1, 1, 5, 5).contiguous()
    return x, model(x).argmax(1).detach()


def test_a_model_that_does_not_iterate_gets_the_reference() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    x, y = digits(4)
    out = JOINT.run(Target(model, 10), x, y, BALL, SampleRandom(0, "t", range(4)))
    assert out.notes == (
        "joint engine left out, the reference ran: it is not the fixed point of one cell",
    )


def test_a_row_says_which_engine_ran() -> None:
    model = robustdeq.load_model("Madry2018Towards_deq")
    x, y = digits(4)
    entry = AttackEntry(attack="autoattack", parameters={"engine": "joint"})
    verdict = robustdeq.evaluate(model, x, y, threat="Linf:0.3", attacks=[entry])
    assert verdict.autoattack_engine == "joint"
    assert verdict.autoattack_acc == verdict.robust_acc
    assert "(joint)" in to_markdown(tabulate([verdict]), "t", ())


def test_a_suite_and_the_command_line_choose_the_engine() -> None:
    suite = find_suite("digits")
    for chosen, engine in (
        (suite, "reference"),
        (adjusted(suite, None, "adaptive", autoattack="joint"), "joint"),
    ):
        engines = {
            e.parameters["engine"] for e in attacks_of(chosen)
            if e.attack == "autoattack" and e.parameters["version"] == "standard"
        }  # fmt: skip
        assert engines == {engine}
    with pytest.raises(UsageError, match="--autoattack is 'fast'; give one of reference, joint"):
        adjusted(suite, None, None, autoattack="fast")


@pytest.mark.parametrize(
    "wrong",
    [
        {"engine": "joint", "version": "rand"},
        *[{"rerun": share, "engine": "joint"} for share in (1.5, -0.1)],
        {"updates": 0, "engine": "joint"},
        {"rerun": 0.2},
        {"fallback": False},
        {"updates": 2},
    ],
)
def test_parameters_that_do_not_fit_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))}="):
        AutoAttack(**wrong)
