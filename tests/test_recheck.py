"""A suite under a second seed: what has changed, and whether it stays inside its interval."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from markdown_it import MarkdownIt
from reports import Row, made_run
from terminal import command

from robustdeq.errors import UsageError
from robustdeq.reporting.rechecked import Rechecked, recheck, shown, table, to_markdown
from robustdeq.reporting.run import RunReport, read_run
from robustdeq.running.recheck import under_seed
from robustdeq.statistics import paired, wilson
from robustdeq.suite import find_suite

SUITE = """
name = "twice"
threats = ["Linf:3/16"]
datasets = [{ name = "digits", samples = 6 }]
attacks = [{ attack = "pgd", parameters = { steps = 2 } }]
[[defenses]]
id = "Plain"
defense = "feedforward"
parameters = { width = 96, inner = 96 }
weights = "digits-feedforward-pgd_at.safetensors"
training = { recipe = "pgd_at", seed = 0, parameters = { epochs = 100, learning_rate = 0.004 } }
"""


def found(tmp_path: Path, first: list[Row], again: list[Row]) -> Rechecked:
    runs = made_run(tmp_path / "a", first), made_run(tmp_path / "b", again)
    other = runs[1]
    data = {**other.data, "seed": 7}
    return recheck(runs[0], RunReport(other.folder, data, other.evidences, other.verdicts))


def test_the_change_is_that_of_the_same_samples(tmp_path: Path) -> None:
    """Of 10 samples AutoAttack breaks 3, then 5; the union 5, then 7."""
    told = found(tmp_path, [Row("Ours")], [Row("Ours", broken=(5, 1, 1, 0))])
    (row,) = told.rows
    robust, auto = row.figures["robust accuracy"], row.figures["AutoAttack accuracy"]
    assert (robust.first, robust.second, robust.either) == (0.5, 0.3, 0.3)
    assert (auto.first, auto.second, auto.either) == (0.7, 0.5, 0.5)
    assert robust.interval == wilson(5, 10)
    a, b = [k >= 5 for k in range(10)], [k >= 7 for k in range(10)]
    assert robust.change == paired(b, a)._replace(only_a=2, only_b=0)
    assert robust.change.difference == pytest.approx(-0.2)
    assert robust.inside
    assert told.outside() == []
    assert told.summary() == "2 of 2 figures stay inside of their interval under seed 7"
    frame = table(told).set_index("figure")
    assert frame.loc["robust accuracy", ["fell", "rose", "n"]].tolist() == [2, 0, 10]
    assert frame.loc["robust accuracy", "inside"]


def test_what_either_seed_broke_is_broken(tmp_path: Path) -> None:
    """The second seed breaks one sample alone, and misses what the first broke."""
    other = Row("Ours", broken=(0, 0, 0, 0))
    runs = made_run(tmp_path / "a", [Row("Ours")]), made_run(tmp_path / "b", [other])
    told = recheck(*runs)
    robust = told.rows[0].figures["robust accuracy"]
    assert (robust.second, robust.either, robust.change.only_b) == (1.0, 0.5, 5)
    assert not robust.inside
    (words, _) = told.outside()
    assert words == (
        "Ours on digits under Linf:3/16: robust accuracy is 100.00 under seed 0, outside of 23.66 "
        "to 76.34, its interval under seed 0; quote 50.00, which neither seed broke."
    )


def test_rows_that_cannot_be_held_against_each_other_say_why(tmp_path: Path) -> None:
    first = [Row("Gone"), Row("Half"), Row("Random")]
    runs = (
        made_run(tmp_path / "a", first),
        made_run(tmp_path / "b", [Row("Half", attacked=2), Row("Random")]),
    )
    evidences = list(runs[1].evidences)
    case = {**evidences[1].case, "weights_sha256": "1" * 64}
    evidences[1] = replace(evidences[1], case=case)
    told = recheck(runs[0], replace(runs[1], evidences=tuple(evidences)))
    gone, half, built = told.rows
    assert gone.reason == "the second run lacks it"
    assert half.reason.startswith("second run: pgd[phantom(5,0.5)] is missing")
    assert built.reason == "its weights depend on the seed: these are two models"
    assert told.outside() == []
    assert "0 of 0 figures" in told.summary()
    assert table(told)["first"].isna().all()
    assert (shown(told)["First"] == "n/a").all()


def test_what_was_submitted_belongs_to_one_run_alone(tmp_path: Path) -> None:
    run = made_run(tmp_path, [Row("Ours")])
    *kept, square = [r for r in run.evidences[0].records if r.meta.kind == "attack"]
    clean = [r for r in run.evidences[0].records if r.meta.kind != "attack"]
    fallen = square.rows.assign(adversarial_correct=False)
    meta = replace(square.meta, label="submitted:Ada", stage={"attack": "submitted", "by": "Ada"})
    lowered = replace(
        run.evidences[0],
        records=(*clean, *kept, square, replace(square, meta=meta, rows=fallen)),
    )
    told = recheck(replace(run, evidences=(lowered,)), run)
    assert told.rows[0].figures["robust accuracy"].first == 0.5


def test_names_of_others_are_inert(tmp_path: Path) -> None:
    name = "<script>|x|\n# h [a](b) \\begin{x} " + "y" * 500
    text = to_markdown(found(tmp_path, [Row(name)], [Row(name)]))
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    assert "<script>" not in html
    assert "<a " not in html
    assert html.count("<h1>") == 1
    assert html.count("<tr>") == 3
    assert max(map(len, text.splitlines())) < 600


def test_the_command_runs_both_and_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "twice.toml").write_text(SUITE)
    run = tmp_path / "out" / "twice"
    given = ["run", tmp_path / "twice.toml", "--out", tmp_path / "out", "--recheck"]
    code, printed, err = command([*given, "0"], monkeypatch, capsys)
    assert (code, printed) == (2, "")
    assert "the seed of suite twice; give another" in err
    assert not run.exists()
    code, printed, _ = command([*given, "7"], monkeypatch, capsys)
    frame = pd.read_csv(run / "recheck.csv")
    assert code == int(not frame["inside"].all())
    assert frame["figure"].tolist() == ["robust accuracy"]
    assert "wrote" in printed
    assert "recheck.md" in (run / "SHA256SUMS").read_text()
    tables = [
        pd.read_csv(folder / "table.csv") for folder in (run, run / "recheck" / "twice-seed7")
    ]
    assert frame[["first", "second"]].iloc[0].tolist() == [t["robust_acc"][0] for t in tables]
    assert tables[0]["weights_sha256"][0] == tables[1]["weights_sha256"][0]
    runs = [read_run(folder) for folder in (run, run / "recheck" / "twice-seed7")]
    assert [r.evidences[0].case["training_seed"] for r in runs] == [0, 0]
    assert [r.evidences[0].case["seed"] for r in runs] == [0, 7]
    held = {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")}
    text = (run / "recheck.md").read_bytes()
    command([*given, "7"], monkeypatch, capsys)
    records = {p: t for p, t in held.items() if p.parent.name == "records"}
    assert {path: path.stat().st_mtime_ns for path in records} == records
    assert (run / "recheck.md").read_bytes() == text


def test_a_seed_below_zero_is_refused() -> None:
    with pytest.raises(UsageError, match="--recheck is -1; give at least 0"):
        under_seed(find_suite("digits"), -1)
