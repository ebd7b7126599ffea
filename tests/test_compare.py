"""`robustdeq compare`: which rows are meant, what is said of them, in which form."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from reported import (
    HOSTILE,
    SAMPLES,
    copied,
    is_one_sentence,
    report_of,
    tiny_run,
    unbreak,
    verdict,
)
from terminal import command

from robustdeq.comparison import compare, flips_table, paragraph
from robustdeq.errors import UsageError
from robustdeq.reporting.compared import FORMATS, compare_rows, compare_runs, find_runs, render
from robustdeq.reporting.page.environment import cut
from robustdeq.reporting.rows import pair_named, row_named
from robustdeq.reporting.run import RunReport, read_run
from robustdeq.statistics import paired

A = [True] * 6 + [False] * 14
B = [False] * 3 + [True] * 4 + [False] * 13
RECIPES = {"Clean_x": "clean", "Ours_x": "pgd_at", "Clean": "clean", "AT": "pgd_at"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory)


def trained(**more: Any) -> RunReport:
    """Two rows of the defense `x` and two of `deq`, one of each by each recipe."""
    rows = [verdict(name, A, defense="x" if "_x" in name else "deq") for name in RECIPES]
    return report_of(*rows, trainings={k: {"recipe": v} for k, v in RECIPES.items()}, **more)


def test_the_paragraph_holds_every_figure() -> None:
    a = verdict("Ours", A, seconds=6.0, forward_nfe=3000, backward_nfe=0, autoattack_acc=0.35)
    b = verdict("Base", B, flags=("left_out:apgd-t", "zero_gradient=0.5"), defense="plain")
    b.samples.loc[1, "broken_by"] = "square"
    b.samples.loc[2, "broken_by"] = None
    found = compare(a, b)
    test = paired(A, B)
    text = paragraph(found)
    for part in (
        "On the same 20 samples of digits under Linf:8/255",
        f"Ours (deq) is robust on 30.00 % (95 % Wilson interval {100 * a.robust_low:.2f} % to "
        f"{100 * a.robust_high:.2f} %; clean 100.00 %, AutoAttack alone 35.00 %)",
        "Base (plain) on 20.00 %",
        f"a difference of {100 * test.difference:+.2f} points (95 % interval "
        f"{100 * test.low:+.2f} to {100 * test.high:+.2f}; exact McNemar p = {test.p_value:.3g}), "
        "not beyond chance at 5 %.",
        "Ours alone is robust on 3 samples, where Base fell to pgd (1), square (1) and was wrong "
        "without an attack (1).",
        "Base alone is robust on 1 sample, where Ours fell to pgd (1).",
        "took 2.00 times the NFE of Base (3k against 1.5k, forward and backward) and 3.00 times "
        "its seconds (6.0 against 2.0).",
        "Base is in doubt: zero_gradient=0.5.",
    ):
        assert part in text
    assert "apgd-t" not in text
    assert flips_table(found).to_dict("list") == {
        "Sample": [0, 1, 2, 6],
        "Label": [0, 1, 2, 6],
        "Robust": ["Ours", "Ours", "Ours", "Base"],
        "Broken": ["Base", "Base", "Base", "Ours"],
        "By": ["pgd", "square", "misclassified", "pgd"],
    }


def test_what_is_not_known_is_not_a_number() -> None:
    a, b = verdict("Ours", A, autoattack_acc=None, seconds=0.0), verdict("Base", A)
    text = paragraph(compare(a, b))
    assert "AutoAttack alone n/a)" in text
    assert "n/a times its seconds" in text
    assert "No sample is robust in Ours alone. No sample is robust in Base alone." in text


def test_a_difference_is_judged_by_the_test_and_not_across_tracks() -> None:
    many, none = [True] * 20, [False] * 20
    assert ", beyond chance at 5 %." in paragraph(compare(verdict("A", many), verdict("B", none)))
    other = verdict("B", none, track="randomized")
    assert "not judged, for the rows are of different tracks" in paragraph(
        compare(verdict("A", many), other)
    )


def test_a_handle_means_the_row_that_was_trained_alike() -> None:
    report = trained()
    for names in (("Ours_x", "deq"), ("x", "AT")):
        pair = pair_named(report, *names)
        assert [report.verdicts[k].id for k in (pair.a, pair.b)] == ["Ours_x", "AT"]
        assert "both were trained by pgd_at under Linf:8/255" in pair.reason
    assert pair_named(report, "Ours_x", "Clean").reason == ""


def test_a_handle_means_the_row_that_answers_the_same_question() -> None:
    rows = [verdict("O", A, defense="x")]
    rows += [verdict(f"D{k}", A, threat=f"Linf:{k}/255") for k in (8, 4)]
    report = report_of(*rows)
    assert report.verdicts[pair_named(report, "x", "deq").b].id == "D8"
    assert report.verdicts[row_named(report, "deq", "Linf:4/255")].id == "D4"


@pytest.mark.parametrize(
    ("a", "b", "threat", "message"),
    [
        ("x", "deq", "", r"'x' names 2 rows \(Clean_x, Ours_x\) and 'deq' names 2 rows"),
        ("Ours_x", "dek", "", "did you mean 'deq'"),
        ("Ours_x", "Ours_x", "", "are one row"),
        ("Ours_x", "deq", "L2:1", "no row under L2:1; its threats are: Linf:8/255"),
    ],
)
def test_a_choice_that_is_left_is_said(a: str, b: str, threat: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pair_named(trained(), a, b, threat)


def test_other_trainings_leave_the_choice_to_the_reader() -> None:
    report = report_of(*(verdict(n, A, defense=n[0]) for n in ("x1", "d1", "d2")))
    with pytest.raises(UsageError, match=r"'d' names 2 rows \(d1, d2\); write an ID"):
        pair_named(report, "x1", "d")


def test_rows_of_other_images_are_not_compared() -> None:
    report = report_of(verdict("A", A), verdict("B", B), cases={"B": {"digest": "other"}})
    with pytest.raises(UsageError, match="different images under the name digits"):
        compare_rows(report, "A", "B")


def test_lyadeq_against_deq_on_a_real_run(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "digits").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    code, text, _ = command(["compare", "lyadeq", "deq"], monkeypatch, capsys)
    assert code == 0
    assert f"On the same {SAMPLES} samples of digits under Linf:3/16, Chu2023Learning" in text
    assert "Madry2018Towards_deq" in text
    assert "both were trained by pgd_at under Linf:3/16" in text
    verdicts = {v.id: v for v in read_run(run).verdicts}
    a, b = (verdicts[name].samples for name in ("Chu2023Learning", "Madry2018Towards_deq"))
    test = paired(a["robust"].to_numpy(dtype=bool), b["robust"].to_numpy(dtype=bool))
    assert f"{100 * test.difference:+.2f} points" in text
    assert f"McNemar p = {test.p_value:.3g}" in text
    flips = len(re.findall(r"^ +\d+ +\d+ +\w+ +\w+ +\S+$", text, re.MULTILINE))
    assert flips == test.only_a + test.only_b
    again = command(["compare", "lyadeq", "deq", "--runs", str(run)], monkeypatch, capsys)
    assert again[1] == text


def test_the_command_writes_files(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for form in FORMATS:
        out = tmp_path / "new" / f"c.{form}"
        arguments = ["compare", "lyadeq", "deq", "--runs", run, "--format", form, "--out", out]
        code, text, _ = command(arguments, monkeypatch, capsys)
        assert code == 0
        assert str(out) in text
        assert "Chu2023Learning" in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lyadeq", "deq"], "no run in out has both 'lyadeq' and 'deq'"),
        (["lyadeq", "deq", "--format", "txt"], "did you mean 'text'"),
        (["lyadeq", "deqq", "--runs", "RUN"], "did you mean 'deq'"),
        (["RUN", "RUN"], "are one run"),
        (["RUN", "RUN", "--runs", "RUN"], "leave --runs out"),
        (["lyadeq", "deq", "--runs", "nowhere"], "holds no run"),
        (["lyadeq", "deq", "--runs", "RUN", "--out", "."], "is a folder"),
    ],
)
def test_wrong_usage_is_one_sentence(
    arguments: list[str],
    message: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    named = [str(run) if part == "RUN" else part for part in arguments]
    code, _, err = command(["compare", *named], monkeypatch, capsys)
    assert code == 2
    assert is_one_sentence(err)
    assert message in err


def test_the_run_is_found_that_has_both_rows(run: Path, tmp_path: Path) -> None:
    def alone(data: dict[str, Any]) -> None:
        data["rows"] = data["rows"][:1]

    whole = copied(run, tmp_path / "whole", lambda data: None)
    copied(run, tmp_path / "part", alone)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    assert find_runs(("lyadeq", "deq"), tmp_path) == [whole]
    copied(run, tmp_path / "copy", lambda data: None)
    with pytest.raises(UsageError, match="rows of several runs"):
        find_runs(("lyadeq", "deq"), tmp_path)
    digits = copied(run, tmp_path / "digits", lambda data: None)
    assert find_runs(("lyadeq", "deq"), tmp_path) == [digits]


def test_two_runs_are_compared_row_by_row(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def change(data: dict[str, Any]) -> None:
        data["rows"] = [r for r in data["rows"] if r["case"]["id"] != "Chu2023Learning"]

    other = copied(run, tmp_path / "other", change)
    index = unbreak(other, "Standard_deq")
    report = compare_runs(run, other)
    assert len(report.parts) == 2
    flips = pd.concat([part.flips for part in report.parts])
    assert flips["Sample"].tolist() == [index]
    assert flips["Robust"].tolist() == [f"Standard_deq of {cut(other, 80)}"]
    assert report.left_out == (f"Chu2023Learning on digits under Linf:3/16: in {run} alone",)
    code, text, _ = command(["compare", run, other], monkeypatch, capsys)
    assert code == 0
    assert "not compared: Chu2023Learning" in text
    with pytest.raises(UsageError, match="no row in common"):
        compare_runs(run, other, "L2:1")


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)


def test_hostile_words_are_inert_in_every_form() -> None:
    rows = [
        verdict("Ours", A, defense=HOSTILE, flags=(f"masked=1 ({HOSTILE})",)),
        verdict(HOSTILE, B, defense="base"),
    ]
    rows[0].samples.loc[8, "broken_by"] = HOSTILE
    rows[1].samples["broken_by"] = (
        rows[1].samples["broken_by"].where(rows[1].samples["robust"], HOSTILE)
    )
    report = compare_rows(report_of(*rows), "Ours", "base")
    calm = compare_rows(report_of(rows[0], replace(rows[1], id="Base")), "Ours", "base")
    for form in FORMATS:
        text = render(report, form)
        assert "A" * 1000 not in text
        assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", text)
    page, plain = Elements(), Elements()
    page.feed(render(report, "html"))
    plain.feed(render(calm, "html"))
    assert page.tags == plain.tags
    markdown = render(report, "md")
    assert "<script" not in markdown.replace("\\<script", "")
    assert len([line for line in markdown.splitlines() if line.startswith("|")]) == 2 + 4


def test_it_imports_no_torch(run: Path, tmp_path: Path) -> None:
    commands: list[list[str]] = [["report", str(run), "--format", f] for f in ("latex", "json")]
    commands.append(["report", str(run), "--format", "robustbench", "--out", str(tmp_path)])
    commands.append(["compare", "lyadeq", "deq", "--runs", str(run), "--format", "html"])
    script = (
        "import sys, robustdeq.cli as cli\n"
        f"for arguments in {commands}:\n"
        "    sys.argv = ['robustdeq', *arguments]\n"
        "    try: cli.main()\n"
        "    except SystemExit as done: assert not done.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
