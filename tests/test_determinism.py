"""The promise of docs/determinism.md: equal records on one machine, and a tolerance across."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from robustdeq.evaluation.provenance import THREADS, machine
from robustdeq.keys import canonical
from robustdeq.records import Record, Store
from robustdeq.tables import COST_COLUMNS

ROOT = Path(__file__).resolve().parent.parent
HEAD = """
name = "promise"
threats = ["Linf:3/16"]
chunk = 4
datasets = [{ name = "digits", samples = 7 }]
attacks = [
  { attack = "apgd", parameters = { steps = 5 } },
  { attack = "square", parameters = { queries = 30 } },
  { attack = "pgd", parameters = { steps = 3 }, gradients = ["unrolled(3)"] },
  { attack = "transfer_rows" },
]
"""
ROWS = (
    """
[[defenses]]
id = "Plain"
defense = "feedforward"
parameters = { width = 96, inner = 96 }
weights = "digits-feedforward-pgd_at.safetensors"
""",
    """
[[defenses]]
id = "Equilibrium"
defense = "deq"
parameters = { width = 96, inner = 96, gain = 0.8 }
weights = "digits-deq-pgd_at.safetensors"
""",
    """
[[defenses]]
id = "Another"
defense = "feedforward"
parameters = { width = 96, inner = 96 }
weights = "digits-feedforward-clean.safetensors"
""",
)
RUN = """
import sys
from pathlib import Path
from robustdeq.running.run import Options, run_suite
from robustdeq.suite import parse_suite

if __name__ == "__main__":
    suite, out, workers = sys.argv[1:]
    options = Options(out=Path(out), workers=int(workers))
    run_suite(parse_suite(Path(suite).read_text(), "promise", None), options)
"""
MEASURED = ("seconds",)
"""The columns of a record that say how long it took."""


def run(folder: Path, name: str, rows: tuple[str, ...], workers: int) -> Path:
    """A run in processes of its own."""
    suite, script, out = folder / f"{name}.toml", folder / "run.py", folder / name
    suite.write_text(HEAD + "".join(rows))
    script.write_text(RUN)
    command = [sys.executable, script, suite, out, str(workers)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    return out / "promise"


def records(run: Path) -> dict[str, Record]:
    store = Store(run / "records")
    found = {path.stem: store.read(path.stem) for path in store.folder.glob("*.parquet")}
    return {key: record for key, record in found.items() if record is not None}


def table(run: Path) -> pd.DataFrame:
    frame = pd.read_csv(run / "table.csv").drop(columns=list(COST_COLUMNS))
    return frame.sort_values("id").reset_index(drop=True)


def bits(record: Record) -> dict[str, list[object]]:
    """Every column but the times, floats by their bits."""
    columns = record.rows.drop(columns=list(MEASURED), errors="ignore")
    return {name: [_bits(value) for value in columns[name]] for name in columns}


def _bits(value: object) -> object:
    return np.float64(value).tobytes() if isinstance(value, float) else value


def test_records_are_equal_to_the_bit(tmp_path: Path) -> None:
    """Fresh processes; one worker or two; the suite's rows in another order; a resumed run."""
    first = run(tmp_path, "first", ROWS, workers=1)
    other = run(tmp_path, "other", ROWS[::-1], workers=2)
    a, b = records(first), records(other)
    # Two chunks of: clean and each attack that fits; once a row: checks and traces.
    assert len(a) == 2 * (4 + 5 + 4) + 2 * 3
    assert set(a) == set(b)
    for key, record in a.items():
        assert bits(record) == bits(b[key]), record.meta.label
    assert any(record.rows["adversarial"].notna().any() for record in a.values() if
               record.meta.kind == "attack")  # fmt: skip
    pd.testing.assert_frame_equal(table(first), table(other))
    for lost in sorted((first / "records").iterdir())[::3]:
        lost.unlink()
    run(tmp_path, "first", ROWS, workers=2)
    for key, record in records(first).items():
        assert bits(record) == bits(b[key]), record.meta.label
    assert len(records(first)) == len(b)


def test_a_run_says_what_bears_on_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    held = machine(torch.device("cpu"))
    assert held["threads"] == THREADS == 1
    assert held["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert held["device_name"]
    assert {
        "platform", "python", "mkl", "onednn", "deterministic_algorithms", "cudnn_deterministic",
        "cudnn_benchmark", "tf32_matmul", "tf32_cudnn", "float32_matmul_precision", "libraries",
    } <= set(held)  # fmt: skip
    assert canonical(held) == held
    flags = {"deterministic_algorithms": True, "cudnn_deterministic": True}
    before = {name: held[name] for name in flags}
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.use_deterministic_algorithms(True)
    try:
        held = machine(torch.device("cpu"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert {name: held[name] for name in flags} == flags != before


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="needs the checkout")
def test_the_kernels_of_another_processor_stay_within_the_tolerance(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As `benchmarks/determinism.py` measures, in small."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    script = runpy.run_path(str(ROOT / "benchmarks" / "determinism.py"))
    frame = pd.read_csv(ROOT / "benchmarks" / "results" / "determinism.csv")
    for held in (frame, small(script, tmp_path)):
        assert (held["logits"] <= script["TOLERANCE"]).all()
        assert (held["margin"] <= 2 * script["TOLERANCE"]).all()
        assert held["inside"].all()
        assert held.loc[held["way"] == "once more", ["logits_equal", "examples_equal"]].all(
            axis=None
        )
    assert not frame["logits_equal"].all()  # another processor is another rounding


def small(script: dict[str, object], folder: Path) -> pd.DataFrame:
    command = [sys.executable, str(script["__file__"]), "--samples", "8"]
    command += ["--out", str(folder / "small.csv"), "--data", "digits"]
    command += ["--ways", "once more|SSE"]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    return pd.read_csv(folder / "small.csv")
