"""The unit of work of every engine: one chunk of one case, and what it says on its way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from robustdeq.datasets import Slice, SliceIdentity
from robustdeq.errors import CaseError, DamagedError
from robustdeq.evaluation.chain import Chain, Event, Shelf, Step
from robustdeq.evaluation.pools import row_pool
from robustdeq.evaluation.stages import CLEAN, attack_stages
from robustdeq.evaluation.subject import Source, build_subject, chunk_of
from robustdeq.interfaces import Kind, about_of
from robustdeq.records import Record, Store
from robustdeq.registry import BUILT_IN, plugin_class, provider
from robustdeq.suite import AttackEntry, Case, Curves


@dataclass(frozen=True, eq=False)
class Task:
    """One chunk of one case: all that a worker needs, and it can be pickled.

    Attributes:
        phase: 1, or 2 once all rows have been through phase 1.
        others: for phase 2, the other rows' IDs with the keys of their records of this chunk.
        abandoned: labels of stages that failed before, with the reason; they are left out.
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
    phase: int = 1
    others: tuple[tuple[str, tuple[str, ...]], ...] = ()
    curves: Curves | None = None
    abandoned: tuple[tuple[str, str], ...] = ()

    def without(self, label: str, reason: str) -> Task:
        """The same task, with a stage given up."""
        return replace(self, abandoned=(*self.abandoned, (label, reason)))


@dataclass(frozen=True)
class Plan:
    """Said once per task, after the clean stage: what its chunk will go through.

    Attributes:
        labels: of the attacks that apply to the model.
        steps: all stages after the clean one, of both phases, with what each waits for.
        about: what the defense says of itself, as far as it says it: title, authors, claimed, ...
    """

    case: dict[str, object]
    case_key: str
    track: str
    labels: tuple[str, ...]
    steps: tuple[Step, ...]
    about: dict[str, str]


@dataclass(frozen=True)
class Message:
    """What a task says to the run; "finished" is its last event, whatever happened."""

    task: Task
    item: Event | Plan


class Engine(Protocol):
    """Something that computes tasks; which one changes no record."""

    @property
    def device(self) -> torch.device:
        """The kind of device that it computes on."""
        ...

    def described(self) -> dict[str, Any]:
        """Its name and size, for `run.json`."""
        ...

    def run(self, tasks: Iterable[Task]) -> Iterator[Message]:
        """Compute what the store lacks; every task ends with an event "finished".

        Raises:
            StorageError: if records cannot be written.
        """
        ...


def chain_of(task: Task, shelf: Shelf) -> Chain:
    """The task's model and chunk, ready to go through their stages.

    Raises:
        CaseError: if the model cannot be built.
    """
    device = torch.device(task.device)
    subject = build_subject(task.case, task.identity, task.source, device, task.batch_size)
    chunk = chunk_of(task.samples, task.number, device)
    pools = [row_pool(name, keys, shelf.read) for name, keys in task.others]
    stages = attack_stages(task.attacks)
    return Chain(subject, chunk, stages, shelf, pools, task.curves, dict(task.abandoned))


def events(chain: Chain, task: Task, label: str = "") -> Iterator[Event | Plan]:
    """What a chain says of one stage, or of all of the task's phase; its plan after the first."""
    planned = task.phase > 1 or label not in ("", CLEAN.label)  # it was said with the clean stage
    for event in chain.only(label) if label else chain.run(task.phase):
        yield event
        if chain.records and not planned and event.kind in ("computed", "resumed"):
            planned = True
            yield _plan(chain, task)


def _plan(chain: Chain, task: Task) -> Plan:
    subject = chain.subject
    track = chain.records[0].meta.track
    labels = tuple(stage.label for stage in chain.planned(track))
    about = about_of(plugin_class("defense", task.case.entry.defense))
    return Plan(subject.case, subject.case_key, track, labels, chain.steps(), about)


def held_events(task: Task) -> list[Event | Plan] | None:
    """The events of a task whose records all exist, without a process; None where one is missing.

    For plugins of this distribution only: a stranger's code never runs in the parent.
    """
    names: list[tuple[Kind, str]] = [("defense", task.case.entry.defense)]
    names += [("attack", entry.attack) for entry in task.attacks]
    if any(provider(kind, name).distribution != BUILT_IN for kind, name in names):
        return None
    try:
        shelf = _ReadOnly(task.records)
        return list(events(chain_of(task, shelf), task))
    # Whatever it is, the task's own process will meet it again and say so.
    except Exception:
        return None


class _ReadOnly(Store):
    """A store for looking: what it lacks is not to be computed."""

    def read(self, key: str) -> Record:
        try:
            record = super().read(key)
        except DamagedError as damage:
            raise CaseError(str(damage)) from damage  # the chain would compute in its place
        if record is None:
            raise CaseError(f"record {key} does not exist.")
        return record
