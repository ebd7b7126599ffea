"""A stranger's distribution, built and installed by pip; and what strangers may say of plugins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import acme
import pandas as pd
import pytest

from robustdeq import cli
from robustdeq.contract import contract_findings
from robustdeq.interfaces import About, about_of
from robustdeq.registry import load
from robustdeq.texts import LONGEST, one_line

SUITE = """
name = "tiny"
threats = ["Linf:1/8"]
[[datasets]]
name = "digits"
samples = 4
[[attacks]]
attack = "ATTACK"
[[defenses]]
id = "Guest"
defense = "DEFENSE"
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("third") / "site"
    folder.mkdir()
    acme.install_wheel(folder)
    return folder


def robustdeq(site: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = "from robustdeq.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-P", "-c", script, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_pip_leaves_a_module_and_its_entry_points(site: Path) -> None:
    held = {path.name for path in site.iterdir()}
    assert "acme_deq.py" in held
    assert "test_acme_deq.py" not in held
    (info,) = site.glob("*.dist-info")
    assert "acme_deq = acme_deq:AcmeDEQ" in (info / "entry_points.txt").read_text()


def test_its_plugins_are_listed_beside_the_built_in_ones(site: Path, tmp_path: Path) -> None:
    done = robustdeq(site, tmp_path, "list", "defenses", "--json")
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert done.returncode == 0
    assert rows["acme_deq"]["from"] == "acme-deq 2.1"
    assert rows["acme_deq"]["about"] == "Acme's contraction"
    assert rows["acme_deq"]["parameters"] == {"slope": 0.5}
    assert "deq" in rows


def test_its_own_tests_pass(site: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull,
         "--rootdir", str(acme.SOURCE), str(acme.SOURCE / "test_acme_deq.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_they_pass_the_check(site: Path, tmp_path: Path) -> None:
    done = robustdeq(site, tmp_path, "check", "acme_corners")
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("Corners passes.\n")
    done = robustdeq(site, tmp_path, "check", "acme_deq", "--minutes", "0.02")
    assert done.returncode == 0, done.stdout
    assert "passed  finite_differences" in done.stdout


def test_they_run_and_stand_in_the_table(site: Path, tmp_path: Path) -> None:
    suite = SUITE.replace("ATTACK", "acme_corners").replace("DEFENSE", "acme_deq")
    (tmp_path / "tiny.toml").write_text(suite)
    done = robustdeq(site, tmp_path, "run", "tiny.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "out" / "tiny"
    table = pd.read_csv(folder / "table.csv").set_index("id")
    assert table.loc["Guest", "defense"] == "acme_deq"
    assert table.loc["Guest", "status"] == "ok"
    assert "| Guest | acme\\_deq |" in (folder / "table.md").read_text()
    (row,) = json.loads((folder / "run.json").read_text())["rows"]
    assert row["plugin"] == "acme-deq 2.1"
    assert row["about"]["authors"] == "Acme"
    assert row["expected"] == {"0": ["acme_corners"]}


HOSTILE = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from torch import nn
from robustdeq.interfaces import About

class Silent:
    def __str__(self):
        raise RuntimeError("no words")
    __repr__ = __str__

class Net(nn.Module):
    def __init__(self, data):
        super().__init__()
        self.last = nn.Linear(data.channels * data.height * data.width, data.classes)
    def forward(self, x):
        return self.last(x.flatten(1))

@dataclass(frozen=True, kw_only=True)
class Mine:
    about: ClassVar = ABOUT
    recipe: ClassVar[str] = "clean"
    note: str = "\\x1b[2J<script>"

    def build(self, data, device):
        return Net(data).to(device)
"""
ABOUTS = {
    "script": "About('<script>alert(1)</script>', authors='[bold]A[/bold]')",
    "latex": r"About('\\input{x} $&%#_^~{}', link='javascript:alert(1)')",
    "lines": r"About('two\nlines\r\n\tand \x00\x1b[31mred\x1b[0m \u202eback\ud800')",
    "long": "About('x' * 10_000, claimed='| a | b |' * 2000)",
    "numbers": "About(3, authors=['a', 'b'], venue={'x': object()}, link=b'bytes')",
    "silent": "About(Silent(), authors=torch.zeros(3))",
    "none": "None",
    "text": "'just text'",
    "another": "type('X', (), {'title': 7})()",
    "empty": "About('')",
}
INERT = {"script", "latex"}
"""Those that break no rule: they are plain text, however they look."""


@pytest.mark.parametrize("name", list(ABOUTS))
def test_whatever_a_plugin_says_of_itself_list_and_contract_stand(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _install_hostile(tmp_path, name, monkeypatch)
    for form in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["robustdeq", "list", "defenses", *form])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out = capsys.readouterr().out
        assert not caught.value.code
        assert _is_plain(out)
        assert len(out) < 40_000
    (row,) = (row for row in json.loads(out) if row["name"] == "hostile")
    assert all(_is_plain(value) for key, value in row.items() if key != "parameters")
    defense = load("defense", "hostile", {})
    findings = {finding.name: finding for finding in contract_findings(defense)}
    assert (findings["about"].outcome == "passed") == (name in INERT)
    assert all(_is_plain(str(finding)) for finding in findings.values())


@pytest.mark.parametrize("name", ["script", "lines", "long", "silent", "none"])
def test_whatever_a_plugin_says_of_itself_a_run_stands(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "site").mkdir()
    _install_hostile(tmp_path / "site", name, monkeypatch)
    suite = SUITE.replace("DEFENSE", "hostile").replace('"ATTACK"', '"pgd"\nparameters.steps = 1')
    (tmp_path / "tiny.toml").write_text(suite)
    command = ["robustdeq", "run", str(tmp_path / "tiny.toml"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code, capsys.readouterr().err
    folder = tmp_path / "tiny"
    (row,) = json.loads((folder / "run.json").read_text())["rows"]
    assert set(row["about"]) <= {"title", "authors", "claimed"}
    assert all(_is_plain(text) and len(text) <= LONGEST for text in row["about"].values())
    assert list(pd.read_csv(folder / "table.csv")["id"]) == ["Guest"]
    (line,) = [li for li in (folder / "table.md").read_text().splitlines() if "Guest" in li]
    assert line.count("|") == line.count("\\|") + 15
    for file in ("table.md", "table.csv"):
        assert "<script>" not in (folder / file).read_text()


def test_a_line_of_text_is_cut_and_printable() -> None:
    assert one_line("a\n\t b\x1b[0m") == "a b [0m"
    assert one_line("x" * 30, 10) == "x" * 7 + "..."
    assert one_line("x" * 10, 10) == "x" * 10
    assert one_line(None) == "None"
    assert about_of(object()) == {}
    assert about_of(type("P", (), {"about": About("T", venue=" V ")})) == {
        "title": "T",
        "venue": "V",
    }


def _install_hostile(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = "[robustdeq.defenses]\nhostile = hostile_plugins:Mine\n"
    text = HOSTILE.replace("ABOUT", ABOUTS[name]).replace("Mine:", "Mine:\n    '''D\\x1b[1moc'''")
    acme.register(folder, "hostile-plugins", entry, "hostile_plugins", text)
    acme.use(folder, monkeypatch)
    sys.modules.pop("hostile_plugins", None)


def _is_plain(text: str) -> bool:
    return all(c.isprintable() for c in text.replace("\n", ""))
