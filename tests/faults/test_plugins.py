"""Plugins that exit, hang, fork, flood, patch: their own cell fails, and nothing else changes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from faulty import WHOLE, keys, records, run, start, trick

from robustdeq.verdict import OUT_OF_MEMORY, Verdict


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which the plugin does nothing."""
    out = tmp_path_factory.mktemp("honest")
    run(out, trick("nothing"))
    return out


def failed(verdicts: dict[str, Verdict], words: str) -> None:
    for verdict in verdicts.values():
        assert verdict.status == "failed"
        assert words in verdict.note, verdict.note
        assert verdict.robust_acc is None
    assert len(verdicts) == 2


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("exit", "exited with code 3"),
        ("sys.exit", "SystemExit: enough"),
        ("abort", "ended by SIGABRT"),
        ("patch", "has replaced torch.Tensor.argmax"),
        ("weights", "has changed the weights"),
        ("class", ".__call__ of the model"),
    ],
)
def test_a_stage_that_fails_fails_alone(how: str, words: str, tmp_path: Path) -> None:
    failed(run(tmp_path, trick(how)), words)
    # Everything else of the same chunks was computed: 2 rows of 2 chunks.
    labels = [record.meta.label for record in records(tmp_path).values()]
    assert {label: labels.count(label) for label in labels} == {
        "clean": 4,
        "checks": 2,
        "pgd": 4,
        "square": 4,
        "traces": 2,
    }


@pytest.mark.parametrize("how", ["hang", "spin"])
def test_a_hang_is_a_failure_of_its_cell(how: str, tmp_path: Path) -> None:
    verdicts = run(tmp_path, trick(how), timeout=8.0)
    failed(verdicts, "it took longer than --timeout 8 s")
    assert sum(r.meta.label == "square" for r in records(tmp_path).values()) == 4


def test_what_a_plugin_has_started_ends_with_it(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    run(tmp_path, trick("orphan", note=str(note)), timeout=8.0)
    pid, deadline = int(note.read_text()), time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and _state(pid) != "Z":
        assert time.monotonic() < deadline, "the plugin's process lives on"
        time.sleep(0.1)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@pytest.mark.parametrize("how", ["fork", "settings", "hook"])
def test_what_a_plugin_leaves_behind_moves_no_record(
    how: str, tmp_path: Path, honest: Path
) -> None:
    verdicts = run(tmp_path, trick(how))
    assert {v.status for v in verdicts.values()} == {"ok"}
    assert found(tmp_path) == found(honest)
    assert len(keys(tmp_path)) == len(keys(honest))


def found(out: Path) -> dict[tuple[str, int, str], list[object]]:
    """What the judge said after each attack; the keys differ with the plugin's parameters."""
    return {
        (r.meta.case["id"], r.meta.chunk, r.meta.label): r.rows["adversarial_correct"].tolist()
        for r in records(out).values()
        if r.meta.kind == "attack"
    }


def test_a_flood_of_output_is_cut_off(tmp_path: Path) -> None:
    size = 1024 if WHOLE else 20  # MiB
    process = start(tmp_path / "out", tmp_path, trick("flood", size=size))
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert "prints from here on is dropped" in text
    # 64 KiB for each of the 4 chunks.
    assert len(text) < 5 * 2**16
    assert sum("Trick" in r.meta.label for r in records(tmp_path / "out").values()) == 4


def test_what_is_not_finite_is_a_violation_and_no_robustness(tmp_path: Path) -> None:
    for verdict in run(tmp_path, trick("nan")).values():
        assert any(flag.startswith("nonfinite:file:Trick") for flag in verdict.flags)


def test_out_of_memory_halves_the_batch_and_is_recorded(tmp_path: Path) -> None:
    verdicts = run(tmp_path, trick("memory", size=3))
    assert {v.status for v in verdicts.values()} == {"ok"}
    notes = [r.meta.notes for r in records(tmp_path).values() if "Trick" in r.meta.label]
    assert len(notes) == 4
    for note in notes:
        assert note == (
            f"{OUT_OF_MEMORY} at 10 rows a pass, went on with 5",
            f"{OUT_OF_MEMORY} at 5 rows a pass, went on with 3",
        )
    assert not any("left_out" in flag for v in verdicts.values() for flag in v.flags)


def test_out_of_memory_at_one_row_is_a_failure(tmp_path: Path) -> None:
    failed(run(tmp_path, trick("memory", size=0)), "out of memory")
