"""The Ray engine: one task per stage of a chunk, wherever the cluster has room for it.

Ray places the tasks, and gives one to another worker where its own has died. On the worker the
stage is computed in a process of its own, as by the local engine, which the next stage finds again
if it is of the same chunk. Records travel to one actor beside the driver, which alone writes.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from robustdeq.errors import CaseError, RobustDEQError, StorageError, UsageError, sentence
from robustdeq.evaluation.chain import Event, Step
from robustdeq.evaluation.provenance import core_digest, versions
from robustdeq.evaluation.subject import Source
from robustdeq.files import write_atomically
from robustdeq.keys import file_sha256
from robustdeq.records import Store
from robustdeq.running.cluster import Cluster
from robustdeq.running.graph import ChunkGraph
from robustdeq.running.process import IDLE_SECONDS, ChunkProcess, Depot, is_fatal
from robustdeq.running.task import Message, Plan, Task, held_events

_RETRIES = 3
"""How often a stage is given to another worker because its own, or its node, has died."""
_KNOCK_SECONDS = 5.0
_OBJECT_STORE = 256 * 2**20
_GIB = 2**30


@contextmanager
def connected(
    cluster: Cluster, device: str, workers: int | None, timeout: float | None
) -> Iterator[RayEngine]:
    """The engine of a cluster, for as long as the block lasts.

    Args:
        cluster: which one, and what a task of it needs.
        device: "auto", "cpu" or "cuda", on the workers.
        workers: tasks at a time; None for as many as the cluster has room for.
        timeout: seconds that one stage of one chunk may take.

    Raises:
        UsageError: if it cannot be reached, or has no room for a single task.
    """
    own = not ray.is_initialized()
    if own:
        _join(cluster, workers)
    try:
        kind = _device(device)
        need = _need(cluster, kind)
        if not _room(need):
            raise UsageError(
                f"no node of the Ray cluster has room for one task ({_words(need)}); lower "
                "--task-gpus or --task-memory, or add a node."
            )
        yield RayEngine(kind, need, workers, timeout)
    finally:
        _drop_processes()
        if own:
            ray.shutdown()


def _join(cluster: Cluster, workers: int | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"logging_level": "error", "address": cluster.address or "local"}
    if cluster.address is None:
        # Nobody else is to reach a cluster that is started for this run alone.
        options |= {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
        options |= {"num_cpus": workers, "object_store_memory": _OBJECT_STORE}
        os.environ.setdefault("RAY_worker_niceness", "0")  # as the local engine's processes
    before = signal.getsignal(signal.SIGTERM)
    try:
        _knock(cluster.address)
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, OSError) as cause:
        where = cluster.address or "on this machine"
        raise UsageError(
            f"there is no Ray cluster {where} ({sentence(cause)}); start one with 'ray start', or "
            "leave --address out."
        ) from cause
    finally:
        # Ray puts a handler of its own in place of the run's, which ends it well.
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _knock(address: str | None) -> None:
    """Raise OSError where nobody listens; Ray itself would wait for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK_SECONDS).close()


def _device(name: str) -> torch.device:
    gpus = ray.cluster_resources().get("GPU", 0)
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {name} is for one machine; Ray hands out GPUs, give cuda.")
    if name == "cuda" and not gpus:
        raise UsageError("no node of the Ray cluster has a GPU; use --device cpu or auto.")
    return torch.device("cuda" if gpus and name != "cpu" else "cpu")


def _need(cluster: Cluster, device: torch.device) -> dict[str, float]:
    """What Ray is to set aside for one task, in its own units."""
    gpus = {"GPU": cluster.task_gpus} if device.type == "cuda" else {}
    return {"CPU": 1.0, "memory": cluster.task_memory * _GIB, **gpus}


def _room(need: dict[str, float]) -> int:
    """How many tasks the nodes that are alive can hold at a time."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(int(min(node.get(kind, 0) / n for kind, n in need.items())) for node in nodes)


def _words(need: dict[str, float]) -> str:
    shown = {"memory": f"{need['memory'] / _GIB:g} GiB of memory"}
    return ", ".join(shown.get(kind, f"{n:g} {kind}") for kind, n in need.items())


@dataclass(eq=False)
class RayEngine:
    """Runs tasks on a Ray cluster.

    Attributes:
        device: kind of device that the workers compute on.
        need: what Ray sets aside for one task.
        workers: tasks at a time; None for as many as there is room for.
        timeout: seconds that one stage of one chunk may take.
    """

    device: torch.device
    need: dict[str, float]
    workers: int | None = None
    timeout: float | None = None
    steps: dict[tuple[int, int], tuple[Step, ...]] = field(default_factory=dict)
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def described(self) -> dict[str, Any]:
        """See `Engine`."""
        nodes = sum(bool(node["Alive"]) for node in ray.nodes())
        return {"name": "ray", "version": ray.__version__, "workers": self._most(), "nodes": nodes}

    def run(self, tasks: Iterable[Task]) -> Iterator[Message]:
        """See `Engine`; stages of a chunk that do not need each other may run side by side."""
        graphs = []
        for task in tasks:
            held = held_events(task)
            if held is None:
                graph = ChunkGraph(task)
                graph.plan(self.steps.get((task.row, task.number), ()))
                graphs.append(graph)
                continue
            for item in [*held, Event("finished", "")]:
                self._learn(task, item)
                yield Message(task, item)
        if graphs:
            yield from _Campaign(self, graphs).go()

    def _learn(self, task: Task, item: Event | Plan) -> None:
        if isinstance(item, Plan):
            self.steps[task.row, task.number] = item.steps

    def _most(self) -> int:
        """Tasks at a time; nodes may have come and gone."""
        room = max(1, _room(self.need))
        return room if self.workers is None else min(room, self.workers)


@dataclass(eq=False)
class _Campaign:
    """The tasks of one phase on their way through the cluster."""

    engine: RayEngine
    graphs: list[ChunkGraph]
    flying: dict[Any, tuple[ChunkGraph, str]] = field(default_factory=dict)
    depot: Any = None
    compute: Any = None
    tasks: dict[int, Any] = field(default_factory=dict)
    weights: dict[int, Any] = field(default_factory=dict)

    def go(self) -> Iterator[Message]:
        folder = self.graphs[0].task.records
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.depot = ray.remote(_Depot).options(
            num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_task_retries=-1
        ).remote(folder)  # fmt: skip
        need = self.engine.need
        self.compute = ray.remote(_compute).options(
            num_cpus=need["CPU"],
            num_gpus=need.get("GPU", 0),
            memory=need["memory"],
            max_retries=_RETRIES,
        )
        try:
            while not all(graph.finished for graph in self.graphs):
                yield from self._launch()
                done, _ = ray.wait(list(self.flying), num_returns=1, timeout=5.0)
                for ref in done:
                    yield from self._land(ref)
        finally:
            for ref in self.flying:
                ray.cancel(ref, force=True)
            ray.kill(self.depot)

    def _launch(self) -> Iterator[Message]:
        """Fill the cluster, the rows in order: a chunk that has begun goes on before others."""
        most = self.engine._most()
        for graph in self.graphs:
            for label in graph.ready():
                if len(self.flying) >= most:
                    return
                graph.begin(label)
                self.flying[self._submit(graph, label)] = graph, label
                yield Message(graph.task, Event("started", label))

    def _submit(self, graph: ChunkGraph, label: str) -> Any:
        task, weights = self._parcel(graph)
        order = _Errand(
            self.engine.run_id, label, graph.task.abandoned, self.engine.timeout, _expected()
        )
        return self.compute.remote(task, weights, order, self.depot)

    def _parcel(self, graph: ChunkGraph) -> tuple[Any, Any]:
        """A chunk's task and its row's weights in the cluster, for as long as they are needed."""
        if id(graph) not in self.tasks:
            self.tasks[id(graph)] = ray.put(graph.task)
        if graph.task.row not in self.weights:
            self.weights[graph.task.row] = ray.put(_weights(graph.task))
        return self.tasks[id(graph)], self.weights[graph.task.row]

    def _land(self, ref: Any) -> Iterator[Message]:
        graph, label = self.flying.pop(ref)
        fatal = False
        for item in _outcome(ref, label):
            if isinstance(item, Event) and item.kind == "stopped":
                raise StorageError(item.reason)
            graph.take(item)
            self.engine._learn(graph.task, item)
            fatal |= isinstance(item, Event) and item.kind == "failed" and is_fatal(item)
            yield Message(graph.task, item)
        graph.end(label, fatal)
        if graph.finished:
            self.tasks.pop(id(graph), None)
            yield Message(graph.task, Event("finished", ""))


def _outcome(ref: Any, label: str) -> list[Event | Plan]:
    """What a stage has said; a worker that died once too often has failed it."""
    try:
        items: list[Event | Plan] = ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, UsageError):
            raise error.cause from None
        return [Event("failed", label, reason=sentence(error.cause))]
    except RayError as error:
        words = f"its worker or node was lost {_RETRIES + 1} times ({type(error).__name__})"
        return [Event("failed", label, reason=words)]
    return items


def _weights(task: Task) -> tuple[str, bytes] | None:
    """A row's weights, for nodes that do not have the file."""
    if not task.case.entry.weights:
        return None
    try:
        path = task.source.find(task.case.entry.weights)
        return path.name, path.read_bytes()
    except (RobustDEQError, OSError):
        return None  # the worker says what is missing


def _expected() -> dict[str, str]:
    return {**versions(), "RobustDEQ's core": core_digest()[:12]}


# From here on: what runs on the workers.


class _Depot:
    """The run's store, beside the driver; an actor."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)

    def get(self, key: str) -> bytes | None:
        try:
            return self.store.path(key).read_bytes()
        except OSError:
            return None

    def put(self, key: str, payload: bytes) -> None:
        write_atomically(self.store.path(key), payload)


@dataclass(frozen=True)
class _Errand:
    """A stage to compute, and what the driver expects of the node that does it."""

    run_id: str
    label: str
    abandoned: tuple[tuple[str, str], ...]
    timeout: float | None
    expected: dict[str, str]


@dataclass(frozen=True)
class _Actor(Depot):
    """The actor, as a depot."""

    actor: Any

    def get(self, key: str) -> bytes | None:
        held: bytes | None = ray.get(self.actor.get.remote(key))
        return held

    def put(self, key: str, payload: bytes) -> None:
        ray.get(self.actor.put.remote(key, payload))


@dataclass(eq=False)
class _Kept:
    """A chunk's process, kept for its next stage, with a folder of its own."""

    chunk: tuple[object, ...]
    process: ChunkProcess
    scratch: Path

    def usable(self, chunk: tuple[object, ...]) -> bool:
        idle = time.monotonic() - self.process.since
        alive = not self.process.ended and self.process.process.is_alive()
        return self.chunk == chunk and alive and idle < IDLE_SECONDS / 2

    def drop(self) -> None:
        if not self.process.ended:
            self.process.kill()
        shutil.rmtree(self.scratch, ignore_errors=True)


_kept: list[_Kept] = []


@atexit.register
def _drop_processes() -> None:
    while _kept:
        _kept.pop().drop()


def _compute(
    task: Task, weights: tuple[str, bytes] | None, order: _Errand, depot: Any
) -> list[Event | Plan]:
    """One stage of one chunk, in a process of its own; what it has said, for the driver.

    Raises:
        UsageError: if this node does not have what the driver has installed.
    """
    _check_versions(order.expected)
    chunk = order.run_id, task.row, task.number, task.phase, *_visible()
    if not (_kept and _kept[0].usable(chunk)):
        _drop_processes()
        scratch = Path(tempfile.mkdtemp(prefix="robustdeq-"))
        _kept.append(_Kept(chunk, ChunkProcess(_Actor(depot), scratch), scratch))
    kept = _kept[0]
    task = replace(_placed(task, weights, kept.scratch), abandoned=order.abandoned)
    try:
        return _watched(kept.process, task, order)
    except RayTaskError as error:
        _drop_processes()
        if isinstance(error.cause, StorageError):
            return [Event("stopped", "", reason=sentence(error.cause))]
        raise


def _watched(process: ChunkProcess, task: Task, order: _Errand) -> list[Event | Plan]:
    process.begin(task, order.label, _visible())
    items: list[Event | Plan] = []
    while True:
        if not process.pipe.poll(process.left(order.timeout)):
            return [*items, process.overdue(order.timeout)]
        for item in process.read():
            if item == Event("finished", ""):
                return items
            if isinstance(item, Plan) or item.kind != "started":
                items.append(item)
        if process.ended:
            return [*items, process.lost(process.death())]


def _visible() -> tuple[tuple[str, str], ...]:
    """The devices that Ray has given to this task."""
    names = ("CUDA_VISIBLE_DEVICES",)
    return tuple((name, os.environ[name]) for name in names if name in os.environ)


def _check_versions(expected: dict[str, str]) -> None:
    found = _expected()
    for name, wanted in expected.items():
        if found.get(name) != wanted:
            host = ray.util.get_node_ip_address()
            raise UsageError(
                f"node {host} has {name} {found.get(name)}, the run is of {wanted}; install the "
                "same versions on every node."
            )


def _placed(task: Task, weights: tuple[str, bytes] | None, folder: Path) -> Task:
    """The task with its weights where this node can read them."""
    if weights is None:
        return task
    name, payload = weights
    own = folder / name
    try:
        held = task.source.find(task.case.entry.weights)
        if file_sha256(held) == task.case.entry.sha256:
            return task
    except (CaseError, OSError):
        pass
    if not own.exists():
        own.write_bytes(payload)
    entry = replace(task.case.entry, weights=name)
    source = Source((folder, *task.source.folders))
    return replace(task, case=replace(task.case, entry=entry), source=source)
