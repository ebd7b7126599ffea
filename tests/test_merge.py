"""Runs of several folders as one: what is one row, what are two, what contradicts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reported import copied, is_one_sentence, report_of, tiny_run, unbreak, verdict
from reports import Row, made_run
from terminal import command

from robustdeq.errors import UsageError
from robustdeq.reporting.figures.draw import figures
from robustdeq.reporting.formats import render_run
from robustdeq.reporting.images import read_images
from robustdeq.reporting.merge import merge, read_runs
from robustdeq.reporting.page.build import render_page
from robustdeq.reporting.page.examples import examples_of
from robustdeq.reporting.run import RunReport, read_run
from robustdeq.tables import tabulate
from robustdeq.verdict import Failure

HALF = [True, False] * 10
LESS = [True, False, False, False] * 5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory)


def keep(*names: str) -> Any:
    def change(data: dict[str, Any]) -> None:
        data["rows"] = [row for row in data["rows"] if row["case"]["id"] in names]

    return change


def ids(report: RunReport) -> list[str]:
    return [v.id for v in report.verdicts]


def test_one_run_alone_is_itself() -> None:
    one = report_of(verdict("A", HALF))
    assert merge([one]) is one


def test_parts_of_a_run_are_merged_into_its_table(run: Path, tmp_path: Path) -> None:
    a = copied(run, tmp_path / "a", keep("Chu2023Learning", "Standard_deq"))
    b = copied(run, tmp_path / "b", keep("Madry2018Towards_deq", "Standard_deq"))
    merged, whole = read_runs([a, b]), read_run(run)
    assert sorted(ids(merged)) == sorted(ids(whole))
    assert render_run(merged, "csv") == render_run(whole, "csv")
    for k, row in enumerate(merged.evidences):
        assert merged.about(k) == whole.about(ids(whole).index(ids(merged)[k]))
        assert all(merged.store_of(k).read(r.meta.key) is not None for r in row.records)
    folders = {name: merged.origin(k).folder for k, name in enumerate(ids(merged))}
    assert folders == {"Chu2023Learning": a, "Standard_deq": a, "Madry2018Towards_deq": b}
    assert merged.entry(ids(merged).index("Madry2018Towards_deq"))["training"]["recipe"] == "pgd_at"
    assert merged.name == whole.name
    with pytest.raises(ValueError, match="no one store"):
        _ = merged.store


def test_provenance_of_all_runs_is_kept() -> None:
    a = report_of(verdict("A", HALF))
    b = report_of(
        verdict("B", LESS), folder="out/b", environment={"torch": "2.8", "device": "cuda"}, seed=1
    )
    merged = merge([a, b])
    assert merged.data["environment"] == {"torch": "2.9 / 2.8", "device": "cpu / cuda"}
    assert merged.data["seed"] == "0 / 1"
    assert merged.data["robustdeq"] == "0.1.0"
    assert [r["environment"]["torch"] for r in merged.data["runs"]] == ["2.9", "2.8"]
    assert [r["folder"] for r in merged.data["runs"]] == ["out/hand", "out/b"]
    assert [row["run"] for row in merged.data["rows"]] == [0, 1]
    assert [entry["id"] for entry in merged.data["suite"]["defenses"]] == ["A", "B"]
    assert merge([merged, a]).data["rows"] == merged.data["rows"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"robust": LESS, "autoattack_acc": 0.5}, "robust accuracy 50.00 % in out/hand"),
        ({"robust": HALF, "autoattack_acc": 0.75}, "AutoAttack accuracy 50.00 %"),
        ({"robust": HALF, "autoattack_acc": None}, "but n/a in out/b"),
        ({"robust": HALF, "clean_acc": 0.9}, "clean accuracy 100.00 %"),
        ({"robust": HALF[::-1]}, "other outcomes on samples 0, 1, 2, 3, 4 and 15 more"),
    ],
)
def test_runs_that_contradict_one_another_are_refused(changes: dict[str, Any], words: str) -> None:
    a = report_of(verdict("A", HALF))
    b = report_of(verdict("A", **changes), folder="out/b", machine={"platform": "Linux-b"})
    with pytest.raises(UsageError) as caught:
        merge([a, b])
    text = str(caught.value)
    for part in (words, "A on digits under Linf:8/255", "out/hand (Linux-a, cpu, torch 2.9",
                 "out/b (Linux-b", "RobustDEQ 0.1.0, commit cccccccccccc)"):  # fmt: skip
        assert part in text


def test_costs_may_differ_and_no_doubt_is_lost() -> None:
    a = report_of(verdict("A", HALF, seconds=1.0))
    b = report_of(verdict("A", HALF, seconds=9.0, flags=("masked=1",)), folder="out/b")
    for merged in (merge([a, b]), merge([b, a])):
        assert [v.flags for v in merged.verdicts] == [("masked=1",)]
        assert merged.origin(0).folder == Path("out/b")
    assert merge([a, replace(a, folder=Path("out/c"))]).origin(0).folder == a.folder


def failed(name: str, **more: Any) -> Any:
    nothing = {"clean_acc": None, "autoattack_acc": None, "robust_acc": None, "status": "failed"}
    return verdict(name, HALF, **nothing, note="died", **more)


def test_a_finished_row_stands_before_one_that_failed() -> None:
    good = report_of(verdict("A", HALF), folder="out/good")
    bad = report_of(failed("A"))
    # A model that could not be built never came to know all of its case.
    unbuilt = report_of(failed("A"), folder="out/unbuilt")
    case = unbuilt.evidences[0].case
    del case["digest"]
    case["weights_sha256"] = ""
    for runs in ([bad, good], [good, bad], [unbuilt, bad, good]):
        merged = merge(runs)
        assert [v.status for v in merged.verdicts] == ["ok"]
        assert merged.origin(0).folder == Path("out/good")
    both = merge([bad, replace(bad, folder=Path("out/c"))])
    assert [v.status for v in both.verdicts] == ["failed"]
    other = report_of(failed("A"), folder="out/other", cases={"A": {"seed": 7}})
    assert [v.status for v in merge([good, other]).verdicts] == ["ok", "failed"]


def test_rows_of_one_name_and_other_cases_both_stand_and_are_told_apart() -> None:
    weights = [{"A": {"weights_sha256": mark * 64, "seed": 0}} for mark in "ab"]
    a = report_of(verdict("A", HALF), cases=weights[0])
    b = report_of(verdict("A", LESS), verdict("B", LESS), folder="out/b", cases=weights[1])
    merged = merge([a, b])
    assert ids(merged) == ["A", "A", "B"]
    notes = [v.note for v in merged.verdicts]
    assert "weights_sha256 aaaaaaaaaaaa..., from out/hand" in notes[0]
    assert "weights_sha256 bbbbbbbbbbbb..., from out/b" in notes[1]
    assert "seed" not in notes[0]
    assert notes[2] == ""
    assert set(tabulate(merged.verdicts)["note"]) == set(notes)


def test_page_and_figures_take_the_rows_of_each_folder(tmp_path: Path) -> None:
    runs = [made_run(tmp_path / name, [Row(f"Row_{name}")]) for name in "ab"]
    merged = merge(runs)
    for number, name in enumerate("ab"):
        images = read_images(tmp_path / name)
        own = examples_of(runs[number], 0, images, 10**6)
        got = examples_of(merged, number, images, 10**6)
        assert own is not None
        assert got is not None
        assert got.source == own.source
    text = render_page(merged)
    assert text.count("sample 0, class") == sum(
        render_page(r).count("sample 0, class") for r in runs
    )
    together = made_run(tmp_path / "c", [Row("Row_a"), Row("Row_b")])
    assert [f.title for f in figures(merged)] == [f.title for f in figures(together)]


def test_the_command_merges_and_refuses(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    a = copied(run, tmp_path / "a", keep("Chu2023Learning"))
    b = copied(run, tmp_path / "b", keep("Standard_deq"))
    code, text, _ = command(["report", a, b, "--format", "csv"], monkeypatch, capsys)
    assert code == 0
    assert text.count("\n") == 3
    unbreak(b, "Standard_deq")
    code, _, err = command(["report", run, b], monkeypatch, capsys)
    assert code == 2
    assert is_one_sentence(err)
    assert "Standard_deq on digits" in err
    assert str(b) in err
    assert "torch" in err


def test_what_broke_an_unfinished_row_is_not_robust_in_another_run(tmp_path: Path) -> None:
    failures = (Failure("square", 0, "it broke down"),)
    strong = Row("One", broken=(3, 1, 1, 0), attacked=3, failures=failures)
    weak = Row("One", broken=(3, 1, 0, 0))
    whole, half = made_run(tmp_path / "whole", [weak]), made_run(tmp_path / "half", [strong])
    assert (whole.verdicts[0].status, half.verdicts[0].status) == ("ok", "failed")
    for runs in ([whole, half], [half, whole]):
        with pytest.raises(UsageError, match=r"robust samples in .* broke \(1\)"):
            merge(runs)
    same = made_run(tmp_path / "same", [strong])
    assert merge([half, same]).verdicts[0].robust_acc is None
    less = made_run(tmp_path / "less", [replace(strong, broken=(3, 0, 0, 0))])
    assert merge([whole, less]).verdicts[0].robust_acc == 0.6
