"""The second phase, in which rows face what the other rows found; and sanity curves."""

from __future__ import annotations

from pathlib import Path

import acme
import pandas as pd
import pytest
import torch
from toys import Linear

from robustdeq.evaluation.curves import curve_rows, unbounded
from robustdeq.evaluation.pools import RowPool
from robustdeq.evaluation.provenance import source_digest
from robustdeq.randomness import SampleRandom
from robustdeq.registry import load
from robustdeq.running.run import Options, Tick, run_suite
from robustdeq.suite import Curves, parse_suite
from robustdeq.targets import Target
from robustdeq.threats import Threat
from robustdeq.verdict import Verdict

TEXT = """
name = "phases"
threats = ["Linf:1/8"]
chunk = 40
[curves]
epsilons = [0.0, 1.0, 4.0]
steps = [1, 5]
[[datasets]]
name = "digits"
samples = 80
[[attacks]]
attack = "never"
[[attacks]]
attack = "pgd"
parameters = { steps = 10, loss = "margin", random_start = false }
[[attacks]]
attack = "borrow"
[[defenses]]
id = "Open"
defense = "acme"
[[defenses]]
id = "Shut"
defense = "acme"
parameters = { trick = "detach" }
"""


def go(out: Path) -> tuple[list[Verdict], list[Tick]]:
    ticks: list[Tick] = []
    verdicts = run_suite(parse_suite(TEXT, "phases", None), Options(out=out), ticks.append)
    return verdicts, ticks


def test_rows_face_what_other_rows_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acme.install(tmp_path, monkeypatch)
    verdicts, ticks = go(tmp_path / "out")
    opened, shut = verdicts
    assert opened.broken_by["pgd"] >= 3
    assert "pgd" not in shut.broken_by
    assert shut.broken_by["borrow"] == opened.broken_by["pgd"]
    assert shut.samples["robust"].tolist() == opened.samples["robust"].tolist()
    assert shut.track == "no_gradient"
    assert {t.verdict.id for t in ticks if t.verdict} == {"Open", "Shut"}
    assert ticks[-1].done == ticks[-1].total
    folder = tmp_path / "out" / "phases"
    curves = pd.read_csv(folder / "curves.csv")
    held = {p.name: p.stat().st_mtime_ns for p in (folder / "records").iterdir()}
    text = (folder / "table.csv").read_bytes()
    again, _ = go(tmp_path / "out")
    assert {p.name: p.stat().st_mtime_ns for p in (folder / "records").iterdir()} == held
    assert (folder / "table.csv").read_bytes() == text
    assert [v.broken_by for v in again] == [v.broken_by for v in verdicts]
    by = curves.set_index(["id", "curve", "at"])["accuracy"]
    assert by["Open", "epsilon", 0.0] == opened.clean_acc
    assert by["Open", "epsilon", 0.125] <= opened.clean_acc
    assert by["Open", "unbounded", 1.0] == 0.0
    assert by["Shut", "unbounded", 1.0] > 0.0  # its gradient is of no use, and the curve shows it
    assert (curves["n"] == 80).all()


def test_a_pool_depends_on_its_pixels_and_fits_its_samples() -> None:
    x = torch.rand(3, 1, 2, 2)
    pixels = {7: torch.full((4,), 0.5).numpy().tobytes()}
    pool = RowPool("a", pixels).pool(x, [5, 7, 9])
    assert pool.available.tolist() == [False, True, False]
    assert bool((pool.x[1] == 0.5).all())
    assert torch.equal(pool.x[0], x[0])
    other = RowPool("a", {7: torch.full((4,), 0.25).numpy().tobytes()})
    digests = {RowPool("a", pixels).content_digest, other.content_digest}
    assert len(digests | {RowPool("b", pixels).content_digest}) == 3


def test_curves_are_those_of_a_linear_model(linear: Linear) -> None:
    """Its margin at a radius has a closed form, and PGD reaches it."""
    x = 0.3 + 0.4 * torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    y = linear(x).argmax(1)
    threat = Threat.parse("Linf:0.02")
    rows = curve_rows(
        Curves(epsilons=(0.0, 1.0, 2.0), steps=(1, 20)), Target(linear, 4), x, y, threat,
        SampleRandom(0, "curves", range(30)), lambda images: linear(images).argmax(1) == y,
    )  # fmt: skip
    logits = linear(x).detach()
    gaps = logits.gather(1, y[:, None]) - logits
    norms = (linear.weight[y][:, None] - linear.weight).abs().sum(2).detach()
    for row in rows:
        radius = row["at"] if row["curve"] != "steps" else 0.02
        margins = (gaps - radius * norms).scatter(1, y[:, None], torch.inf).amin(1)
        if row["curve"] == "unbounded":
            assert row["correct"] == 0
        elif row["at"] != 1:  # one random step need not find the corner
            assert row["correct"] == int((margins > 0).sum())
    assert unbounded(Threat.parse("L2:0.5"), 64).eps == 8.0


def test_a_digest_follows_imports_beside_the_plugin() -> None:
    """Editing what a plugin imports makes its records stale; editing another plugin does not."""
    assert source_digest(load("defense", "neural_dynamics", {})) != source_digest(
        load("defense", "deq", {})
    )
    import inspect

    from robustdeq.evaluation.provenance import _imported_beside
    from robustdeq.registry import plugin_class

    def names(plugin: str) -> set[str]:
        file = Path(inspect.getfile(plugin_class("defense", plugin)))
        return {p.name for p in _imported_beside(file, set())}

    assert {"neural_dynamics.py", "deq.py", "_cells.py"} <= names("neural_dynamics")
    assert "lyadeq.py" not in names("neural_dynamics")
