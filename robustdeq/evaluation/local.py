"""The local engine: one process per chunk of a row, as many at a time as there are cores.

A process of its own per chunk keeps library state (AutoAttack's counters, global generators) from
leaking between rows, and a crash of a plugin from taking the run down. Results come back through
the store; the pipe carries only which stage is where.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from robustdeq.datasets import Slice, SliceIdentity
from robustdeq.errors import CaseError, RobustDEQError, sentence
from robustdeq.evaluation.chain import Chain, Event
from robustdeq.evaluation.pools import row_pool
from robustdeq.evaluation.provenance import THREADS
from robustdeq.evaluation.stages import attack_stages
from robustdeq.evaluation.subject import Source, build_subject, chunk_of
from robustdeq.interfaces import Kind, about_of
from robustdeq.records import Record, Store
from robustdeq.registry import BUILT_IN, plugin_class, provider
from robustdeq.suite import AttackEntry, Case, Curves

_SAFE_PATH = "PYTHONSAFEPATH"


@dataclass(frozen=True, eq=False)
class Task:
    """One chunk of one case: all that a worker needs, and it can be pickled.

    Attributes:
        phase: 1, or 2 once all rows have been through phase 1.
        others: for phase 2, the other rows' IDs with the keys of their records of this chunk.
    """

    row: int
    number: int
    case: Case
    identity: SliceIdentity
    samples: Slice
    attacks: tuple[AttackEntry, ...]
    source: Source
    records: Path
    device: str
    batch_size: int | None
    read_only: bool = False
    phase: int = 1
    others: tuple[tuple[str, tuple[str, ...]], ...] = ()
    curves: Curves | None = None


@dataclass(frozen=True)
class Message:
    """An event of a task; `finished` closes the task and `failed` may have an empty label."""

    task: Task
    event: Event


@dataclass(frozen=True)
class Plan:
    """The first thing that a worker sends: which attack stages its chunk will go through.

    Attributes:
        about: what the defense says of itself, as far as it says it: title, authors, claimed, ...
    """

    case: dict[str, object]
    case_key: str
    track: str
    labels: tuple[str, ...]
    about: dict[str, str]


def run_tasks(
    tasks: Iterable[Task], workers: int, on_plan: Callable[[Task, Plan], None]
) -> Iterator[Message]:
    """Run tasks in order, `workers` at a time; yields their events as they come.

    Every task ends with an event "finished" or with one "failed" of an empty label or of the stage
    in which its process died.
    """
    queue = []
    for task in tasks:
        held = held_events(task)
        if held is None:
            queue.append(task)
            continue
        for item in [*held, Event("finished", "")]:
            if isinstance(item, Plan):
                on_plan(task, item)
            else:
                yield Message(task, item)
    yield from _run_queue(queue[::-1], workers, on_plan)


def _run_queue(
    queue: list[Task], workers: int, on_plan: Callable[[Task, Plan], None]
) -> Iterator[Message]:
    context = _context()
    running: dict[Connection, _Worker] = {}
    try:
        while queue or running:
            while queue and len(running) < workers:
                worker = _Worker(queue.pop(), context)
                running[worker.pipe] = worker
            for pipe in wait(list(running)):
                worker = running[pipe]  # type: ignore[index]
                for item in worker.read():
                    if isinstance(item, Plan):
                        on_plan(worker.task, item)
                    else:
                        yield Message(worker.task, item)
                if worker.ended:
                    del running[worker.pipe]
    finally:
        for worker in running.values():
            worker.stop()


def held_events(task: Task) -> list[Event | Plan] | None:
    """The events of a task whose records all exist, without a process; None where one is missing.

    For plugins of this distribution only: a stranger's code never runs in the parent.
    """
    names: list[tuple[Kind, str]] = [("defense", task.case.entry.defense)]
    names += [("attack", entry.attack) for entry in task.attacks]
    if any(provider(kind, name).distribution != BUILT_IN for kind, name in names):
        return None
    try:
        return list(_events(replace(task, read_only=True)))
    except RobustDEQError:
        return None


def _about(task: Task) -> dict[str, str]:
    return about_of(plugin_class("defense", task.case.entry.defense))


class _ReadOnly(Store):
    """A store for looking: what it lacks is not to be computed."""

    def read(self, key: str) -> Record:
        record = super().read(key)
        if record is None:
            raise CaseError(f"record {key} does not exist.")
        return record


def default_workers(device: torch.device) -> int:
    """As many as there are cores that this process may use; one on an accelerator."""
    if device.type != "cpu":
        return 1
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


class _Worker:
    def __init__(self, task: Task, context: mp.context.BaseContext) -> None:
        self.task = task
        self.pipe, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(task, theirs), daemon=True)  # type: ignore[attr-defined]
        self.process.start()
        theirs.close()
        self.stage = ""
        self.ended = False

    def read(self) -> Iterator[Event | Plan]:
        """What has arrived; a pipe that closes without a last word is a crash."""
        try:
            item: Event | Plan = self.pipe.recv()
        except EOFError:
            self.process.join()
            self.ended = True
            yield Event("failed", self.stage, reason=_death(self.process.exitcode))
            return
        if isinstance(item, Event):
            self.stage = item.label if item.kind == "started" else ""
            if item.kind == "finished" or (item.kind == "failed" and not item.label):
                self.process.join()
                self.ended = True
                self.pipe.close()
        yield item

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in list(signal.Signals) else str(-code)
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}"
    return f"its process exited with code {code} before it was done"


def _context() -> mp.context.BaseContext:
    """Workers forked from a server that holds torch but has no threads; spawned elsewhere."""
    if "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["robustdeq.evaluation.local"])
    before = os.environ.get(_SAFE_PATH)
    # The server is started as `python -c`, which would put the current folder first on its path: in
    # a checkout it would then import the core from there, and no plugins.
    os.environ[_SAFE_PATH] = "1"
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ[_SAFE_PATH]
        else:
            os.environ[_SAFE_PATH] = before
    return context


def _work(task: Task, pipe: Connection) -> None:
    """The worker's side: never raises, so that the last word is always sent."""
    # Ctrl-C reaches the whole process group; the parent decides what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(THREADS)
    try:
        for item in _events(task):
            pipe.send(item)
        pipe.send(Event("finished", ""))
    except BaseException as cause:
        pipe.send(Event("failed", "", reason=sentence(cause)))
    finally:
        pipe.close()


def _events(task: Task) -> Iterator[Event | Plan]:
    device = torch.device(task.device)
    subject = build_subject(task.case, task.identity, task.source, device, task.batch_size)
    chunk = chunk_of(task.samples, task.number, device)
    shelf = (_ReadOnly if task.read_only else Store)(task.records)
    pools = [row_pool(name, keys, shelf.read) for name, keys in task.others]
    chain = Chain(subject, chunk, attack_stages(task.attacks), shelf, pools, task.curves)
    planned = task.phase > 1  # what is planned was said in phase 1
    for event in chain.run(task.phase):
        yield event
        if chain.records and not planned:
            planned = True
            track = chain.records[0].meta.track
            labels = tuple(stage.label for stage in chain.planned(track))
            yield Plan(subject.case, subject.case_key, track, labels, _about(task))
