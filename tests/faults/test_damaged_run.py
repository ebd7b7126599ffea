"""Flipped and torn bytes in every file of a finished run: named, then computed again or refused."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from shipped_rows import PLAIN, ROBUST
from terminal import command

from robustdeq import load_model
from robustdeq.datasets import load_slice
from robustdeq.errors import DamagedError, UsageError
from robustdeq.evidence.submit import submit_examples
from robustdeq.randomness import SampleRandom
from robustdeq.registry import load
from robustdeq.reporting.formats import render
from robustdeq.reporting.page.build import render_page
from robustdeq.reporting.publish import publish
from robustdeq.reporting.run import INDEX, read_index, read_run
from robustdeq.reporting.sums import FILE as SUMS
from robustdeq.running.run import Options, Tick, run_suite
from robustdeq.suite import parse_suite
from robustdeq.tables import COST_COLUMNS
from robustdeq.targets import Target
from robustdeq.threats import Threat

SUITE = """
name = "tiny"
threats = ["Linf:3/32"]
chunk = 4
datasets = [{ name = "digits", samples = 8 }]
curves = { epsilons = [1.0], steps = [1], unbounded = false }
attacks = [{ attack = "pgd", parameters = { steps = 1 } }]
"""
BY = "Ada"
Damage = Callable[[Path, random.Random], None]


def flip(path: Path, rng: random.Random) -> None:
    """One bit of one byte, anywhere."""
    held = bytearray(path.read_bytes())
    held[rng.randrange(len(held))] ^= 1 << rng.randrange(8)
    path.write_bytes(held)


def truncate(path: Path, rng: random.Random) -> None:
    held = path.read_bytes()
    path.write_bytes(held[: rng.randrange(len(held))])


DAMAGES = pytest.mark.parametrize("damage", [flip, truncate])


def go(out: Path, page: bool = False) -> list[str]:
    """Run the suite, if asked with figures and page; what it says of the files that it finds."""
    ticks: list[Tick] = []
    run_suite(
        parse_suite(SUITE + PLAIN + ROBUST, "tiny", None), Options(out=out, workers=1), ticks.append
    )
    if page:
        publish(out / "tiny")
    return [tick.note for tick in ticks if tick.note]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two rows, one of which was lowered by a submission."""
    out = tmp_path_factory.mktemp("finished")
    assert go(out) == []
    run, n = out / "tiny", 8
    data = load_slice("digits", "test", n)
    x, y = torch.from_numpy(data.images) / 255, torch.from_numpy(data.labels)
    target = Target(load_model("Standard_feedforward"), 10)
    rng = SampleRandom(0, "pgd", range(n))
    found: torch.Tensor = load("attack", "pgd", {}).run(
        target, x, y, Threat.parse("Linf:3/32"), rng
    )
    save_file({"x": found, "index": torch.arange(n)}, out / "found.safetensors")
    assert submit_examples(run, "Plain", out / "found.safetensors", BY).fallen
    assert go(out, page=True) == []
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def files(run: Path) -> list[Path]:
    return sorted(p for p in run.rglob("*") if p.is_file() and p.name[0] != ".")


def records(run: Path) -> list[Path]:
    return [p for p in files(run) if p.parent.name == "records"]


def submitted(run: Path) -> list[Path]:
    (entry,) = json.loads((run / "submissions.json").read_text())["examples"]
    return [
        run / "records" / f"{key}.parquet" for keys in entry["records"].values() for key in keys
    ]


def table(run: Path) -> pd.DataFrame:
    return pd.read_csv(run / "table.csv").drop(columns=list(COST_COLUMNS))


def names_it(words: str, path: Path) -> bool:
    return f"{path} " in words and "\n" not in words


@DAMAGES
def test_a_report_refuses_by_name_or_is_the_same(damage: Damage, out: Path) -> None:
    run, rng = out / "tiny", random.Random(f"report {damage.__name__}")
    before = render(read_run(run).name, read_run(run).verdicts, "csv")
    kinds = {path.suffix for path in files(run)}
    assert kinds >= {".parquet", ".json", ".csv", ".md", ".html", ".svg", ".png", ".safetensors"}
    for path in files(run):
        whole = path.read_bytes()
        damage(path, rng)
        if path.name == "run.json" or path in records(run):
            with pytest.raises(DamagedError, match="give the same 'robustdeq run' command") as told:
                read_run(run)
            assert names_it(str(told.value), path)
        else:
            assert render(read_run(run).name, read_run(run).verdicts, "csv") == before
        path.write_bytes(whole)
    damage(run / "images.parquet", rng)
    with pytest.raises(DamagedError, match=r"images\.parquet is damaged"):
        render_page(read_run(run))


@DAMAGES
def test_damaged_records_are_named_and_computed_again(damage: Damage, out: Path) -> None:
    run, rng = out / "tiny", random.Random(f"records {damage.__name__}")
    before, lost = table(run), [p for p in records(run) if p not in submitted(run)]
    assert len(lost) == 2 * (2 * 3 + 2)  # clean, pgd and curves of each chunk; checks and traces
    for path in lost:
        damage(path, rng)
    told = go(out)
    for path in lost:
        assert any(names_it(words, path) and "computed again" in words for words in told)
    assert len(told) == len(lost)
    pd.testing.assert_frame_equal(table(run), before)
    assert go(out) == []


@DAMAGES
def test_whatever_else_is_damaged_is_named_and_written_anew(damage: Damage, out: Path) -> None:
    run, rng = out / "tiny", random.Random(f"derived {damage.__name__}")
    kept = [*records(run), run / "submissions.json"]
    before = {path: path.read_bytes() for path in files(run)}
    derived = [path for path in before if path not in kept and path.name != SUMS]
    assert len(derived) > 15
    for path in derived:
        damage(path, rng)
    told = go(out, page=True)
    for path in derived:
        assert any(names_it(words, path) and "written anew" in words for words in told), path
    assert {path: path.read_bytes() for path in files(run)} == before
    damage(run / SUMS, rng)
    assert any(str(run) in words for words in go(out, page=True))
    assert {path: path.read_bytes() for path in files(run)} == before


@DAMAGES
def test_what_was_submitted_is_never_lost_in_silence(damage: Damage, out: Path) -> None:
    run, rng = out / "tiny", random.Random(f"submitted {damage.__name__}")
    lowered = table(run)
    for path in (run / "submissions.json", *submitted(run)):
        whole = path.read_bytes()
        damage(path, rng)
        with pytest.raises(DamagedError, match="restore it from a copy; or delete it") as told:
            go(out)
        assert names_it(str(told.value), path)
        path.write_bytes(whole)
    assert go(out) == []
    pd.testing.assert_frame_equal(table(run), lowered)
    submitted(run)[0].unlink()
    with pytest.raises(UsageError, match="which the run lists, is gone"):
        read_run(run)
    (words,) = go(out)
    assert f"by {BY} no longer count" in words
    assert table(run)["robust_acc"].sum() > lowered["robust_acc"].sum()
    assert go(out) == []


def test_the_command_line_says_it_in_one_sentence(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = out / "tiny"
    flip(records(run)[0], random.Random(1))
    exports = [["--format", form] for form in ("csv", "latex", "json", "html")]
    exports += [["--format", "robustbench", "--out", str(out / "b")]]
    for arguments in (*[["report", run, *more] for more in exports], ["compare", run, run]):
        code, printed, err = command(arguments, monkeypatch, capsys)
        assert (code, printed) == (2, "")
        assert err.startswith(f"error: {records(run)[0]} is damaged (its checksum differs); give")
        assert err.count("\n") == 1


def test_a_run_from_before_there_were_seals_is_read_with_a_note(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = out / "tiny"
    before = render("tiny", read_run(run).verdicts, "csv")
    data = read_index(run)
    (run / "run.json").write_text(json.dumps({**data, "format": 1}))
    code, printed, err = command(["report", run, "--format", "csv"], monkeypatch, capsys)
    assert (code, printed) == (0, before)
    assert err.startswith(f"note: {run}/run.json is of a format without a seal")
    (run / "run.json").write_text(json.dumps({**data, "format": 2}))
    with pytest.raises(DamagedError, match="its seal is gone"):
        read_run(run)
    go(out)  # is what the sentence asks for
    assert read_index(run)["format"] == INDEX.newest


def test_a_newer_run_is_refused(out: Path) -> None:
    for file in ("run.json", "submissions.json"):
        path, whole = out / "tiny" / file, (out / "tiny" / file).read_bytes()
        data = {**json.loads(whole), "format": INDEX.newest + 1}
        del data["sha256"]
        path.write_text(json.dumps(data))
        with pytest.raises(UsageError, match=r"format 3, newer than this version reads \(2\)"):
            INDEX.read(path)
        path.write_bytes(whole)
