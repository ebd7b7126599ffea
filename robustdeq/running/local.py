"""The local engine: one process per chunk of a row, as many at a time as there are cores."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

import torch

from robustdeq.errors import StorageError
from robustdeq.evaluation.chain import Event
from robustdeq.running.process import PATIENCE_SECONDS, ChunkProcess, is_fatal
from robustdeq.running.task import Message, Plan, Task, held_events

_MARKS = {"started": "started", "damaged": "damaged"}
"""What is said of a stage before it is over."""


def default_workers(device: torch.device) -> int:
    """As many as there are cores that this process may use; one on an accelerator."""
    if device.type != "cpu":
        return 1
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


@dataclass(frozen=True)
class Local:
    """Runs tasks on this machine.

    Attributes:
        device: where they compute.
        workers: processes at a time.
        timeout: seconds that one stage of one chunk may take; None for as long as it wants.
    """

    device: torch.device
    workers: int
    timeout: float | None = None

    def described(self) -> dict[str, Any]:
        """See `Engine`."""
        return {"name": "local", "workers": self.workers}

    def run(self, tasks: Iterable[Task]) -> Iterator[Message]:
        """Run tasks in order; yields what they say as it comes.

        Every task ends with an event "finished". A stage in which its process dies or that takes
        too long has failed, and a new process goes on behind it.

        Raises:
            StorageError: if records cannot be written.
        """
        queue = []
        for task in tasks:
            held = held_events(task)
            if held is None:
                queue.append(_Job(task))
            else:
                yield from (Message(task, item) for item in [*held, Event("finished", "")])
        yield from self._compute(queue[::-1])

    def _compute(self, queue: list[_Job]) -> Iterator[Message]:
        running: dict[Any, _Job] = {}
        try:
            while queue or running:
                while queue and len(running) < self.workers:
                    job = queue.pop()
                    running[job.start().pipe] = job
                for pipe in wait([j.process.pipe for j in running.values()], self._pause(running)):
                    yield from running[pipe].read()
                for job in running.values():
                    yield from job.watch(self.timeout)
                for pipe in [pipe for pipe, job in running.items() if job.process.ended]:
                    job = running.pop(pipe)
                    if not job.finished:
                        queue.append(job)
        finally:
            _end([job.process for job in running.values()])

    def _pause(self, running: dict[Any, _Job]) -> float | None:
        """Seconds until the next stage is overdue."""
        left = (job.process.left(self.timeout) for job in running.values())
        return min((seconds for seconds in left if seconds is not None), default=None)


@dataclass(eq=False)
class _Job:
    """A task on its way through one process, or several where they die."""

    task: Task
    said: set[tuple[str, str]] = field(default_factory=set)
    finished: bool = False

    def start(self) -> ChunkProcess:
        self.process = ChunkProcess()
        self.process.begin(self.task)
        return self.process

    def read(self) -> Iterator[Message]:
        for item in self.process.read():
            yield from self._pass_on(item)
        if self.process.ended and not self.finished:
            yield from self.give_up(self.process.lost(self.process.death()))

    def _pass_on(self, item: Event | Plan) -> Iterator[Message]:
        if item == Event("finished", ""):
            self.finished = True
            self.process.hang_up()
            yield Message(self.task, item)
            return
        if isinstance(item, Event) and item.kind == "stopped":
            raise StorageError(item.reason)
        # A second process tells again what the first has told.
        mark = ("", "plan") if isinstance(item, Plan) else (item.key, _MARKS.get(item.kind, "over"))
        if mark not in self.said:
            self.said.add(mark)
            yield Message(self.task, item)
        if isinstance(item, Event) and item.kind == "failed":
            self.task = self.task.without(item.label, item.reason)

    def watch(self, timeout: float | None) -> Iterator[Message]:
        """End the process if its stage is overdue."""
        if self.process.left(timeout) == 0 and not self.process.ended:
            yield from self.give_up(self.process.overdue(timeout))

    def give_up(self, failed: Event) -> Iterator[Message]:
        """The task goes on without the stage where it can."""
        yield Message(self.task, failed)
        if is_fatal(failed):
            self.finished = True
            yield Message(self.task, Event("finished", ""))
        else:
            self.task = self.task.without(failed.label, failed.reason)


def _end(processes: list[ChunkProcess]) -> None:
    """Softly at first: a record that is being written is written to its end."""
    for process in processes:
        process.end_softly()
    deadline = time.monotonic() + PATIENCE_SECONDS
    for process in processes:
        process.kill(max(0.0, deadline - time.monotonic()))
