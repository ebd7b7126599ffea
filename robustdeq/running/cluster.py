"""Which Ray cluster computes, and what one of its tasks needs; knows no Ray."""

from __future__ import annotations

from dataclasses import dataclass

from robustdeq.errors import UsageError


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster.

    Attributes:
        address: of an existing one, "auto" or "host:port"; None starts one on this machine.
        task_gpus: of a GPU, for each task, where the device is one.
        task_memory: GiB, for each task; no more tasks are placed on a node than fit.

    Raises:
        UsageError: if a number is out of range, or the address is one that the store cannot serve.
    """

    address: str | None = None
    task_gpus: float = 1.0
    task_memory: float = 1.0

    def __post_init__(self) -> None:
        share = 0 < self.task_gpus <= 1
        if not share and not (self.task_gpus > 1 and float(self.task_gpus).is_integer()):
            raise UsageError(
                f"--task-gpus is {self.task_gpus:g}; give a share above 0, or a whole number."
            )
        if not 0 < self.task_memory < float("inf"):
            raise UsageError(f"--task-memory is {self.task_memory:g}; give GiB above 0.")
        if self.address is not None and self.address.startswith("ray://"):
            raise UsageError(
                f"--address {self.address} is a Ray client's; the run must stand on a node of the "
                "cluster: start it there, with --address auto."
            )
