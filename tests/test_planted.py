"""An evaluation that knows nothing of a defect comes as low as an attack that does, and flags it.

The oracles in turn are held against a closed form and against plain attacks on the honest base.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planted import BASE, DEFECTS, SAMPLES, THREAT, Defect, images
from planted_models import Planted
from planted_oracle import Effort, robust_under
from toys import Linear

import robustdeq
from robustdeq.suite import AttackEntry, battery
from robustdeq.threats import Threat
from robustdeq.verdict import Verdict

SLACK = 0.02 + 1e-9
"""Of robust accuracy, on 200 images: four of them (and what floats add)."""
CHANCE = 0.02
"""More where answers are random: oracle and judge decide by 32 draws each, and of a sample that is
wrong in about half of them they say this or that. Seeds 0 to 3 of the verdict are 0.05 apart."""
QUICK = {("apgd", "deterministic"), ("search", "randomized")}
FIRST = (QUICK, {*QUICK, ("search", "deterministic")})
"""Parts of the battery, by attack and track, that are tried alone before the rest: what falls to a
part of the battery falls to all of it."""
COSTLY = ("autoattack", "distill")
"""Those that are left out where the others are enough."""
HARMLESS = ("left_out",)
"""Flags that say nothing against a model."""
SEEDS = ("", "_seed1", "_seed2")
HONEST = (
    "Madry2018Towards_deq",
    "Madry2018Towards_wide_resnet",
    "Chu2023Learning_module_pgd_at",
    "Chu2023Learning_neither_pgd_at",
    "Yang2023Improving_plain_pgd_at",
    "Yang2023Improving_random_states_pgd_at",
    "Gurumurthy2021Joint_joint12",
    "Gurumurthy2021Joint_joint42",
    "Gurumurthy2021Joint_pgd2",
    "Song2023Revisiting_dense",
    "Song2023Revisiting_distinct0.5",
    "Gkillas2023Deep_samples_iid_pgd_at",
)
"""Families of shipped rows, three training seeds each."""

by_name = pytest.mark.parametrize("defect", DEFECTS, ids=[d.name for d in DEFECTS])


def named(flags: tuple[str, ...]) -> set[str]:
    """The names of flags, without their figures."""
    return {flag.partition("=")[0].partition(":")[0] for flag in flags}


def verdict_of(defect: Defect, n: int, **settings: Any) -> Verdict:
    """The verdict on the first images, all in one chunk."""
    x, y = images(n)
    verdict = robustdeq.evaluate(defect.model(), x, y, threat=THREAT, chunk=n, **settings)
    assert verdict.robust_acc is not None, verdict.note
    return verdict


@by_name
def test_planted_defect_is_flagged_and_broken(defect: Defect) -> None:
    entries = battery("adaptive")
    parts = [[e for e in entries if (e.attack, e.track) in some] for some in FIRST]
    parts.append([e for e in entries if e.attack not in COSTLY])
    bound = defect.oracle(*images()) + SLACK + CHANCE * (defect.tracks == ("randomized",))
    verdict = verdict_of(defect, SAMPLES, attacks=parts[0])
    assert named(verdict.flags) & set(defect.flags), verdict.flags
    assert verdict.track in defect.tracks
    for part in parts[1:]:
        if verdict.robust_acc <= bound:
            break
        verdict = verdict_of(defect, SAMPLES, attacks=part)
    assert verdict.robust_acc <= bound


@by_name
def test_planted_models_predict_as_their_base_does(defect: Defect) -> None:
    x, _ = images()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        agreement = defect.model()(x).argmax(1) == robustdeq.load_model(BASE)(x).argmax(1)
    assert float(agreement.float().mean()) > 0.94


@pytest.mark.parametrize("name", ["EmptyBackward", "RoundedLogits", "FlippingHook"])
def test_planted_defect_deceives_autoattack_alone(name: str) -> None:
    defect = next(d for d in DEFECTS if d.name == name)
    assert defect.hidden
    verdict = verdict_of(defect, 40, battery="standard")
    assert verdict.robust_acc > defect.oracle(*images(40)) + SLACK


def test_planted_oracle_is_as_strong_on_the_base_as_attacks_on_honest_models() -> None:
    x, y = images()
    base = robustdeq.load_model(BASE)
    pgd = AttackEntry(attack="pgd", parameters={"steps": 50, "loss": "margin", "restarts": 3})
    verdict = robustdeq.evaluate(base, x, y, threat=THREAT, attacks=[pgd], chunk=SAMPLES)
    model = Planted(base)
    found = float(robust_under(model, (model,), x, y, THREAT, Effort()).float().mean())
    assert verdict.robust_acc is not None
    assert 0.2 < found <= verdict.robust_acc < 0.25


def test_planted_oracle_is_exact_on_a_linear_model(linear: Linear) -> None:
    x = 0.3 + 0.4 * torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    y = linear(x).argmax(1).detach()
    threat = Threat.parse("Linf:0.01")
    logits, w = linear(x).detach(), linear.weight.detach()
    slack = logits.gather(1, y[:, None]) - logits
    slack = slack - threat.eps * (w[y][:, None] - w[None]).abs().sum(2)
    slack[torch.arange(len(y)), y] = torch.inf
    found = robust_under(linear, (linear,), x, y, threat, Effort(targets=3))
    assert torch.equal(found, slack.amin(1) > 0)
    assert 0 < int(found.sum()) < len(y)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", HONEST)
def test_planted_controls_raise_no_flag(family: str, seed: str) -> None:
    x, y = images(100)
    model = robustdeq.load_model(family + seed)
    verdict = robustdeq.evaluate(model, x, y, threat="Linf:3/16", attacks=["pgd"])
    assert named(verdict.flags) <= set(HARMLESS)
