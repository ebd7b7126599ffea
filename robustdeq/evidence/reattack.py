"""Attacks some samples afresh that a bundle claims to be robust.

`verify` can only confirm what was broken. Here a random choice of the survivors is attacked under
seeds of its own; each that falls shows that the row's robust accuracy is lower than claimed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from robustdeq.errors import UsageError, sentence
from robustdeq.evaluation.direct import AttackLike, evaluate
from robustdeq.evidence.bundle import Bundle, BundleRow, read_bundle
from robustdeq.evidence.confined import Limits, confined
from robustdeq.evidence.rescoring import Rebuilt, Setting, Trial, is_built_in, rebuild, trials
from robustdeq.evidence.verify import Finding, claims
from robustdeq.randomness import derived_seed
from robustdeq.verdict import Verdict

Places = dict[str, list[int]]


@dataclass(frozen=True, kw_only=True)
class Reattack:
    """What fresh attacks made of a bundle's survivors.

    Attributes:
        attacked: how many survivors of each row were attacked.
        fallen: those that fell, and to what: the row's robust accuracy is lower than claimed.
        failures: rows on which the attacks could not be run.
    """

    attacked: dict[str, int]
    fallen: tuple[Finding, ...]
    failures: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether all were attacked and none fell."""
        return not self.fallen and not self.failures


def reattack(
    path: Path,
    samples: int,
    seed: int = 0,
    *,
    battery: str = "standard",
    attacks: Sequence[AttackLike] | None = None,
    rows: str | None = None,
    setting: Setting | None = None,
    limits: Limits | None = None,
) -> Reattack:
    """Attack random survivors of a bundle with a battery, under new seeds.

    Args:
        path: the bundle's folder.
        samples: how many, over all rows together; all of them if there are fewer.
        seed: decides which samples, and the attacks' own seeds.
        battery: a named list of attacks.
        attacks: a list of attacks in place of the battery, as for `robustdeq.evaluate`.
        rows: a regular expression; only rows in whose title it is found.
        limits: as for `verify_bundle`; then `attacks` must be left out.

    Raises:
        UsageError: if the bundle cannot be read, no survivors are asked for, or the bundle would
            run code that is not built in.
    """
    if samples < 1:
        raise UsageError(f"{samples} survivors were asked for; ask for at least 1 (--reattack).")
    setting = setting or Setting()
    attack = partial(evaluate, battery=battery, attacks=attacks)
    bundle = read_bundle(path)
    by_title = {row.title: row for row in claims(bundle, rows, setting)}
    chosen = choose(list(by_title.values()), samples, seed)
    fallen: list[Finding] = []
    failures: list[Finding] = []
    for title, places in chosen.items():
        row = by_title[title]
        try:
            if limits is None or is_built_in(row, setting):
                outcome = _attacked(bundle, row, places, seed, attack, setting)
            else:
                told = {"title": title, "places": places, "seed": seed, "battery": battery}
                job = {"path": str(path.resolve()), "setting": setting, **told}
                outcome = confined("reattack", job, Outcome, limits)
        except (Exception, SystemExit) as cause:  # a bundle from anywhere, and perhaps a plugin
            why = f"cannot be attacked again: {sentence(cause)}"
            failures.append(Finding(title, None, why))
            continue
        fallen += outcome.fallen
        failures += outcome.failures
    attacked = {title: len(places) for title, places in chosen.items()}
    return Reattack(attacked=attacked, fallen=tuple(fallen), failures=tuple(failures))


def attack_row(
    path: Path, title: str, places: list[int], seed: int, battery: str, setting: Setting
) -> Outcome:
    """Attack some samples of one row of a bundle; for a process of its own."""
    bundle = read_bundle(path)
    attack = partial(evaluate, battery=battery)
    return _attacked(bundle, bundle.find(title), places, seed, attack, setting)


def choose(rows: list[BundleRow], samples: int, seed: int) -> Places:
    """Random survivors over all rows, by the rows' titles; equal seeds choose the same."""
    pool = [(row.title, place) for row in rows for place in np.flatnonzero(row.robust).tolist()]
    draws = np.random.default_rng(derived_seed("reattack", seed))
    picked = draws.choice(len(pool), size=min(samples, len(pool)), replace=False)
    chosen: Places = defaultdict(list)
    for title, place in (pool[k] for k in sorted(picked.tolist())):
        chosen[title].append(int(place))
    return dict(chosen)


@dataclass(frozen=True)
class Outcome:
    """The samples of one row that fell, and what could not be run."""

    fallen: tuple[Finding, ...]
    failures: tuple[Finding, ...]


def _attacked(
    bundle: Bundle,
    row: BundleRow,
    places: list[int],
    seed: int,
    attack: Callable[..., Verdict],
    setting: Setting,
) -> Outcome:
    rebuilt = rebuild(bundle, row, setting)
    verdict = attack(
        rebuilt.subject.model,
        rebuilt.clean(places),
        rebuilt.y[places],
        threat=rebuilt.threat,
        seed=derived_seed("reattack", seed, row.title) % 2**31,
        chunk=row.case["chunk"],
        batch_size=rebuilt.judge.target.batch_size,
    )
    fallen = _confirmed(rebuilt, places, verdict)
    gap = Finding(row.title, None, f"was not attacked in full: {verdict.note}")
    return Outcome(tuple(fallen), () if verdict.status == "ok" else (gap,))


def _confirmed(rebuilt: Rebuilt, places: list[int], verdict: Verdict) -> list[Finding]:
    """What the attacks broke, by the word of the row's own judge and its own draws."""
    row, right = rebuilt.row, rebuilt.correct(rebuilt.clean(places), places)
    inputs = verdict.adversarials.to(rebuilt.x)
    tried = trials(rebuilt, inputs, places, right)
    by = dict(zip(places, verdict.samples["broken_by"], strict=True))
    return [
        Finding(row.title, row.indices[trial.place], why)
        for trial, clean in zip(tried, right, strict=True)
        for why in [_why(by[trial.place], trial, clean)]
        if why
    ]


def _why(by: str | None, trial: Trial, right: bool) -> str:
    if not right:
        return "is misclassified without an attack"
    return "" if by is None or trial.why else f"fell to {by}"
