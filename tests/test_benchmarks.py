"""The arithmetic of the benchmarks' tables, on measurements made up here; no attack runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import pytest
import torch
from reports import Row, made_run
from robustdeq.attacks.autoattack import AutoAttack

import robustdeq
from robustdeq.datasets import load_slice
from robustdeq.errors import UsageError
from robustdeq.threats import Threat

SCRIPTS = Path(__file__).resolve().parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not SCRIPTS.is_dir(), reason="needs the checkout, not the wheel")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scripts import one another by name, and leave nothing behind."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(SCRIPTS)
    yield
    for name in set(sys.modules) - before:
        if (SCRIPTS / f"{name}.py").exists():
            del sys.modules[name]


def line(way: str, seed: int, begin: int, robust: list[int], scale: float = 1.0) -> dict[str, Any]:
    return {
        "way": way, "seed": seed, "begin": begin, "robust": robust, "notes": [],
        "seconds": 10 * scale, "forward": int(600 * scale), "backward": int(200 * scale),
    }  # fmt: skip


@pytest.fixture
def blocks() -> list[dict[str, Any]]:
    """Two blocks of three images each; the second block of the reference was measured first."""
    return [
        line("reference", 0, 3, [0, 1, 0], 4),
        line("reference", 0, 0, [1, 1, 0], 4),
        line("joint", 0, 0, [1, 0, 0]),
        line("joint", 0, 3, [1, 1, 1]),
        line("explicit", 0, 0, [1, 0, 0], 0.5),
        line("explicit", 0, 3, [1, 0, 0], 0.5),
        line("reference", 1, 0, [1, 1, 0], 2),
        line("reference", 1, 3, [0, 0, 0], 2),
    ]


def test_verdicts_are_counted_against_the_reference_of_seed_0(blocks: list[dict[str, Any]]) -> None:
    frame = importlib.import_module("side_by_side").table(blocks, 2).set_index(["way", "seed"])
    assert frame.loc[("joint", 0), ["images", "robust", "missed", "extra"]].tolist() == [6, 4, 2, 1]
    assert frame.loc[("reference", 0), ["missed", "extra"]].tolist() == [0, 0]
    assert frame.loc[("reference", 1), ["robust", "missed", "extra"]].tolist() == [2, 0, 1]
    # The explicit network is another model: its verdicts agree with nothing.
    assert frame.loc[("explicit", 0), ["missed", "extra"]].isna().all()


def test_ratios_are_the_references_cost_over_the_ways(blocks: list[dict[str, Any]]) -> None:
    frame = importlib.import_module("side_by_side").table(blocks, 2).set_index(["way", "seed"])
    assert frame["seconds"].tolist() == [20, 10, 80, 40]
    assert frame["evaluations"].tolist() == [1600, 800, 6400, 3200]
    assert frame["time_ratio"].tolist() == [4, 8, 1, 2]
    assert frame["evaluations_ratio"].tolist() == [4, 8, 1, 2]
    # Seconds per image that stands: 5 for joint, also 5 for explicit.
    assert frame["explicit_multiple"].tolist() == pytest.approx([1, 1, 80 / 3 / 5, 40 / 2 / 5])


def test_the_figure_compares_joint_and_other_seeds(blocks: list[dict[str, Any]]) -> None:
    script = importlib.import_module("side_by_side")
    frame = script.table(blocks, 2)
    differing = script.disagreements(frame).set_index(["who", "verdict"])["images"]
    assert differing.to_dict() == {
        ("joint, seed 0", "missed"): 2, ("joint, seed 0", "extra"): 1,
        ("reference, seed 1", "missed"): 0, ("reference, seed 1", "extra"): 1,
    }  # fmt: skip
    given = argparse.Namespace(
        data="digits", eps="Linf:3/16", cell="small", images=6, seeds=2, device="cpu"
    )
    about = script.caption(frame, given)
    assert "n = 6, of which 3 stand" in about


def test_a_run_says_by_what_means_it_was_made(blocks: list[dict[str, Any]]) -> None:
    script = importlib.import_module("side_by_side")
    plain = argparse.Namespace(device="cpu", compile=False, precision="float32")
    quick = argparse.Namespace(device="cuda:0", compile=True, precision="tf32")
    kept = script.summary(script.table(blocks, 2)) | {"data": "d", "row": "R", "threat": "Linf:1"}
    places = []
    for given in (plain, quick):
        run = kept | {"cell": "small", "device": " ".join(script.means(given))}
        places.append(script._cells(run)[0])
    assert places == ["`R`, d", "`R`, d, GPU, compiled, tf32"]


def test_memory_is_the_largest_of_the_blocks_or_unknown(blocks: list[dict[str, Any]]) -> None:
    script = importlib.import_module("side_by_side")
    assert script.table(blocks, 2)["memory_share"].isna().all()
    sizes = [8.0, 6.0, 2.0, 4.0, 1.0, 1.0, 8.0, 8.0]
    told = [made | {"peak_mib": mib} for made, mib in zip(blocks, sizes, strict=True)]
    shares = script.table(told, 2).set_index(["way", "seed"])["memory_share"]
    assert shares["joint", 0] == 0.5
    assert shares["reference", 0] == 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc")
def test_peaks_are_those_of_the_work_alone() -> None:
    peak = importlib.import_module("_memory").peak
    cpu = torch.device("cpu")
    for mib in (64, 16):  # the second must not show what the first took
        found, size = peak(lambda n=mib: len(bytearray(b"x") * (n * 2**20)), cpu)
        assert size == mib * 2**20
        assert abs(found - mib) < 4


def test_a_ledger_gives_back_what_was_kept(tmp_path: Path) -> None:
    script = importlib.import_module("side_by_side")
    ledger = tmp_path / "new" / "ledger.jsonl"
    assert script.held(ledger) == []
    lines = [line("joint", 0, 0, [1]), line("reference", 0, 0, [0])]
    for made in lines:
        script.keep(made, ledger)
    assert script.held(ledger) == lines


def measured(script: Any, way: str, repeat: int, robust: list[int], cost: float) -> dict[str, Any]:
    held = {"point": asdict(script.MIDDLE), "repeat": repeat, "units": 96, "steps": 9.5}
    return line(way, 0, 0, robust, cost) | held


def test_scaling_costs_are_per_sample_that_stands_against_both_ways() -> None:
    script = importlib.import_module("scaling")
    lines = [
        measured(script, "joint", 0, [1, 1, 1, 0], 1),
        measured(script, "reference", 0, [1, 1, 0, 1], 6),
        measured(script, "joint", 1, [1, 1, 1, 0], 0.5),  # the same, in less time
        measured(script, "reference", 1, [1, 1, 0, 1], 8),
    ]
    frame = script.table(lines, {"stiffness": [script.MIDDLE]}).set_index("way")
    assert frame["value"].tolist() == [9.5, 9.5]
    assert frame["robust"].tolist() == [3, 3]
    assert frame["robust_to_both"].tolist() == [2, 2]
    assert frame["seconds"].to_dict() == {"joint": 2.5, "reference": 30}
    assert frame["evaluations"].to_dict() == {"joint": 300, "reference": 1800}
    assert frame["products"].to_dict() == {"joint": 100, "reference": 600}
    assert frame["time_ratio"].to_dict() == {"joint": 12, "reference": 1}
    assert frame["work_ratio"].to_dict() == {"joint": 6, "reference": 1}


def test_scaling_has_no_cost_per_sample_where_none_stands() -> None:
    script = importlib.import_module("scaling")
    lines = [measured(script, way, 0, [0, 0], 2) for way in script.WAYS]
    frame = script.table(lines, {"samples": [script.MIDDLE]})
    assert frame[["seconds", "evaluations", "products"]].isna().all(axis=None)
    assert frame["time_ratio"].tolist() == [1, 1]


def test_scaling_measures_each_point_once_though_axes_share_it() -> None:
    script = importlib.import_module("scaling")
    middle, other = script.MIDDLE, replace(script.MIDDLE, gain=1.6)
    jobs = list(script.jobs({"samples": [middle], "stiffness": [middle, other]}, 2))
    assert len(jobs) == len(set(jobs)) == 8
    assert [way for _, way, _ in jobs] == ["joint", "reference"] * 4


def test_a_larger_state_is_the_same_function() -> None:
    script = importlib.import_module("scaling")
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = robustdeq.load_model("Madry2018Towards_deq", "digits")
    large = script.enlarged(model, 3)
    with torch.no_grad():
        small, wide = script.described(model, x), script.described(large, x)
        torch.testing.assert_close(large(x), model(x), atol=1e-4, rtol=1e-4)
    assert (small["units"], wide["units"]) == (96, 288)
    assert wide["steps"] == pytest.approx(small["steps"], abs=0.5)


def test_only_whole_runs_of_committed_code_are_published(tmp_path: Path) -> None:
    script = importlib.import_module("publish")
    publish, boards = script.published, tmp_path / "boards"
    run = made_run(tmp_path / "a", [Row("One"), Row("Two", broken=(0, 0, 0, 0))])
    boards.mkdir()
    with pytest.raises(UsageError, match="no suite of"):
        publish(run, boards)
    (boards / "made.toml").touch()
    with pytest.raises(UsageError, match="never committed"):
        publish(run, boards)
    run.data["git"] = {"commit": "c", "dirty": False}
    folder = publish(run, boards)
    assert {p.name for p in folder.iterdir()} >= {
        "table.csv", "table.md", "run.json", "index.html", "clean-and-robust-digits-linf-3-16.svg",
    }  # fmt: skip
    frame = pd.read_csv(folder / "table.csv")
    text = "before\n<!-- leaderboard: made -->\nold\n<!-- end -->\nafter\n"
    shown = script.filled(text, {"made": frame})
    assert "| 1 | `Two` | 100.00 | 100.00 | 100.00 |" in shown
    assert "`One` | 100.00 | 70.00 | 50.00 | 23.66 to 76.34 |" in shown
    assert "old" not in shown
    half = made_run(tmp_path / "b", [Row("One"), Row("Half", attacked=2)])
    half.data["git"] = {"commit": "c", "dirty": False}
    with pytest.raises(UsageError, match="lacks Half"):
        publish(half, boards)


def test_readme_shows_the_published_tables() -> None:
    script = importlib.import_module("publish")
    text = script.README.read_text()
    assert script.filled(text, script.held()) == text


def test_a_profile_accounts_for_every_evaluation() -> None:
    script = importlib.import_module("joint_profile")
    model = robustdeq.load_model("Madry2018Towards_deq", "digits")
    part = load_slice("digits", "test", 1)
    x, y = torch.from_numpy(part.images).float() / 255, torch.from_numpy(part.labels)
    attack = AutoAttack(engine="joint")
    with patch("robustdeq.attacks.autoattack.Screen", script.Profiled):
        whole = script.measured(model, model, attack, x, y, 0, Threat.parse("Linf:1/16"))
    parts = script.Profiled.parts
    assert {"apgd-ce", "apgd-t", "fab-t", "square", "apgd-ce, second run"} <= set(parts)
    for count in ("seconds", "forward", "backward"):
        told = sum(part[count] for part in parts.values())
        assert 0.5 * whole[count] < told <= whole[count]
    # 100 steps of at least one product.
    assert parts["apgd-ce"]["backward"] >= 100


def test_shares_of_a_profile_stand_in_its_page() -> None:
    script = importlib.import_module("joint_profile")
    lines = [
        ("joint", "square", 1.0, 0.5),
        ("joint", "all", 2.0, 1.0),
        ("reference", "all", 8.0, 6.0),
    ]
    frame = pd.DataFrame(
        [
            {"data": "digits", "row": "R", "cell": cell, "way": way, "part": part,
             "share_of_reference": seconds / 8, "bare_share": bare / seconds}
            for cell in ("small", "wide") for way, part, seconds, bare in lines
        ]
    )  # fmt: skip
    text = script.filled(f"above\n{script.MARKS[0]}old\n{script.MARKS[1]}\nbelow\n", frame)
    assert "| R, digits, small | R, digits, wide |" in text
    assert "| joint: square | 12.5 % (50 %) | 12.5 % (50 %) |" in text
    assert "| reference | 100.0 % (75 %) | 100.0 % (75 %) |" in text
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "old" not in text
    assert script.filled(text, frame) == text
