"""FAB on carried states, and its projections, against the reference library's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from robustdeq.attacks._carried_fab import ITERATIONS, CarriedFAB
from robustdeq.attacks._hyperplane import onto
from robustdeq.attacks._ledger import Ledger
from robustdeq.attacks._losses import margin
from robustdeq.attacks._reference import reference_class
from test_carried_square import Resting
from torch import Tensor

from robustdeq.equilibrium import Dynamics, Glance, JointState, Lockstep
from robustdeq.targets import Target
from robustdeq.threats import Norm, Threat


@pytest.mark.parametrize("norm", list(Norm))
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), pixels=st.integers(1, 40), reach=st.floats(0.0, 2.0))
def test_the_move_is_the_shortest(norm: Norm, seed: int, pixels: int, reach: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(6, pixels, generator=generator).double()
    normal = torch.randn(6, pixels, generator=generator).double()
    normal[:, : pixels // 3] = 0.0
    z = torch.rand(6, pixels, generator=generator).double()
    offset = (normal * (x + reach * (z - x))).sum(1)
    move = onto(x, normal, offset, norm)
    there = x + move
    assert float(there.amin()) >= -1e-12
    assert float(there.amax()) <= 1 + 1e-12
    name = "projection_linf" if norm is Norm.LINF else "projection_l2"
    expected = reference_class("fab_projections", name)(x, normal, offset)
    length = (lambda d: d.abs().amax(1)) if norm is Norm.LINF else (lambda d: d.norm(dim=1))
    missed, known = (((x + d) * normal).sum(1) - offset for d in (move, expected))
    # As near to the hyperplane as the reference comes, by no longer a way.
    torch.testing.assert_close(missed.abs(), known.abs(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(length(move), length(expected), rtol=1e-5, atol=1e-6)


def test_no_gradient_is_no_move() -> None:
    x = torch.rand(3, 5)
    for offset in (torch.zeros(3), torch.ones(3)):
        for norm in Norm:
            assert not bool(onto(x, torch.zeros(3, 5), offset, norm).any())


class _Watched(Lockstep):
    """Remembers where it was asked for a label."""

    def glance(self, x: Tensor, state: JointState, updates: int = 1) -> Glance:
        seen.append(x.clone())
        return super().glance(x, state, updates)


seen: list[Tensor] = []


@pytest.mark.parametrize("text", ["Linf:0.001", "L2:0.01"])
def test_the_iterates_are_the_reference_s(text: str) -> None:
    model, threat = Resting(), Threat.parse(text)
    x = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1).detach()
    far = margin(model(x), y) < -1.0
    x, y = x[far], y[far]
    assert len(x) > 8
    ledger = Ledger(Target(model, 4), x, y)
    goals = ledger.likeliest(1)[:, 0]
    seen.clear()
    lockstep = _Watched(Dynamics(model))
    samples = torch.arange(len(x))
    CarriedFAB(lockstep, lockstep.settled(x), ledger, samples, goals, x, threat).run()
    asked: list[Tensor] = []
    kind: Any = reference_class("fab_pt", "FABAttack_PT")

    class Reference(kind):  # type: ignore[misc]
        def _get_predicted_label(self, images: Tensor) -> Tensor:
            asked.append(images.clone())
            return super()._get_predicted_label(images)  # type: ignore[no-any-return]

    attack = Reference(
        model, norm=str(threat.norm), n_iter=ITERATIONS, eps=threat.eps, device=x.device
    )
    attack.target_class = 2
    attack.attack_single_run(x, y, is_targeted=True)
    assert len(seen) == ITERATIONS == len(asked) - 1
    for ours, theirs in zip(seen, asked[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    assert not torch.equal(seen[0], seen[-1])


def test_fooled_samples_leave_and_what_was_found_is_in_the_ball() -> None:
    model, threat = Resting(), Threat.parse("Linf:0.05")
    x = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1).detach()
    ledger = Ledger(Target(model, 4), x, y)
    goals = ledger.likeliest(1)[:, 0]
    lockstep = Lockstep(Dynamics(model))
    fab = CarriedFAB(lockstep, lockstep.settled(x), ledger, torch.arange(20), goals, x, threat)
    fab.run()
    assert int(ledger.settled.sum()) > 0
    assert not bool(ledger.settled[fab.samples].any())
    assert not any(threat.violations(x, ledger.x))
