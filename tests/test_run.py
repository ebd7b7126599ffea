"""A run of a suite: resume, kills, failures, equal tables."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import acme
import pandas as pd
import pytest
from shipped_rows import EQUILIBRIUM, PLAIN

from robustdeq.reporting.formats import render
from robustdeq.reporting.run import read_run
from robustdeq.running.run import Options, Tick, run_suite
from robustdeq.suite import Suite, parse_suite
from robustdeq.tables import COLUMNS, COST_COLUMNS
from robustdeq.verdict import Verdict

HEAD = """
name = "small"
threats = ["Linf:1/16"]
chunk = 10
[[datasets]]
name = "digits"
samples = 25
[[attacks]]
attack = "pgd"
parameters = { steps = 5 }
gradients = ["honest", "unrolled(3)"]
"""
ROWS = PLAIN + EQUILIBRIUM


def suite(text: str = HEAD + ROWS) -> Suite:
    return parse_suite(text, "small", None)


def go(out: Path, text: str = HEAD + ROWS, **options: int) -> tuple[list[Verdict], list[Tick]]:
    ticks: list[Tick] = []
    return run_suite(suite(text), Options(out=out, **options), ticks.append), ticks  # type: ignore[arg-type]


def table(out: Path) -> pd.DataFrame:
    frame = pd.read_csv(out / "small" / "table.csv")
    return frame.drop(columns=list(COST_COLUMNS))


def records(out: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in (out / "small" / "records").iterdir()}


def test_a_run_leaves_its_interface_files(tmp_path: Path) -> None:
    verdicts, ticks = go(tmp_path)
    frame = pd.read_csv(tmp_path / "small" / "table.csv")
    assert list(frame.columns) == list(COLUMNS)
    assert set(frame["id"]) == {"Plain", "Equilibrium"}
    assert frame["clean_acc"].between(0.8, 1).all()
    assert (frame["n"] == 25).all()
    plain = next(v for v in verdicts if v.id == "Plain")
    both = next(v for v in verdicts if v.id == "Equilibrium")
    assert set(plain.broken_by) <= {"pgd"}  # estimators of solves do not apply
    assert plain.status == both.status == "ok"
    assert plain.autoattack_acc is None
    assert {t.verdict.id for t in ticks if t.verdict} == {"Plain", "Equilibrium"}
    assert ticks[-1].done == ticks[-1].total
    data = json.loads((tmp_path / "small" / "run.json").read_text())
    assert data["seed"] == 0
    assert data["environment"]["device"] == "cpu"
    assert {"torch", "numpy", "pyautoattack"} <= set(data["environment"])
    assert "deterministic_algorithms" in data["machine"]
    assert (tmp_path / "small" / "table.md").read_text().startswith("# RobustDEQ: small")


def test_a_second_run_computes_nothing_and_rewrites_the_same_bytes(tmp_path: Path) -> None:
    go(tmp_path)
    held, text = records(tmp_path), (tmp_path / "small" / "table.csv").read_bytes()
    go(tmp_path)
    assert records(tmp_path) == held
    assert (tmp_path / "small" / "table.csv").read_bytes() == text
    run = read_run(tmp_path)
    assert render(run.name, run.verdicts, "csv").encode() == text


def test_workers_and_batch_size_change_no_figure(tmp_path: Path) -> None:
    go(tmp_path / "a", workers=1)
    go(tmp_path / "b", workers=3, batch_size=4)
    # Rounding at the tolerance can move a sample's stop by one step, so NFE is equal to 1 % only.
    exact = [c for c in COLUMNS if not c.endswith("nfe") and c not in COST_COLUMNS]
    a, b = table(tmp_path / "a"), table(tmp_path / "b")
    pd.testing.assert_frame_equal(a[exact], b[exact])
    pd.testing.assert_frame_equal(a, b, rtol=0.01)


def test_a_torn_record_is_computed_afresh(tmp_path: Path) -> None:
    go(tmp_path)
    whole = table(tmp_path)
    for victim in sorted((tmp_path / "small" / "records").iterdir())[::3]:
        victim.write_bytes(victim.read_bytes()[:-50])
    go(tmp_path)
    pd.testing.assert_frame_equal(whole, table(tmp_path))


def test_an_edited_attack_serves_no_stale_record(tmp_path: Path) -> None:
    go(tmp_path)
    held = records(tmp_path)
    go(tmp_path, (HEAD + ROWS).replace("steps = 5", "steps = 6"))
    # The traces of both rows consume what the attacks found.
    assert len(set(records(tmp_path)) - set(held)) == 3 * (1 + 2) + 2


KILLED = """
import sys
from pathlib import Path
from test_run import suite
from robustdeq.running.run import Options, run_suite

if __name__ == "__main__":
    text = Path(sys.argv[2]).read_text()
    run_suite(suite(text), Options(out=Path(sys.argv[1]), workers=2))
"""


def test_kill_9_in_mid_run_loses_no_finished_record(tmp_path: Path) -> None:
    text = (HEAD + ROWS).replace("steps = 5", "steps = 150")
    script, config = tmp_path / "killed.py", tmp_path / "config.toml"
    script.write_text(KILLED)
    config.write_text(text)
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen(
        [sys.executable, str(script), str(out), str(config)],
        env=environment,
        start_new_session=True,
    )
    folder, deadline = out / "small" / "records", time.monotonic() + 120
    while time.monotonic() < deadline and len(list(folder.glob("[!.]*.parquet"))) < 4:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)
    held = {n: t for n, t in records(out).items() if not n.startswith(".")}
    assert len(held) >= 4
    _, ticks = go(out, text)
    after = records(out)
    assert len(after) > len(held)
    assert {name: after[name] for name in held} == held  # not computed a second time
    assert ticks[-1].done == ticks[-1].total
    go(tmp_path / "undisturbed", text)
    pd.testing.assert_frame_equal(table(out), table(tmp_path / "undisturbed"))


def stranger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: str, attacks: str = ""
) -> list[Verdict]:
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    acme.install(plugins, monkeypatch)
    return go(tmp_path / "out", HEAD + attacks + rows + ROWS)[0]


@pytest.mark.parametrize(
    ("trick", "message"),
    [
        ("nan", "not finite for 10 of 10 clean inputs"),
        ("shape", r"shape \(10, 3\)"),
        ("build", "no such cell"),
        ("die", "exited with code 7"),
    ],
)
def test_a_failing_model_fails_its_row_alone(
    trick: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = f'[[defenses]]\nid = "Bad"\ndefense = "acme"\nparameters = {{ trick = "{trick}" }}\n'
    verdicts = {v.id: v for v in stranger(tmp_path, monkeypatch, row)}
    bad = verdicts["Bad"]
    assert bad.status == "failed"
    assert bad.robust_acc is None
    assert re.search(message, bad.note), bad.note
    assert verdicts["Plain"].status == verdicts["Equilibrium"].status == "ok"
    frame = pd.read_csv(tmp_path / "out" / "small" / "table.csv").set_index("id")
    assert pd.isna(frame.loc["Bad", "rank"])
    assert pd.isna(frame.loc["Bad", "robust_acc"])
    assert "Bad" in (tmp_path / "out" / "small" / "table.md").read_text()


@pytest.mark.parametrize(("how", "message"), [("raise", "out of ideas"), ("die", "code 3")])
def test_a_failing_attack_is_never_counted_as_robustness(
    how: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = f'[[attacks]]\nattack = "crash"\nparameters = {{ how = "{how}" }}\n'
    verdicts = stranger(tmp_path, monkeypatch, "", attack)
    assert [v.status for v in verdicts] == ["failed", "failed"]
    assert all(v.robust_acc is None and message in v.note for v in verdicts)
    again, _ = go(tmp_path / "out", HEAD + attack + ROWS)  # failures are not cached
    assert [v.status for v in again] == ["failed", "failed"]
    fixed, _ = go(tmp_path / "out")
    assert [v.status for v in fixed] == ["ok", "ok"]


def test_a_cheating_attack_lowers_nothing_and_the_row_is_not_ranked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, _ = go(tmp_path / "honest")
    verdicts = stranger(tmp_path, monkeypatch, "", '[[attacks]]\nattack = "cheat"\n')
    assert [v.robust_acc for v in verdicts] == [v.robust_acc for v in honest]
    assert all(any(f.startswith("outside_ball:cheat") for f in v.flags) for v in verdicts)
    assert pd.read_csv(tmp_path / "out" / "small" / "table.csv")["rank"].isna().all()


def test_corrupt_weights_fail_their_row_with_both_digests(tmp_path: Path) -> None:
    row = ROWS.replace(
        'weights = "digits-deq-clean.safetensors"',
        'weights = "digits-deq-clean.safetensors"\nsha256 = "' + "0" * 64 + '"',
    )
    verdicts = {v.id: v for v in go(tmp_path, HEAD + row)[0]}
    assert "000000000000..." in verdicts["Equilibrium"].note
    assert verdicts["Plain"].status == "ok"


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    row = ROWS.replace("gain = 0.8", "gain = 0.7")
    verdicts = {v.id: v for v in go(tmp_path, HEAD + row)[0]}
    assert "parameters" in verdicts["Equilibrium"].note
    assert verdicts["Plain"].status == "ok"
