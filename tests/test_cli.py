"""The command line as a user meets it: words, exit codes, one sentence per error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import acme
import pandas as pd
import pytest
from terminal import command as run

from robustdeq import cli
from robustdeq.datasets import DATA_VARIABLE
from robustdeq.errors import UsageError

SUITE = """
name = "tiny"
threats = ["Linf:1/16"]
[[datasets]]
name = "digits"
samples = 6
[[attacks]]
attack = "pgd"
parameters = { steps = 3 }
[[defenses]]
id = "Plain"
defense = "feedforward"
parameters = { width = 96, inner = 96 }
weights = "digits-feedforward-clean.safetensors"
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(SUITE)
    return path


def test_run_then_report(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, text, _ = run(
        ["run", str(tiny), "--out", str(out), "--samples", "5"], monkeypatch, capsys
    )
    assert code == 0
    assert "Plain on digits (5 samples)" in text
    code, text, _ = run(["report", str(out), "--format", "csv"], monkeypatch, capsys)
    assert code == 0
    assert text == (out / "tiny" / "table.csv").read_text()
    code, text, _ = run(["report", str(out / "tiny")], monkeypatch, capsys)
    assert text == (out / "tiny" / "table.md").read_text()


def test_estimate_computes_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, text, _ = run(["run", str(tiny), "--out", str(out), "--estimate"], monkeypatch, capsys)
    assert code == 0
    assert "Plain" in text
    assert "seconds" in text
    assert not out.exists()


@pytest.mark.parametrize("kind", ["defenses", "attacks", "recipes", "suites", "datasets"])
def test_list_as_json(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, _ = run(["list", kind, "--json"], monkeypatch, capsys)
    rows = json.loads(text)
    assert code == 0
    assert {"deq", "pgd", "pgd_at", "digits", "mnist"} & {row["name"] for row in rows}
    code, text, _ = run(["list", kind], monkeypatch, capsys)
    assert code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "digist"], "did you mean 'digits'"),
        (["run", "nowhere/x.toml"], "does not exist"),
        (["run", "digits", "--samples", "0"], "--samples is 0"),
        (["run", "digits", "--samples", "100000"], "holds 500"),
        (["run", "digits", "--battery", "standart"], "did you mean 'standard'"),
        (["run", "digits", "--device", "cuda:9"], "not available"),
        (["run", "digits", "--workers", "0"], "--workers is 0"),
        (["run", "digits", "--batch-size", "0"], "--batch-size is 0"),
        (["list", "defences"], "did you mean 'defenses'"),
        (["report", "nothing-here"], "holds no run"),
        (["train", "deqq", "--out", "x.safetensors"], "did you mean 'deq'"),
        (["train", "deq", "--out", "x.pt"], "another kind"),
        (["train", "deq", "--out", "x.safetensors", "--threat", "Linf:-1"], "negative"),
        (["train", "deq", "--out", "x.safetensors", "--dataset", "digitz"], "did you mean"),
        (["train", "deq", "--out", "x.safetensors", "--recipe", "trade"], "did you mean"),
        (["train", "deq", "--out", "x.safetensors", "--set", "wdth=3"], "did you mean 'width'"),
        (["train", "deq", "--out", "x.safetensors", "--set", "width"], "KEY=VALUE"),
        (["train", "deq", "--minutes", "0"], "more than 0"),
        (["train"], "name either"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(arguments, monkeypatch, capsys)
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_missing_data_is_exit_code_2_and_says_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    code, _, err = run(["run", "mnist", "--out", str(tmp_path / "out")], monkeypatch, capsys)
    assert code == 2
    assert str(tmp_path) in err
    assert DATA_VARIABLE in err
    assert err.count("\n") == 1


def test_a_failing_row_is_exit_code_1_and_keeps_the_others(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plugins").mkdir()
    acme.install(tmp_path / "plugins", monkeypatch)
    bad = '[[defenses]]\nid = "Bad"\ndefense = "acme"\nparameters = { trick = "nan" }\n'
    tiny.write_text(SUITE + bad)
    code, _, err = run(["run", str(tiny), "--out", str(tmp_path / "out")], monkeypatch, capsys)
    assert code == 1
    assert "not finite" in err
    frame = pd.read_csv(tmp_path / "out" / "tiny" / "table.csv").set_index("id")
    assert frame.loc["Plain", "status"] == "ok"
    assert frame.loc["Bad", "status"] == "failed"


def test_a_plugin_that_does_not_import_stops_the_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plugins").mkdir()
    acme.install(tmp_path / "plugins", monkeypatch)
    out = tmp_path / "out"
    assert run(["run", str(tiny), "--out", str(out)], monkeypatch, capsys)[0] == 0
    before = (out / "tiny" / "table.csv").read_bytes()
    tiny.write_text(SUITE + '[[defenses]]\nid = "B"\ndefense = "broken"\n')
    code, _, err = run(["run", str(tiny), "--out", str(out)], monkeypatch, capsys)
    assert code == 2
    assert "'broken'" in err
    assert "acme-defenses" in err
    assert "acme_missing_module" in err
    assert (out / "tiny" / "table.csv").read_bytes() == before
    assert run(["list", "defenses"], monkeypatch, capsys)[0] == 1


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["robustdeq", "run", "digist", "--debug"])
    with pytest.raises(UsageError):
        cli.main()


def test_a_folder_that_cannot_be_made(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = run(["run", str(tiny), "--out", str(tmp_path / "file")], monkeypatch, capsys)
    assert code == 2
    assert "cannot be created" in err


def test_report_and_help_import_no_torch(tmp_path: Path) -> None:
    check = (
        "import sys; import robustdeq.reporting.run, robustdeq.reporting.formats;"
        "import robustdeq.records, robustdeq.tables, robustdeq.cli, robustdeq.reporting.merge;"
        "import robustdeq.reporting.compared, robustdeq.reporting.model_info;"
        "import robustdeq.verdict, robustdeq.datasets; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=tmp_path)


def test_a_folder_of_that_name_where_one_stands_is_not_imported(tiny: Path, tmp_path: Path) -> None:
    """As in a checkout, where `robustdeq/` holds the core without the plugins."""
    decoy = tmp_path / "checkout"
    (decoy / "robustdeq").mkdir(parents=True)
    (decoy / "robustdeq" / "__init__.py").write_text("raise ImportError('the wrong one')")
    script = "from robustdeq.cli import main; main()"
    command = [sys.executable, "-P", "-c", script, "run", str(tiny), "--samples", "3"]
    done = subprocess.run(command, cwd=decoy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
