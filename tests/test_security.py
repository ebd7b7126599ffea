"""SECURITY.md tells the truth; folders of bundles and archives; the audit and the licenses."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bundles import plain, rewrite, row_of, whys
from terminal import command

from robustdeq.errors import CaseError, UsageError
from robustdeq.evidence.adopt import submit_bundle
from robustdeq.evidence.bundle import read_bundle, sealed
from robustdeq.evidence.rescoring import Setting
from robustdeq.keys import file_sha256

ROOT = Path(__file__).resolve().parent.parent
checkout = pytest.mark.skipif(
    not (ROOT / "SECURITY.md").is_file(), reason="needs the checkout, not the wheel alone"
)


@checkout
def test_every_promise_names_a_test_that_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    assert len(text.splitlines()) <= 90
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 20
    files = [*(ROOT / "tests").rglob("test_*.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    assert named - {n.name for n in nodes if isinstance(n, ast.FunctionDef)} == set()
    for place in re.findall(r"`((?:tests|benchmarks)/\S+\.py)`", text):
        assert (ROOT / place).is_file()


def test_no_folder_of_a_bundle_is_a_link(run: Path, tmp_path: Path) -> None:
    bundle, outside = run / "bundle", tmp_path / "outside"
    for part in ("examples", "weights"):
        (bundle / part).rename(outside)
        (bundle / part).symlink_to(outside)
        assert "no plain file" in whys(plain(bundle))
        # Writing and pruning there would reach files outside of the run.
        with pytest.raises(CaseError, match="is a link"):
            submit_bundle(run, other(run, tmp_path / part, part), "Ada", setting=Setting())
        (bundle / part).unlink()
        outside.rename(bundle / part)


def other(run: Path, folder: Path, name: str = "Other") -> Path:
    """A bundle with the row Plain alone, under another ID."""
    shutil.copytree(run / "bundle", folder)
    rewrite(folder, lambda row: row["case"].update(id=name))
    data = json.loads((folder / "manifest.json").read_text())
    held = {k: v for k, v in data.items() if k != "sha256"}
    (folder / "manifest.json").write_text(sealed({**held, "rows": held["rows"][:1]}))
    return folder


def test_weights_of_a_bundle_are_kept_under_their_digest(run: Path, tmp_path: Path) -> None:
    """A bundle that calls its weights as an earlier one did does not take their place."""
    bundle = other(run, tmp_path / "other")
    weights = row_of(bundle, "Other").weights
    assert weights is not None
    taken = "taken.safetensors"
    (bundle / "weights" / weights.name).rename(bundle / "weights" / taken)
    rewrite(bundle, lambda row: row["weights"].update(name=taken), "Other")
    (run / "weights").mkdir()
    (run / "weights" / taken).write_bytes(b"of another row")
    assert submit_bundle(run, bundle, "Ada") == ["Other on digits under Linf:0.125"]
    assert (run / "weights" / taken).read_bytes() == b"of another row"
    assert file_sha256(run / "weights" / f"{weights.sha256}.safetensors") == weights.sha256


def test_archives_are_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "bundle.zip"
    with zipfile.ZipFile(archive, "w") as stream:
        stream.writestr("../../evil", "x")
    with pytest.raises(UsageError, match="unpack an archive yourself"):
        read_bundle(archive)
    given = ["submit", archive, "--run", run, "--by", "Ada", "--row", "Plain"]
    code, _, err = command(given, monkeypatch, capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert "unpack an archive yourself" in err


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield {name: importlib.import_module(name) for name in ("audit", "licenses")}
    for name in ("audit", "licenses"):
        sys.modules.pop(name, None)


def report(*entries: dict[str, Any]) -> str:
    return json.dumps({"dependencies": list(entries)})


@checkout
def test_no_answer_is_no_good_answer(scripts: dict[str, ModuleType]) -> None:
    audit = scripts["audit"]
    good = {"name": "a", "version": "1", "vulns": []}
    bad = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
    skipped = {"name": "c", "skip_reason": "not found"}
    assert audit.read(report(good, skipped), "").code == 0
    assert "not know them: c" in audit.read(report(good, skipped), "").lines[0]
    found = audit.read(report(good, bad), "")
    assert found.code == 1
    assert found.lines[0] == "vulnerable: b 2: CVE-1, fixed: 3"
    for out, err in (("", "ConnectionError: x"), (report(skipped), ""), ("[]", ""), ("{", "")):
        told = audit.read(out, err)
        assert told.code == audit.UNREACHABLE
        assert told.lines[0].startswith("could not reach the service")
    assert audit.read("", "/bin/python: No module named pip_audit").code == 2


@checkout
def test_every_dependency_has_its_license(scripts: dict[str, ModuleType]) -> None:
    licenses = scripts["licenses"]
    held = (ROOT / "THIRD_PARTY_LICENSES.md").read_text()
    wanted, known = licenses.dependencies(), licenses.known(held)
    assert len(wanted) > 20
    assert {one.name for one in wanted} == set(known)
    for one in wanted:
        assert f"| `{one.name}` | {one.versions or 'any'} | {one.extra or 'all'} | " in held
    assert "DataTables" in held
    assert all(known.values())
    # Written again without a single distribution installed, nothing is lost.
    licenses.license_of = lambda name: ""
    assert licenses.text(wanted, known) == held
