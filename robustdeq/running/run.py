"""Runs a suite: cases to records, records to verdicts, verdicts to the files of a run."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import robustdeq
from robustdeq.datasets import Slice, load_slice
from robustdeq.errors import StorageError, UsageError
from robustdeq.evaluation.provenance import core_digest, environment, machine
from robustdeq.evaluation.stages import attack_stages
from robustdeq.evaluation.subject import (
    chunk_count,
    chunk_slice,
    described_case,
    pick_device,
    weights_source,
)
from robustdeq.evidence.bundling import Parts, write_bundle
from robustdeq.evidence.submissions import FILE as SUBMISSIONS
from robustdeq.evidence.submissions import added, settle
from robustdeq.files import make_folder, sweep, write_atomically
from robustdeq.keys import digest
from robustdeq.locks import alone_in
from robustdeq.plugin_files import public_name, reference
from robustdeq.records import Record, Store
from robustdeq.registry import provider
from robustdeq.reporting.formats import write_tables
from robustdeq.reporting.images import KEPT, write_images
from robustdeq.reporting.run import read_index, read_run, write_index
from robustdeq.reporting.sums import TABLES, begin, write_sums
from robustdeq.running.cluster import Cluster
from robustdeq.running.local import Local, default_workers
from robustdeq.running.task import Engine, Message, Plan, Task
from robustdeq.suite import Case, Suite, as_data, attacks_of, expand
from robustdeq.tables import to_csv
from robustdeq.verdict import Evidence, Failure, Verdict, curves_table, judge_evidence


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a suite is run; none of these changes a figure.

    Attributes:
        out: the folder under which `<suite>/` is made.
        device: "auto", "cpu", "cuda", "cuda:1".
        batch_size: most rows in one forward pass; None for whole chunks.
        workers: processes at a time; None for one per core (one on an accelerator).
        weights: a folder that is looked in first for weights.
        timeout: seconds that one stage of one chunk may take; what takes longer has failed.
        cluster: a Ray cluster that computes, in place of this process's own machine.
    """

    out: Path
    device: str = "auto"
    batch_size: int | None = None
    workers: int | None = None
    weights: Path | None = None
    timeout: float | None = None
    cluster: Cluster | None = None


@dataclass(frozen=True)
class Tick:
    """Progress of a run, for a display: stages done of those known, and a row when it is ready.

    Attributes:
        note: what the user must know of the files that the run has found, as that one is damaged.
    """

    done: int
    total: int
    label: str = ""
    verdict: Verdict | None = None
    note: str = ""


@dataclass(eq=False)
class _Row:
    """A case on its way: what its chunks have given so far.

    Attributes:
        keys: of the records of a chunk, by the label of their stage.
        order: the places of a chunk's stages.
    """

    case: Case
    n: int
    chunks: int
    described: dict[str, Any]
    keys: dict[int, dict[str, str]] = field(default_factory=dict)
    order: dict[int, dict[str, int]] = field(default_factory=dict)
    expected: dict[int, tuple[str, ...]] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    open: int = 0
    verdict: Verdict | None = None

    def listed(self, number: int) -> list[str]:
        """The keys of a chunk's records in the order of the suite, in whatever order they came."""
        held, order = self.keys.get(number, {}), self.order.get(number, {})
        return [held[label] for label in sorted(held, key=lambda label: order.get(label, -1))]

    def judged(self, read: Callable[[str], Record]) -> Verdict:
        """The verdict, kept once all chunks are closed."""
        if self.open:
            return judge_evidence(self.evidence(read))
        if self.verdict is None:
            self.verdict = judge_evidence(self.evidence(read))
        return self.verdict

    def evidence(self, read: Callable[[str], Record]) -> Evidence:
        held = (read(key) for number in sorted(self.keys) for key in self.listed(number))
        return Evidence(
            case=self.described,
            chunks=self.chunks,
            expected=self.expected,
            records=tuple(held),
            failures=tuple(self.failures),
        )


def run_suite(
    suite: Suite, options: Options, tick: Callable[[Tick], None] = lambda tick: None
) -> list[Verdict]:
    """Run a suite; what records exist already is not computed again.

    Leaves `<out>/<suite>/` with `records/`, `run.json`, `table.csv` and `table.md`, written anew
    whenever a row is finished, and in the end `bundle/`. What was submitted to an earlier run in
    that folder still counts.

    Raises:
        UsageError: if data are missing, something in the suite or on the machine is not there, or
            another run is at work in the same folder.
        StorageError: if what is computed cannot be written; what was written before is kept.
    """
    if options.batch_size is not None and options.batch_size < 1:
        raise UsageError(f"--batch-size is {options.batch_size}; give at least 1.")
    if options.timeout is not None and not options.timeout > 0:
        raise UsageError(f"--timeout is {options.timeout:g}; give seconds above 0.")
    folder = options.out / suite.name
    make_folder(folder / "records")
    with alone_in(folder), engine_of(options) as engine:
        sweep(folder)
        sweep(folder / "records")
        run = _Running(suite, options, engine, folder, tick)
        run.go()
        run.leave_evidence()
        return run.verdicts


@contextmanager
def engine_of(options: Options) -> Iterator[Engine]:
    """What computes: this machine, or a cluster for as long as it is wanted.

    Raises:
        UsageError: if the device, or the cluster, is not there.
    """
    if options.cluster is None:
        device = pick_device(options.device)
        workers = options.workers or default_workers(device)
        yield Local(device, workers, options.timeout)
        return
    try:
        from robustdeq.running.ray_engine import connected
    except ImportError as cause:
        raise UsageError("Ray is not installed; pip install 'robustdeq[ray]'.") from cause
    with connected(options.cluster, options.device, options.workers, options.timeout) as engine:
        yield engine


class _Running:
    def __init__(
        self,
        suite: Suite,
        options: Options,
        engine: Engine,
        folder: Path,
        tick: Callable[[Tick], None],
    ) -> None:
        self.suite, self.options, self.engine, self.folder = suite, options, engine, folder
        self.device = engine.device
        self.attacks = attacks_of(suite)
        self.late = {stage.label for stage in attack_stages(self.attacks) if stage.phase > 1}
        slices: dict[str, Slice] = {}
        for dataset in suite.datasets:
            slices[dataset.name] = load_slice(dataset.name, "test", dataset.samples or None)
        self.slices = slices
        for words in (*begin(folder), *settle(folder)):
            tick(Tick(0, 0, note=words))
        write_images(folder, {d.spec.name: d.take(slice(KEPT)) for d in slices.values()})
        self.store = Store(folder / "records")
        self.rows = [self._row(case) for case in expand(suite)]
        self.tick, self.done = tick, 0
        self.verdicts: list[Verdict] = []
        # Until a chunk has said which stages apply to it, all are counted.
        self.extra = 1 + (self.suite.curves is not None)
        per_chunk = 1 + self.extra + sum(len(entry.gradients) for entry in self.attacks)
        self.totals = {
            (r, c): per_chunk for r, row in enumerate(self.rows) for c in range(row.chunks)
        }

    def _row(self, case: Case) -> _Row:
        n = len(self.slices[case.dataset.name])
        chunks = chunk_count(n, case.chunk)
        # Where a second phase follows, no row is closed before that has begun.
        held = chunks + bool(self.late)
        return _Row(case, n, chunks, described_case(case, n), open=held)

    def go(self) -> None:
        try:
            for message in self.engine.run(self._tasks()):
                self._take(message)
            for message in self.engine.run(self._second_phase()):
                self._take(message)
        except StorageError:
            raise  # there is nowhere to publish to
        except BaseException:
            self._publish()
            raise
        self._publish()

    def _second_phase(self) -> list[Task]:
        """Tasks of the attacks that consume what the other rows of their group have found."""
        if not self.late:
            return []
        tasks = [
            replace(task, phase=2, others=self._others(task), abandoned=self._failed(task))
            for task in self._tasks()
            if self.late & set(self.rows[task.row].expected.get(task.number, ()))
        ]
        for index, row in enumerate(self.rows):
            row.open += sum(task.row == index for task in tasks) - 1
            if row.open == 0:
                self._close(row)
        return tasks

    def _others(self, task: Task) -> tuple[tuple[str, tuple[str, ...]], ...]:
        own = self.rows[task.row].case
        found = (
            (row.case.entry.id, tuple(row.listed(task.number)))
            for index, row in enumerate(self.rows)
            if index != task.row
            and (row.case.dataset, row.case.threat) == (own.dataset, own.threat)
            and row.case.chunk == own.chunk
        )
        return tuple(sorted(found))  # so that the order of a suite's rows changes nothing

    def _failed(self, task: Task) -> tuple[tuple[str, str], ...]:
        """The stages of a chunk that have left no record."""
        failures = self.rows[task.row].failures
        return tuple((f.label, f.reason) for f in failures if f.chunk == task.number)

    def _tasks(self) -> list[Task]:
        source = weights_source(self.suite, self.options.weights)
        identities = {name: data.identity() for name, data in self.slices.items()}
        return [
            Task(
                row=index,
                number=number,
                case=row.case,
                identity=identities[row.case.dataset.name],
                samples=chunk_slice(self.slices[row.case.dataset.name], number, row.case.chunk),
                attacks=self.attacks,
                source=source,
                records=self.store.folder,
                device=str(self.device),
                batch_size=self.options.batch_size,
                curves=self.suite.curves,
            )
            for index, row in enumerate(self.rows)
            for number in range(row.chunks)
        ]

    def _planned(self, task: Task, plan: Plan) -> None:
        row = self.rows[task.row]
        row.described = dict(plan.case)
        row.about = dict(plan.about)
        row.expected[task.number] = plan.labels
        steps = sorted(plan.steps, key=lambda step: step.phase)
        row.order[task.number] = {step.label: place for place, step in enumerate(steps)}
        self.totals[task.row, task.number] = len(plan.labels) + self.extra + 2 * (task.number == 0)

    def _take(self, message: Message) -> None:
        row, item = self.rows[message.task.row], message.item
        if isinstance(item, Plan):
            self._planned(message.task, item)
            return
        if item.kind in ("computed", "resumed"):
            row.keys.setdefault(message.task.number, {})[item.label] = item.key
            self.done += 1
        elif item.kind == "failed":
            row.failures.append(Failure(item.label, message.task.number, item.reason))
            self.done += 1
        elif item.kind == "finished":
            row.open -= 1
            if row.open == 0:
                self._close(row)
        note = item.reason if item.kind == "damaged" else ""
        self._tell(f"{row.case.entry.id} {item.label}".strip(), note=note)

    def _close(self, row: _Row) -> None:
        verdict = row.judged(self.store.listed)
        self._publish()
        self._tell(row.case.entry.id, verdict)

    def _tell(self, label: str, verdict: Verdict | None = None, note: str = "") -> None:
        total = max(sum(self.totals.values()), self.done)
        self.tick(Tick(self.done, total, label, verdict, note))

    def _publish(self) -> None:
        self.verdicts = [row.judged(self.store.listed) for row in self.rows]
        write_index(self.folder, added(self.folder, self._provenance()))
        self._count_submissions()
        write_tables(self.folder, self.suite.name, self.verdicts)
        self._publish_curves()

    def _count_submissions(self) -> None:
        if (self.folder / SUBMISSIONS).exists():
            self.verdicts = list(read_run(self.folder).verdicts)

    def leave_evidence(self) -> None:
        """The bundle, once all rows are done; submissions are scored anew where sources changed."""
        from robustdeq.evidence.rescoring import Setting
        from robustdeq.evidence.submit import rescore_stale

        parts = Parts(
            shapes={d.spec.name: d.images.shape[1:] for d in self.slices.values()},
            weights=weights_source(self.suite, self.options.weights).folders,
            distributions={
                public_name("defense", e.defense): provider("defense", e.defense).distribution
                for e in self.suite.defenses
            },
        )
        files = {
            public_name("defense", e.defense): e.defense
            for e in self.suite.defenses
            if reference(e.defense) is not None
        }
        setting = Setting(device=str(self.device), data=load_slice, allow_plugins=True, files=files)
        write_bundle(self.folder, read_index(self.folder), self.verdicts, parts)
        if rescore_stale(self.folder, setting=setting):
            self._count_submissions()
        write_sums(self.folder, TABLES)

    def _plugin(self, case: Case) -> str:
        """What provides a row's defense: distribution and version, or file and SHA-256."""
        return str(provider("defense", case.entry.defense))

    def _publish_curves(self) -> None:
        if self.suite.curves is None:
            return
        evidences = [row.evidence(self.store.listed) for row in self.rows]
        table = curves_table(evidences)
        if len(table):
            write_atomically(self.folder / "curves.csv", to_csv(table).encode())

    def _provenance(self) -> dict[str, Any]:
        """`run.json`: what was run, where, and which records make up each row."""
        return {
            "robustdeq": robustdeq.__version__,
            "suite": as_data(self.suite),
            "suite_digest": digest(as_data(self.suite)),
            "seed": self.suite.seed,
            "environment": environment(self.device, torch.float32),
            "machine": machine(self.device),
            "engine": self.engine.described(),
            "core": core_digest(),
            "git": git_state(),
            "rows": [
                {
                    "case": row.described,
                    "about": row.about,
                    "plugin": self._plugin(row.case),
                    "chunks": row.chunks,
                    "expected": {str(k): list(v) for k, v in sorted(row.expected.items())},
                    "records": {str(k): row.listed(k) for k in sorted(row.keys)},
                    "failures": [asdict(f) for f in row.failures],
                }
                for row in self.rows
            ],
        }


def git_state() -> dict[str, Any]:
    """Commit and cleanliness of the checkout that the package runs from, if it is one."""
    folder = Path(robustdeq.__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return {}
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    return done.stdout.strip()
