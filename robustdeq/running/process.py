"""A process of its own for one chunk, seen from both of its ends.

It keeps library state (AutoAttack's counters, global generators, patched functions) from leaking
between rows, and a plugin that crashes, hangs, forks or floods its output from hurting more than
its own stage. The pipe carries orders one way and events the other; a chunk whose store is
elsewhere asks for records and hands them over through the same pipe.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import torch

from robustdeq.errors import DamagedError, StorageError, sentence
from robustdeq.evaluation.chain import Chain, Event
from robustdeq.evaluation.provenance import THREADS
from robustdeq.evaluation.stages import CLEAN
from robustdeq.records import Record, Store
from robustdeq.running.output import bounded_output
from robustdeq.running.task import Plan, Task, chain_of, events

_SAFE_PATH = "PYTHONSAFEPATH"
IDLE_SECONDS = 5.0
"""How long a process waits for another order before it ends."""
PATIENCE_SECONDS = 5.0
"""How long a process that is asked to end may finish what it writes."""


@dataclass(frozen=True)
class _Order:
    """What the process is to do next: one stage, or all of the task's phase.

    Attributes:
        environment: variables to set before anything is computed, as the devices to be seen.
    """

    task: Task
    label: str
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class _Ask:
    """The process asks for the record of a key."""

    key: str


@dataclass(frozen=True)
class _Give:
    """The process hands over the record of a key, as the bytes of its file."""

    key: str
    payload: bytes


class Depot(Protocol):
    """Where records are kept, for a process that has no access to the folder itself."""

    def get(self, key: str) -> bytes | None:
        """The bytes of a record's file, or None."""
        ...

    def put(self, key: str, payload: bytes) -> None:
        """Keep a record's file."""
        ...


class ChunkProcess:
    """The parent's end. `read` never blocks for longer than an item is on its way.

    Attributes:
        stage: the one at hand, as the event that said so; an empty one between stages.
        since: when it last said something, on the monotonic clock.
        ended: whether it has died or been ended.
    """

    def __init__(self, depot: Depot | None = None, scratch: Path | None = None) -> None:
        self.depot = depot
        context = _context()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(  # type: ignore[attr-defined]
            target=_work, args=(theirs, scratch), daemon=True
        )
        self.process.start()
        theirs.close()
        self.stage, self.since = Event("", ""), time.monotonic()
        self.ended = False

    def begin(
        self, task: Task, label: str = "", environment: tuple[tuple[str, str], ...] = ()
    ) -> None:
        """Order one stage, or all of the task's phase."""
        self.since = time.monotonic()
        with suppress(OSError):  # a process that has died says so in `read`
            self.pipe.send(_Order(task, label, environment))

    def read(self) -> list[Event | Plan]:
        """What has arrived, at most one item; `ended` is set where the process has died."""
        try:
            item = self.pipe.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            self.process.join()
            self.ended = True
            return []
        if isinstance(item, _Ask | _Give):
            self._serve(item)
            return []
        self.since = time.monotonic()
        if isinstance(item, Event):
            self.stage = item if item.kind == "started" else Event("", "")
        return [item]

    def _serve(self, item: _Ask | _Give) -> None:
        assert self.depot is not None
        if isinstance(item, _Give):
            self.depot.put(item.key, item.payload)
        answer = self.depot.get(item.key) if isinstance(item, _Ask) else True
        with suppress(OSError):
            self.pipe.send(answer)

    def left(self, timeout: float | None) -> float | None:
        """Seconds until the stage at hand is overdue, 0 where it is; None for no limit."""
        return None if timeout is None else max(0.0, timeout + self.since - time.monotonic())

    def overdue(self, timeout: float | None) -> Event:
        """End the process; the failure of the stage that took too long."""
        self.kill()
        return self.lost(f"it took longer than --timeout {timeout:g} s")

    def lost(self, reason: str) -> Event:
        """The failure of the stage at hand."""
        return Event("failed", self.stage.label, self.stage.key, reason)

    def death(self) -> str:
        """Why the process ended, in words."""
        code = self.process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name if -code in list(signal.Signals) else str(-code)
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return f"its process was ended by {name}{hint}"
        return f"its process exited with code {code} before it was done"

    def end_softly(self) -> None:
        """Ask the process to end as soon as it does not write."""
        with suppress(OSError, AttributeError):
            self.process.terminate()

    def hang_up(self) -> None:
        """There is nothing more to do."""
        self.pipe.close()
        self.kill(PATIENCE_SECONDS)

    def kill(self, patience: float = 0.0) -> None:
        """End the process and all that it has started, after so many seconds."""
        self.process.join(patience)
        with suppress(OSError, TypeError):
            # Its group is its own number once it runs; before that there is nobody else in it.
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self.ended = True


def is_fatal(event: Event) -> bool:
    """Whether a chunk cannot go on without the stage: its model or its clean predictions."""
    return event.label in ("", CLEAN.label)


def _context() -> mp.context.BaseContext:
    """Processes forked from a server that holds torch but has no threads; spawned elsewhere."""
    if "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["robustdeq.running.process"])
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


class _Writing:
    """Held while a record is written, so that an end that was asked for waits for it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.busy = self.wanted = False

    def __enter__(self) -> None:
        self.lock.acquire()
        self.busy = True

    def __exit__(self, *_: object) -> None:
        self.busy = False
        self.lock.release()
        if self.wanted:
            os._exit(0)

    def end(self, *_: object) -> None:
        """Handler of SIGTERM."""
        self.wanted = True
        if not self.busy:
            os._exit(0)


_WRITING = _Writing()


class _Own(Store):
    """The run's store, in the process that computes."""

    def write(self, record: Record) -> None:
        with _WRITING:
            super().write(record)


class _Distant(Store):
    """A store elsewhere, behind the pipe; what has come or gone is kept in a folder of its own."""

    def __init__(self, folder: Path, shown: Path, exchange: Callable[[Any], Any]) -> None:
        super().__init__(folder)
        self.shown, self.exchange = shown, exchange

    def read(self, key: str) -> Record | None:
        if not self.path(key).exists():
            payload = self.exchange(_Ask(key))
            if payload is None:
                return None
            self.path(key).write_bytes(payload)
        try:
            return super().read(key)
        except DamagedError as damage:
            self.path(key).unlink()
            # As the run's user knows it, and not as the copy that is here.
            raise DamagedError(self.shown / f"{key}.parquet", damage.cause, damage.remedy) from None

    def write(self, record: Record) -> None:
        super().write(record)
        key = record.meta.key
        self.exchange(_Give(key, self.path(key).read_bytes()))


def _work(pipe: Connection, scratch: Path | None) -> None:
    """The process's own end: it obeys orders until there are none.

    Args:
        pipe: to the parent.
        scratch: a folder of its own, where the store is behind the pipe.
    """
    _settle()
    with bounded_output():
        worker = _Worker(pipe, scratch)
        for order in _orders(pipe):
            worker.obey(order)
        pipe.close()


class _Worker:
    def __init__(self, pipe: Connection, scratch: Path | None) -> None:
        self.pipe, self.scratch, self.pid = pipe, scratch, os.getpid()
        self.chain: Chain | None = None

    def obey(self, order: _Order) -> None:
        """Never raises, so that the last word is always sent."""
        os.environ.update(order.environment)
        try:
            if self.chain is None:
                self.chain = chain_of(order.task, self._store(order.task))
            self.chain.abandoned = dict(order.task.abandoned)
            for item in events(self.chain, order.task, order.label):
                self.say(item)
        except StorageError as cause:
            self.say(Event("stopped", "", reason=sentence(cause)))
        except BaseException as cause:
            self.say(Event("failed", "", reason=sentence(cause)))
        self.say(Event("finished", ""))

    def _store(self, task: Task) -> Store:
        if self.scratch is None:
            return _Own(task.records)
        return _Distant(self.scratch, task.records, self.exchange)

    def say(self, item: Any) -> None:
        if os.getpid() != self.pid:  # a plugin has forked, and its copy has come back to us
            os._exit(0)
        self.pipe.send(item)

    def exchange(self, item: Any) -> Any:
        self.say(item)
        return self.pipe.recv()


def _orders(pipe: Connection) -> Iterator[_Order]:
    """Orders until the parent hangs up, or has none for a while."""
    with suppress(EOFError, OSError):
        while pipe.poll(IDLE_SECONDS):
            yield pipe.recv()


def _settle() -> None:
    """What the process is to the machine: a group of its own that ends with its parent."""
    with suppress(OSError, AttributeError):
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what to do
    signal.signal(signal.SIGTERM, _WRITING.end)
    torch.set_num_threads(THREADS)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is None:
        return
    wait([parent.sentinel])
    _WRITING.lock.acquire(timeout=PATIENCE_SECONDS)
    with suppress(OSError):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
