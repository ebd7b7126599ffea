"""A run for papers and other leaderboards: LaTeX, JSON, RobustBench's files and its tensor."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reported import (
    HOSTILE,
    SAMPLES,
    copied,
    is_one_sentence,
    report_of,
    tiny_run,
    verdict,
    with_about,
)
from terminal import command

from robustdeq.datasets import load_slice
from robustdeq.errors import CaseError, UsageError
from robustdeq.evaluation.direct import load_model
from robustdeq.evaluation.judge import DRAWS as JUDGED_BY
from robustdeq.evidence.tensor import adversarial_tensor, write_tensor
from robustdeq.reporting.formats import FORMATS, render_run
from robustdeq.reporting.latex import escaped, to_latex
from robustdeq.reporting.merge import merge
from robustdeq.reporting.model_info import (
    DRAWS,
    claimed_figure,
    file_name,
    model_info,
    model_infos,
    write_model_infos,
)
from robustdeq.reporting.run import read_run
from robustdeq.tables import COLUMNS, tabulate
from robustdeq.verdict import Verdict

MANY, SOME, NONE = [True] * 40, [True] * 38 + [False] * 2, [False] * 40
DOCUMENT = (
    "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n%s\\end{document}\n"
)
SAFE = re.compile(
    r"(?:[A-Za-z0-9 .,:;!?'()/=+@]|\\[&%$#_{}]|\\text[a-z]+\{\}|\\ldots\{\}|-\{\}"
    r"|\{\[\}|\{\]\}|\{\*\}|\\[`'^~\"=.uvrcH]\{[A-Za-z]\})*"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory)


def missing(name: str, **more: Any) -> Verdict:
    nothing = dict.fromkeys(
        ("clean_acc", "autoattack_acc", "robust_acc", "robust_low", "robust_high")
    )
    return verdict(name, NONE, **(nothing | {"status": "failed", "note": "died"} | more))


@given(st.text() | st.text("\\{}$&#^_%~<>[]*-`'\"|\n\t"))
def test_any_text_is_ascii_that_latex_prints(text: str) -> None:
    assert SAFE.fullmatch(escaped(text)), escaped(text)
    assert len(escaped(text * 500)) < 40 * 20


def test_special_characters_have_their_commands() -> None:
    assert escaped("a_b & 50%\n\\x{~}^") == (
        r"a\_b \& 50\% \textbackslash{}x\{\textasciitilde{}\}\textasciicircum{}"
    )
    assert escaped("Erd\u0151s \u00e9 \u4e2d") == r"Erd\H{o}s \'{e} {[}U+4E2D{]}"


def test_ties_share_the_bold_and_a_rank_beyond_chance_does_not() -> None:
    rows = [verdict("A", MANY), verdict("B", SOME), verdict("C", NONE), missing("D")]
    text = to_latex("hand", rows)
    assert r"\textbf{100.00}" in text
    assert r"\textbf{95.00}" in text
    assert text.count(r"\textbf") == 2
    assert "rows of one rank do not differ beyond chance" in text.replace("-{}", "-")
    assert re.search(r"^n/a & D\$\^\{1\}\$ & 40 & n/a & n/a & n/a & n/a & ", text, re.MULTILINE)
    assert "$^{1}$ failed: died." in text


def test_a_row_on_other_samples_is_not_bold() -> None:
    text = to_latex("hand", [verdict("A", SOME), verdict("B", SOME), verdict("C", MANY[:20])])
    assert text.count(r"\textbf{95.00}") == text.count(r"\textbf") == 2


def test_a_table_a_section_and_each_note_once() -> None:
    notes = {"flags": ("masked=1",)}
    rows = [verdict("A", MANY, **notes), verdict("B", SOME, **notes)]
    rows += [verdict("A", MANY, threat="L2:0.5"), verdict("C", MANY, track="randomized")]
    text = to_latex("hand", rows)
    assert text.count(r"\begin{table}") == text.count(r"\bottomrule") == 3
    assert text.count("masked=1") == 1
    assert len(set(re.findall(r"\\label\{(.*)\}", text))) == 3
    assert "AutoAttack by the joint engine" in to_latex(
        "hand", [verdict("A", MANY, autoattack_engine="joint")]
    )


def test_hostile_words_compile_to_themselves(tmp_path: Path) -> None:
    rows = [
        verdict(HOSTILE, MANY, flags=(HOSTILE,), autoattack_engine=HOSTILE),
        verdict("B", SOME, note="".join(map(chr, range(32, 1000)))),
        missing("C", note=HOSTILE, dataset=HOSTILE[:200], threat="Linf:\\end{document}"),
        verdict("D", NONE, track="\\undefined", credit=HOSTILE),
    ]
    text = to_latex(HOSTILE, rows)
    assert text.isascii()
    assert "A" * 400 not in text
    body = re.sub(r"^\\(label|begin|end|caption|toprule|midrule|bottomrule).*$", "", text, flags=8)
    assert not re.search(r"\\(input|end|undefined)", body)
    tex = shutil.which("pdflatex")
    if tex is None:
        pytest.skip("the words are inert; no TeX is here to compile them")
    (tmp_path / "t.tex").write_text(DOCUMENT % text)
    flags = ["-halt-on-error", "-interaction=nonstopmode", "-no-shell-escape"]
    done = subprocess.run([tex, *flags, "t.tex"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    assert (tmp_path / "t.pdf").stat().st_size > 1000


def test_json_holds_the_whole_table_with_what_it_was_computed_on(run: Path) -> None:
    report = read_run(run)
    data = json.loads(render_run(report, "json"))
    table = tabulate(report.verdicts)
    assert [row["id"] for row in data["rows"]] == table["id"].tolist()
    for row, (_, cells) in zip(data["rows"], table.iterrows(), strict=True):
        assert set(COLUMNS) <= set(row)
        assert row["robust_acc"] == cells["robust_acc"]
        assert row["rank"] == cells["rank"]
        assert row["autoattack_acc"] is None
        assert sum(row["broken_by"].values()) == round(
            SAMPLES * (row["clean_acc"] - row["robust_acc"])
        )
        assert row["case"]["id"] == row["id"]
    about = {row["id"]: row["about"] for row in data["rows"]}
    assert about["Chu2023Learning"]["title"] == "Lyapunov-Stable Deep Equilibrium Models"
    for part in ("suite", "seed", "environment", "machine", "git", "robustdeq", "core"):
        assert data[part] == report.data[part]


def test_json_of_merged_runs_says_which_run_a_row_is_of() -> None:
    report = merge(
        [report_of(verdict("A", SOME)), report_of(missing("B"), verdict("C", MANY), folder="out/b")]
    )
    data = json.loads(render_run(report, "json"))
    assert [(row["id"], row["run"]) for row in data["rows"]] == [("C", 1), ("A", 0), ("B", 1)]
    assert [r["folder"] for r in data["runs"]] == ["out/hand", "out/b"]
    last = data["rows"][2]
    assert (last["rank"], last["robust_acc"], last["status"]) == (None, None, "failed")


ABOUT = {
    "title": "A Title", "authors": "Ada, Bob", "venue": "NeurIPS 2021", "link": "https://x.org/1",
}  # fmt: skip


def test_model_info_has_the_keys_and_forms_of_robustbench() -> None:
    report = report_of(
        verdict("Ada2021Title", [True] * 30 + [False] * 10, autoattack_acc=0.8, clean_acc=0.9373),
        about=ABOUT,
        trainings={"Ada2021Title": {"recipe": "pgd_at"}},
        cases={"Ada2021Title": {"parameters": {"width": 96, "gain": 0.8}}},
    )
    (info,) = model_infos(report)
    assert info.path == Path("digits/Linf/Ada2021Title.json")
    footnote = info.content.pop("footnote")
    assert info.content == {
        "link": "https://x.org/1",
        "name": "A Title",
        "authors": "Ada, Bob",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": "digits",
        "venue": "NeurIPS 2021",
        "architecture": "deq (gain 0.8, width 96)",
        "eps": "8/255",
        "clean_acc": "93.73",
        "reported": None,
        "autoattack_acc": "80.00",
        "external": "75.00",
    }
    assert "first 40 test samples" in footnote


def test_model_info_invents_nothing() -> None:
    equal = report_of(verdict("A", SOME))
    info = model_info(equal, 0)
    assert "external" not in info
    assert "unreliable" not in info
    assert (info["link"], info["additional_data"], info["venue"]) == (None, None, "N/A")
    assert (info["name"], info["authors"]) == ("A", "")
    doubted = report_of(verdict("A", SOME, flags=("zero_gradient=1", "left_out:x")))
    assert model_info(doubted, 0)["unreliable"] is True
    spared = report_of(verdict("A", SOME, flags=("left_out:x", "randomized")))
    assert "unreliable" not in model_info(spared, 0)
    unknown = model_info(report_of(verdict("A", SOME, autoattack_acc=None)), 0)
    assert (unknown["autoattack_acc"], unknown["external"]) == (None, "95.00")
    assert model_info(report_of(verdict("A", SOME, track="randomized")), 0)[
        "number_forward_passes"
    ] == (JUDGED_BY)
    assert DRAWS == JUDGED_BY


@pytest.mark.parametrize(
    ("claimed", "figure"),
    [
        ("It keeps 71.28 % on digits under Linf:8/255.", "71.28"),
        ("Reaches 64% on digits under Linf:8/255", "64.00"),
        ("71.28 % on digits under Linf:8/2550", None),
        ("71.28 % on digits under Linf:8/255.5", None),
        ("71.28 % on digits under Linf:16/255", None),
        ("71.28 % on cifar10 under Linf:8/255", None),
        ("171.28 % on digits under Linf:8/255", None),
        ("70 % on digits under Linf:8/255, 71 % on digits under Linf:8/255", None),
        ("About 3 times faster, 71.28 % robust", None),
        ("", None),
    ],
)
def test_a_figure_is_reported_only_if_it_is_claimed_for_this_threat(
    claimed: str, figure: str | None
) -> None:
    assert claimed_figure(claimed, verdict("A", SOME)) == figure
    assert model_info(report_of(verdict("A", SOME), about={"claimed": claimed}), 0)["reported"] == (
        figure
    )


@given(st.text() | st.text("./\\-~ab\x00:*"))
def test_names_cannot_lead_out_of_their_folder(text: str) -> None:
    name = file_name(text)
    assert re.fullmatch(r"[A-Za-z0-9_+][A-Za-z0-9._+-]{0,120}", name)
    assert name not in (".", "..")
    assert Path("/a", name).resolve().parent == Path("/a")
    harmless = re.fullmatch(r"[A-Za-z0-9_+]([A-Za-z0-9._+-]{0,60}[A-Za-z0-9_+])?", text)
    assert (name == text) == (harmless is not None) or len(text) > 60
    assert file_name(text) == name != file_name(text + "/")


def test_hostile_rows_stay_in_the_folder_and_apart(tmp_path: Path) -> None:
    rows = [
        verdict("../../etc/passwd", SOME),
        verdict("/abs", SOME, dataset="../up", threat="../L:1"),
        verdict(HOSTILE, SOME),
        verdict("same", SOME, threat="Linf:4/255"),
        verdict("SAME", SOME, threat="Linf:4/255"),
        missing("gone"),
    ]
    about = {
        "title": HOSTILE,
        "authors": HOSTILE,
        "link": 'https://x.org/"onload=1',
        "venue": "<i>",
    }
    paths = write_model_infos(report_of(*rows, about=about), tmp_path / "info")
    assert len({str(path).casefold() for path in paths}) == 5
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(written) == sorted(paths)
    assert all(len(path.relative_to(tmp_path / "info").parts) == 3 for path in paths)
    # Several radii of one norm are several rankings.
    assert {path.parent.name.split("-")[0] for path in paths} == {"Linf", "L"}
    for path in paths:
        info = json.loads(path.read_text())
        assert info["link"] is None
        assert not [v for v in info.values() if isinstance(v, str) and re.search("[<>\n]", v)]
        assert max(len(v) for v in info.values() if isinstance(v, str)) <= 600


def test_nothing_to_export_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no row of hand has a robust accuracy"):
        write_model_infos(report_of(missing("A")), tmp_path)


def test_the_tensor_gives_the_rows_robust_accuracy(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "new" / "x.pt"
    arguments = ["report", run, "--format", "pt", "--row", "Madry2018Towards_deq", "--out", out]
    assert command(arguments, monkeypatch, capsys)[0] == 0
    x = torch.load(out, weights_only=True)
    held = load_slice("digits", "test", SAMPLES)
    assert (x.dtype, x.shape) == (torch.float32, (SAMPLES, 1, 8, 8))
    clean = torch.from_numpy(held.images.astype(np.float32) / np.float32(255))
    assert 0 < (x - clean).abs().max() <= 3 / 16 + 1e-6
    report = read_run(run)
    row = [v.id for v in report.verdicts].index("Madry2018Towards_deq")
    model = load_model("Madry2018Towards_deq", dataset="digits", threat="Linf:3/16")
    with torch.no_grad():
        right = model(x).argmax(1) == torch.from_numpy(held.labels)
    assert right.tolist() == report.verdicts[row].samples["robust"].tolist()
    assert right.double().mean().item() == pytest.approx(report.verdicts[row].robust_acc)


def test_a_tensor_of_other_images_or_lost_records_is_refused(run: Path, tmp_path: Path) -> None:
    report = read_run(run)

    def other(name: str, split: Any, samples: int | None = None) -> Any:
        held = load_slice(name, split, samples)
        return replace(held, images=255 - held.images)

    with pytest.raises(CaseError, match="is not the one of row"):
        adversarial_tensor(report, 0, other)
    lost = copied(run, tmp_path / "lost", lambda data: None)
    held = read_run(lost)
    for path in (lost / "records").iterdir():
        path.unlink()
    with pytest.raises(CaseError, match="records of Standard_deq are gone"):
        adversarial_tensor(held, [v.id for v in held.verdicts].index("Standard_deq"))
    with pytest.raises(UsageError, match=r"no robust accuracy \(died\)"):
        adversarial_tensor(report_of(missing("A")), 0)


def test_a_written_tensor_holds_no_more_than_itself(tmp_path: Path) -> None:
    whole = torch.zeros(1000, 1, 8, 8)
    write_tensor(tmp_path / "x.pt", whole[:2])
    assert (tmp_path / "x.pt").stat().st_size < 10_000


def test_hostile_words_reach_every_export(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def change(data: dict[str, Any]) -> None:
        for name in ("title", "authors", "venue", "link", "claimed"):
            with_about(name, HOSTILE)(data)
        data["rows"][0]["case"]["id"] = HOSTILE

    evil = copied(run, tmp_path / "evil", change)
    for form in FORMATS:
        code, text, _ = command(["report", evil, "--format", form], monkeypatch, capsys)
        assert code == 0
        if form != "csv":
            assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", text)
        assert "<script>" not in text or form in ("csv", "json")
    code, text, _ = command(["report", evil, "--format", "latex"], monkeypatch, capsys)
    assert text.isascii()
    code, text, _ = command(["report", evil, "--format", "json"], monkeypatch, capsys)
    assert {row["about"]["title"] for row in json.loads(text)["rows"]} == {HOSTILE}
    out = tmp_path / "info"
    code, _, _ = command(
        ["report", evil, "--format", "robustbench", "--out", out], monkeypatch, capsys
    )
    assert code == 0
    assert len(list(out.glob("digits/Linf/*.json"))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "latx"], "did you mean 'latex'"),
        (["--format", "pt"], "name where to with --out"),
        (["--format", "robustbench"], "name where to with --out"),
        (["--format", "pt", "--out", "x.pt"], "name it with --row"),
        (["--format", "pt", "--out", "x.pt", "--row", "deq"], "names 2 rows"),
        (["--format", "pt", "--out", ".", "--row", "lyadeq"], "is a folder"),
        (["--row", "lyadeq"], "leave them out"),
        (["--format", "latex", "--out", "file/t.tex"], "cannot be created"),
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
    (tmp_path / "file").write_text("")
    code, _, err = command(["report", run, *arguments], monkeypatch, capsys)
    assert code == 2
    assert is_one_sentence(err)
    assert message in err
