"""The same rounds over Flower's simulation, with Flower's own FedAvg taking the mean."""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor

from robustdeq.errors import CaseError, UsageError
from robustdeq.training.federated.client import Report, RunClient, Work, run_client, sent
from robustdeq.training.federated.fusion import as_in
from robustdeq.training.federated.partition import Rows
from robustdeq.training.federated.server import LOOKS, Failure, FederatedAveraging, weight_in
from robustdeq.training.task import Task

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid

SECONDS = 30.0
"""Of rounds in one simulation, about: to start one takes some ten seconds."""
PATIENCE = 3600.0
"""Seconds that the server waits for a round's clients; those without an answer have failed."""
_KEY = "weight"


class FlowerAveraging(FederatedAveraging):
    """`FederatedAveraging` with clients as Flower's virtual nodes, in processes of their own.

    One `advance` is one simulation, of as many rounds as fit some seconds: checkpoints and time
    budgets fall between simulations. How the rounds are cut changes no weight.

    Raises:
        UsageError: if Flower is not installed.
    """

    def __init__(self, task: Task, run_client: RunClient = run_client) -> None:
        _require_flower()
        super().__init__(task, run_client)

    def advance(self) -> dict[str, Tensor | float]:
        """See `Trainer.advance`; the last of the rounds is what is logged."""
        from flwr.serverapp import ServerApp
        from flwr.simulation import run_simulation

        row: dict[str, Tensor | float] = {}
        errors: list[BaseException] = []
        stopped = threading.Event()

        def serve(grid: Grid, context: Context) -> None:
            del context
            try:
                row.update(self._round(grid, stopped))
                deadline = time.monotonic() + SECONDS  # the first one waited for the start
                while not self._pauses(deadline):
                    row.update(self._round(grid, stopped))
            except BaseException as error:  # raised again where it can be caught
                errors.append(error)

        server = ServerApp()
        server.main()(serve)
        clients = _client_app(self.fresh, self.parts, self.run_client)
        with _quiet():
            try:
                run_simulation(server, clients, self.recipe.clients, backend_config=self._backend())
            finally:
                # Else the server's thread would wait for nodes that are gone.
                stopped.set()
        if errors:
            raise errors[0]
        return row

    def _pauses(self, deadline: float) -> bool:
        """Whether training is done, or it is late and the loop would look at the model now."""
        looked_at = self.step % max(self.steps // LOOKS, 1) == 0
        return self.step == self.steps or (looked_at and time.monotonic() > deadline)

    def _backend(self) -> dict[str, Any]:
        cuda = self.task.device.type == "cuda"
        return {"client_resources": {"num_cpus": 1, "num_gpus": 0.25 if cuda else 0.0}}

    def _round(self, grid: Grid, stopped: threading.Event) -> dict[str, Tensor | float]:
        from flwr.app import ArrayRecord
        from flwr.serverapp.strategy import FedAvg

        state, plan = sent(self.model), self.plan()
        answers, failures = self._ask(grid, plan, stopped)
        reports = [_report(answer) for answer in answers]
        self.require(reports, failures)
        for answer in answers:
            # FedAvg sums in the type it is given.
            received = answer.content["arrays"].to_torch_state_dict()
            doubled = {name: value.double() for name, value in received.items()}
            answer.content["arrays"] = ArrayRecord(doubled)
        mean, _ = FedAvg(weighted_by_key=_KEY).aggregate_train(self.step + 1, answers)
        fused = mean.to_torch_state_dict()
        self.adopt({name: as_in(value, fused[name]) for name, value in state.items()})
        return self.account(reports, failures)

    def _ask(
        self, grid: Grid, plan: list[Work], stopped: threading.Event
    ) -> tuple[list[Message], list[Failure]]:
        """Send the global model; the answers in the order of the clients, and who gave none."""
        from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

        nodes = self._nodes(grid, stopped)
        arrays = ArrayRecord(sent(self.model))
        # Which node plays which client does not matter: the message says all.
        playing = {nodes[work.client]: work.client for work in plan}
        messages = [
            Message(
                content=RecordDict({"arrays": arrays, "work": ConfigRecord(_asked(work))}),
                message_type="train",
                dst_node_id=nodes[work.client],
            )
            for work in plan
        ]
        replies = {playing[r.metadata.src_node_id]: r for r in _exchange(grid, messages, stopped)}
        answers, failures = [], []
        for work in plan:
            reply = replies.get(work.client)
            if reply is None:
                failures.append(Failure(work.client, f"no answer in {PATIENCE:g} seconds."))
            elif reply.has_error():
                failures.append(Failure(work.client, " ".join(reply.error.reason.split())))
            else:
                answers.append(reply)
        return answers, failures

    def _nodes(self, grid: Grid, stopped: threading.Event) -> list[int]:
        """The virtual nodes, once all are there."""

        def all_there() -> bool:
            return len(list(grid.get_node_ids())) == self.recipe.clients

        _wait(all_there, stopped)
        return sorted(grid.get_node_ids())


def _client_app(task: Task, parts: list[Rows], run_client: RunClient) -> ClientApp:
    """What a virtual node runs; it is sent to the processes whole, the data included."""
    from flwr.clientapp import ClientApp

    def train(message: Message, context: Context) -> Message:
        from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

        del context
        asked = dict(message.content["work"])
        work = Work(rows=parts[asked["client"]], **asked)
        state = message.content["arrays"].to_torch_state_dict()
        update = run_client(task, work, state)
        report = {**update.report._asdict(), _KEY: weight_in(task, update.report)}
        content = {"arrays": ArrayRecord(update.state), "report": MetricRecord(report)}
        return Message(content=RecordDict(content), reply_to=message)

    app = ClientApp()
    app.train()(train)
    return app


def _asked(work: Work) -> dict[str, int | float]:
    """What a client is told; its images it has."""
    told = asdict(work)
    del told["rows"]
    return told


def _report(answer: Message) -> Report:
    told = dict(answer.content["report"])
    del told[_KEY]
    return Report(**told)


def _exchange(grid: Grid, messages: list[Message], stopped: threading.Event) -> list[Message]:
    """As `Grid.send_and_receive`, but it ends when the simulation does."""
    open_ids = set(grid.push_messages(messages))
    replies: list[Message] = []

    def all_answered() -> bool:
        found = list(grid.pull_messages(open_ids))
        replies.extend(found)
        open_ids.difference_update(reply.metadata.reply_to_message_id for reply in found)
        return not open_ids

    _wait(all_answered, stopped)
    return replies


def _wait(done: Callable[[], bool], stopped: threading.Event) -> None:
    """Until it is done, or patience ends.

    Raises:
        CaseError: if the simulation has ended.
    """
    deadline = time.monotonic() + PATIENCE
    while not done() and time.monotonic() < deadline:
        if stopped.wait(0.05):
            raise CaseError("Flower's simulation ended before its rounds; its log says why.")


def _require_flower() -> None:
    missing = [name for name in ("flwr", "ray") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"engine 'flower' needs {' and '.join(missing)}; run pip install "
            "\"robustdeq[federated]\", or use engine 'in_process', which gives the same weights."
        )
    # Read when the libraries are first imported; a benchmark has nothing to tell anyone.
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns of it


@contextmanager
def _quiet() -> Iterator[None]:
    """Only Flower's errors, and none of what it leaves in the environment."""
    logger, path = logging.getLogger("flwr"), os.environ.get("PYTHONPATH")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if path is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = path
