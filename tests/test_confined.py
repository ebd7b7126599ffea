"""Rows of a stranger's code, scored in a process of their own: what it may use and say."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from bundles import PLUGIN, held_examples, rewrite, row_of, whys, write_plugin
from safetensors.numpy import save_file
from terminal import command

from robustdeq.errors import CaseError, UsageError
from robustdeq.evidence.adopt import adopted
from robustdeq.evidence.confined import Adopted, Limits, confined
from robustdeq.evidence.reattack import reattack
from robustdeq.evidence.rescoring import Setting
from robustdeq.evidence.submit import submit_examples, submitted
from robustdeq.evidence.verify import Finding, Report, RowReport, verify_bundle
from robustdeq.plugin_files import declared

NOISY = "Noisy/../row"
TRUST = Setting(allow_plugins=True, device="cpu")
LIMITS = Limits(minutes=2, memory=4)
BUILD = "        return Net(self.noise).to(device)\n"


def verified(folder: Path, limits: Limits = LIMITS) -> Report:
    return verify_bundle(folder / "bundle", rows="^Noisy", setting=TRUST, limits=limits)


def doing(build: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin's next process finds one whose `build` does this first."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    write_plugin(folder)
    text = PLUGIN.replace(BUILD, "".join(f"        {x}\n" for x in build.split("\n")) + BUILD)
    assert text != PLUGIN
    (folder / "noisy_plugin.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_a_strangers_row_is_scored_in_its_own_process_with_the_same_figures(finished: Path) -> None:
    apart = verified(finished)
    assert apart.ok, whys(apart)
    assert apart == verify_bundle(finished / "bundle", rows="^Noisy", setting=TRUST)


@pytest.mark.parametrize(
    ("build", "limits", "words"),
    [
        ("while True: pass", Limits(minutes=0.15, memory=4), "was ended after 0.15 minutes"),
        ("torch.ones(2**31)", Limits(minutes=2, memory=2), "cannot be scored again"),
        ("import os; os._exit(3)", LIMITS, "exited with code 3, without a report"),
        ("import os; os.kill(os.getpid(), 9)", LIMITS, "was ended by SIGKILL"),
        ("raise SystemExit(0)", LIMITS, "cannot be scored again"),
        ("open('big', 'wb').truncate(2**31)", LIMITS, "File too large"),
        ("raise ValueError('\\x1b[2J')", LIMITS, "ValueError: [2J"),
    ],
)
def test_what_a_plugin_does_to_its_process_is_a_failure_of_its_row(
    build: str,
    limits: Limits,
    words: str,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    doing(build, tmp_path, monkeypatch)
    begun = time.monotonic()
    report = verified(finished, limits)
    assert not report.ok
    assert words in whys(report)
    assert report.rows[0].robust_found is None
    assert time.monotonic() - begun < 60


def test_a_plugin_that_prints_forks_and_patches_torch_changes_nothing_here(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"
    doing(
        "import os, time\n"
        "os.write(1, b'holds' * 2**24); os.write(2, b'x' * 2**24)\n"
        "child = os.fork()\n"
        "if child == 0: time.sleep(999)\n"
        f"open({str(pid)!r}, 'w').write(str(child))\n"
        "torch.Tensor.argmax = None",
        tmp_path,
        monkeypatch,
    )
    report = verified(finished)
    assert "'NoneType' object is not callable" in whys(report)
    assert verify_bundle(finished / "bundle", rows="^Plain").ok
    for _ in range(50):
        if not Path(f"/proc/{pid.read_text()}").exists():
            break
        time.sleep(0.1)
    state = Path(f"/proc/{pid.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_plugin_finds_an_empty_folder_and_no_token(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    doing(
        "import os\nraise ValueError(f'{os.listdir()} {sorted(os.environ)} {os.getcwd()}')",
        tmp_path,
        monkeypatch,
    )
    found = whys(verified(finished))
    assert "ValueError: [] ['HF_HOME', 'HF_HUB_OFFLINE', 'HOME'" in found
    assert "TOKEN" not in found
    assert "AWS" not in found
    assert str(Path.cwd()) not in found


def test_built_in_rows_run_no_code_of_the_bundle(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python, entry points with the names of built-in defenses and a start-up file lie in it."""
    bundle, trap = tmp_path / "bundle", tmp_path / "ran"
    shutil.copytree(finished / "bundle", bundle)
    code = f"open({str(trap)!r}, 'w')\n"
    for folder in (bundle, bundle / "weights", bundle / "examples"):
        for name in ("torch", "robustdeq", "sitecustomize", "feedforward", "conftest"):
            (folder / f"{name}.py").write_text(code)
        info = folder / "evil-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
        entry = "[robustdeq.defenses]\nfeedforward = feedforward:X\n"
        (info / "entry_points.txt").write_text(entry)
    monkeypatch.chdir(bundle)
    report = verify_bundle(Path(), rows="^(Plain|Equi)", limits=LIMITS)
    assert report.ok, whys(report)
    assert not trap.exists()
    # Nor does metadata that names a file lead there.
    rewrite(bundle, lambda row: row["case"].update(defense=f"{bundle}/feedforward.py:X"))
    with pytest.raises(UsageError, match="is not installed"):
        verify_bundle(bundle, rows="^Plain")
    assert not trap.exists()


def test_a_file_is_not_run_to_learn_what_it_declares(tmp_path: Path) -> None:
    file, trap = tmp_path / "mine.py", tmp_path / "ran"
    file.write_text(f"open({str(trap)!r}, 'w')\nclass A: pass\nclass B: pass\n")
    assert declared(str(file)) == {"file:A": f"{file}:A", "file:B": f"{file}:B"}
    assert declared(f"{file}:B") == {"file:B": f"{file}:B"}
    assert not trap.exists()
    with pytest.raises(UsageError, match="did you mean 'B'"):
        declared(f"{file}:BB")
    file.write_text("class")
    with pytest.raises(UsageError, match="is no Python"):
        declared(str(file))


def test_survivors_and_submissions_of_such_rows_are_scored_there_too(
    finished: Path, tmp_path: Path
) -> None:
    again = reattack(finished / "bundle", 2, rows="^Noisy", setting=TRUST, limits=LIMITS)
    assert sum(again.attacked.values()) == 2
    assert not again.failures
    runs = [tmp_path / "a", tmp_path / "b"]
    x, index = held_examples(finished / "bundle", NOISY)
    save_file({"x": x, "index": index}, tmp_path / "found.safetensors")
    for run in runs:
        shutil.copytree(finished, run)
    with pytest.raises(CaseError, match="breaks a sample") as there:
        submitted(runs[0], NOISY, tmp_path / "found.safetensors", "A", setting=TRUST, limits=LIMITS)
    with pytest.raises(CaseError, match="breaks a sample") as here:
        submit_examples(runs[1], NOISY, tmp_path / "found.safetensors", "A", setting=TRUST)
    assert str(there.value) == str(here.value)
    with pytest.raises(UsageError, match="is there already"):
        adopted(runs[0], finished / "bundle", "A", rows="^Noisy", setting=TRUST, limits=LIMITS)


@pytest.mark.parametrize(
    "said",
    [
        "[]", "{}", '{"result": null}', '{"result": {"titles": [1]}}', "{", '{"result": {}}',
        '{"result": {"titles": "ab"}}', '{"error": 1}', "[" * 10_000,
    ],
)  # fmt: skip
def test_a_report_that_is_none_is_said(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(folder: Path, limits: Limits) -> int:
        (folder / "said.json").write_text(said)
        return 0

    monkeypatch.setattr("robustdeq.evidence.confined._ended", write)
    with pytest.raises(CaseError, match="a report"):
        confined("adopt", {"setting": TRUST}, Adopted, LIMITS)


def test_reports_come_back_as_they_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    told = RowReport(
        title="a", clean_claimed=0.5, robust_claimed=None, failures=(Finding("a", 3, "b"),)
    )

    def write(folder: Path, limits: Limits) -> int:
        from dataclasses import asdict

        (folder / "said.json").write_text(json.dumps({"result": asdict(told)}))
        return 0

    monkeypatch.setattr("robustdeq.evidence.confined._ended", write)
    assert confined("verify", {"setting": TRUST}, RowReport, LIMITS) == told


def test_the_command_warns_before_it_runs_code(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["verify", finished / "bundle", "--rows", "^Plain", "--device", "cpu"]
    code, _, err = command(given, monkeypatch, capsys)
    assert (code, err) == (0, "")
    code, _, err = command([*given, "--trust-plugins"], monkeypatch, capsys)
    assert code == 0
    assert "not against malice" in err
    code, _, err = command([*given, "--minutes", "0"], monkeypatch, capsys)
    assert (code, "give more than 0" in err) == (2, True)
    assert row_of(finished / "bundle", NOISY).distribution == "noisy"
