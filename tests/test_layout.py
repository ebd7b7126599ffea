"""The shape of the repository: import order, the wheel, documents that tell the truth."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "robustdeq"
# Each may import only from groups that stand before its own (or from its own group).
ORDER = [
    ["texts"],
    ["errors", "keys", "shapes", "files", "locks", "bounded", "plain_names", "sealed"],
    ["threats", "records", "datasets", "randomness", "statistics", "arithmetic"],
    ["equilibrium"],
    ["differentiation"],
    ["targets"],
    ["interfaces"],
    ["plugin_files"],
    ["registry"],
    ["suite", "weights", "listing"],
    ["plugin_rows", "conversion"],
    ["verdict", "tables", "comparison", "reporting"],
    ["evaluation", "training", "evidence", "contract"],
    ["running"],
    ["cli"],
]
READS_RECORDS_ALONE = {"verdict", "tables", "comparison", "reporting"}
pytestmark = pytest.mark.skipif(not CORE.is_dir(), reason="needs the checkout, not the wheel alone")


def imported(file: Path) -> set[str]:
    """The parts of robustdeq that a file imports, also inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("robustdeq.")}
    return found


def part_of(file: Path) -> str:
    return file.relative_to(CORE).parts[0].removesuffix(".py")


def test_imports_point_one_way() -> None:
    rank = {name: k for k, group in enumerate(ORDER) for name in group}
    for file in CORE.rglob("*.py"):
        part = part_of(file)
        if part in ("__init__", "zoo"):
            continue
        for other in imported(file) - {part}:
            assert other in rank, f"{file} imports a plugin: {other}"
            allowed = rank[other] <= rank[part]
            assert allowed, f"{file.relative_to(ROOT)} imports {other}, which stands after it"


def test_reports_read_records_alone() -> None:
    for name in READS_RECORDS_ALONE:
        allowed = {
            "records",
            "datasets",
            "bounded",
            "errors",
            "files",
            "keys",
            "texts",
            "sealed",
            "statistics",
        } | READS_RECORDS_ALONE
        files = [CORE / f"{name}.py", *(CORE / name).rglob("*.py")]
        assert set().union(*map(imported, filter(Path.exists, files))) <= allowed


def test_plugins_import_no_machinery() -> None:
    for folder in ("defenses", "attacks"):
        for file in (ROOT / folder).glob("*.py"):
            assert not imported(file) & {"evaluation", "registry", "suite", "cli", "reporting"}


def test_every_subpackage_is_named_and_mapped_folders_are_flat() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {p.parent.relative_to(ROOT) for p in CORE.rglob("__init__.py")}
    expected = {".".join(folder.parts) for folder in folders}
    expected |= {f"robustdeq.{name}" for name in ("defenses", "attacks", "leaderboards")}
    assert set(settings["packages"]) == expected
    for name in ("defenses", "attacks", "leaderboards"):
        folders = [p for p in (ROOT / name).iterdir() if p.is_dir() and p.name != "__pycache__"]
        # Published tables are no package data.
        assert not [p for p in folders if name != "leaderboards" or list(p.rglob("*.py"))]


def test_the_wheel_holds_what_the_folders_hold(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "-q",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the wheel cannot be built here: {done.stderr[-200:]}")
    (wheel,) = tmp_path.glob("*.whl")
    held = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    expected = {p.relative_to(ROOT).as_posix() for p in CORE.rglob("*.py")}
    expected |= {p.relative_to(ROOT).as_posix() for p in CORE.rglob("*.safetensors")}
    expected |= {"robustdeq/py.typed"}
    page = CORE / "reporting" / "page"
    assets = [p for p in page.rglob("*") if p.suffix in (".j2", ".css", ".js", ".txt")]
    assert len(assets) > 5
    expected |= {p.relative_to(ROOT).as_posix() for p in assets}
    for name, pattern in (("defenses", "*.py"), ("attacks", "*.py"), ("leaderboards", "*.*")):
        expected |= {
            f"robustdeq/{name}/{p.name}"
            for p in (ROOT / name).glob(pattern)
            if p.suffix in (".py", ".toml")
        }
    assert held == expected


def test_shipped_weights_are_small_and_named_by_a_suite() -> None:
    texts = "".join(p.read_text() for p in (ROOT / "leaderboards").glob("*.toml"))
    sizes = {p.name: p.stat().st_size for p in (CORE / "zoo").glob("*.safetensors")}
    assert all(name in texts for name in sizes)
    assert max(s for n, s in sizes.items() if n.startswith("digits")) <= 300 * 1024
    assert max(s for n, s in sizes.items() if n.startswith("mnist")) <= 400 * 1024
    assert sum(s for n, s in sizes.items() if n.startswith("digits")) <= 6 * 2**20


def test_the_tables_in_docs_are_those_of_the_records() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "defense_pages.py"))
    frame = pd.read_csv(ROOT / "leaderboards" / "digits-ablations.csv")
    pages = sorted((ROOT / "docs").glob("*.md"))
    assert {"lyadeq", "neural_dynamics", "joint_optimization", "weight_tied", "federated"} <= {
        page.stem for page in pages
    }
    for page in pages:
        text = page.read_text()
        assert script["filled"](text, frame) == text
        assert len(text.splitlines()) <= 90


@pytest.mark.parametrize(
    ("script", "results", "pages"),
    [
        ("claims", "claims", ("lyadeq", "neural_dynamics")),
        ("determinism", "determinism", ("determinism",)),
        ("gradient_cosines", "gradient_cosines", ("gradients",)),
        ("joint_profile", "joint_profile", ("joint_engine_cost",)),
        ("looks", "looks", ("joint_engine_cost",)),
        ("peers", "peers-digits", ("peers",)),
        ("side_by_side", "side_by_side", ("joint_engine",)),
        ("training", "training", ("training",)),
    ],
)
def test_the_tables_in_docs_are_those_of_the_benchmarks(
    script: str, results: str, pages: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    filled = runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"))["filled"]
    frame = pd.read_csv(ROOT / "benchmarks" / "results" / f"{results}.csv")
    for page in pages:
        text = (ROOT / "docs" / f"{page}.md").read_text()
        assert filled(text, frame) == text
        assert filled(text, frame.iloc[:1]) != text


def test_the_ablations_are_what_their_script_writes(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "ablations.py"))
    held = (ROOT / "leaderboards" / "digits-ablations.toml").read_text()
    sha256 = dict(re.findall(r'weights = "([^"]+)"\nsha256 = "([0-9a-f]*)"', held))
    entries = [script["entry"](r, seed, sha256) for r in script["rows"]() for seed in r.seeds]
    assert script["HEAD"] + "".join(entries) == held
    table = pd.read_csv(ROOT / "leaderboards" / "digits-ablations.csv")
    assert len(table) == len(entries)
    weights = dict(re.findall(r'id = "([^"]+)"[^[]*?sha256 = "([0-9a-f]+)"', held))
    assert dict(zip(table["id"], table["weights_sha256"], strict=True)) == weights
    assert (table["status"] == "ok").all()


def test_architecture_names_every_file_and_no_other() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    files = {
        p.name
        for folder in (CORE, ROOT / "defenses", ROOT / "attacks")
        for p in folder.rglob("*.py")
        if p.name != "__init__.py"
    }
    named = set(re.findall(r"`(?:[\w/]+/)?(\w+\.py)`", text))
    assert files - named == set()
    benchmarks = {p.name for p in (ROOT / "benchmarks").glob("*.py")}
    tests = {p.name for p in (ROOT / "tests").glob("*.py")}
    assert named - files - benchmarks - tests == set()


def test_the_page_on_clusters_gives_the_measured_overhead() -> None:
    row = pd.read_csv(ROOT / "benchmarks" / "results" / "engines.csv").iloc[0]
    text = " ".join((ROOT / "docs" / "on_a_cluster.md").read_text().split())
    assert row["suite"] == "digits"
    assert f"took {row['ratio'] - 1:.0%} longer".replace("%", " %") in text
    assert f"{row['samples']} images" in text
    assert row["ratio"] < 1.15
