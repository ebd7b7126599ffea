"""What the Ray engine costs beside the local one: the same suite, one worker each, in turn.

    python benchmarks/engines.py
    python benchmarks/engines.py --samples 20 --repeats 1

Wall time of `run_suite` into an empty folder, start and end of the cluster included; `start` is
that of a cluster alone, once, since longer runs do not pay it again. The tables must be equal but
for time and memory. Writes results/engines.csv.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import pandas as pd
from _figures import machine

from robustdeq.running.cluster import Cluster
from robustdeq.running.run import Options, engine_of, run_suite
from robustdeq.suite import adjusted, find_suite
from robustdeq.tables import COST_COLUMNS

RESULTS = Path(__file__).resolve().parent / "results"
ENGINES = {"local": None, "ray": Cluster()}


def timed(engine: str, suite: str, samples: int | None, out: Path) -> tuple[float, pd.DataFrame]:
    """Seconds that an engine takes, and the table without costs."""
    chosen = adjusted(find_suite(suite), samples, None)
    options = Options(out=out, device="cpu", workers=1, cluster=ENGINES[engine])
    begun = time.perf_counter()
    run_suite(chosen, options)
    seconds = time.perf_counter() - begun
    table = pd.read_csv(out / chosen.name / "table.csv")
    return seconds, table.drop(columns=list(COST_COLUMNS))


def starting() -> float:
    """Seconds that a cluster takes to start and to end."""
    begun = time.perf_counter()
    with engine_of(Options(out=Path(), device="cpu", workers=1, cluster=ENGINES["ray"])):
        pass
    return time.perf_counter() - begun


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--suite", default="digits")
    parser.add_argument("--samples", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "engines.csv")
    given = parser.parse_args()
    rows, tables = [], []
    for repeat in range(given.repeats):
        for engine in ENGINES:
            with tempfile.TemporaryDirectory() as folder:
                seconds, table = timed(engine, given.suite, given.samples, Path(folder))
            rows.append({"repeat": repeat, "engine": engine, "seconds": round(seconds, 2)})
            tables.append(table)
            print(rows[-1], flush=True)
    for table in tables[1:]:
        pd.testing.assert_frame_equal(tables[0], table)
    wide = pd.DataFrame(rows).pivot_table(index="repeat", columns="engine", values="seconds")
    result = pd.DataFrame(
        {
            "suite": given.suite,
            "samples": given.samples or find_suite(given.suite).datasets[0].samples,
            "repeats": given.repeats,
            "local_seconds": [wide["local"].median()],
            "ray_seconds": [wide["ray"].median()],
            "ratio": [round(float((wide["ray"] / wide["local"]).median()), 3)],
            "start_seconds": [round(starting(), 2)],
            "machine": machine("cpu"),
        }
    )
    result.to_csv(given.out, index=False)
    print(result.to_string(index=False))


if __name__ == "__main__":
    main()
