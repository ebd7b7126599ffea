"""Who holds which image: every image is dealt to exactly one client, and no client has none."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from robustdeq.errors import UsageError
from robustdeq.randomness import derived_seed

Partition = Literal["iid", "dirichlet"]
Rows = NDArray[np.int64]


def dealt(
    labels: Rows, clients: int, partition: Partition, concentration: float, seed: int
) -> list[Rows]:
    """The rows of each client, ascending.

    "iid" shuffles and cuts evenly. "dirichlet" draws, for each class, the clients' shares from a
    symmetric Dirichlet distribution; a client left with nothing then gets one image of the client
    that holds most.

    Raises:
        UsageError: if there are fewer images than clients.
    """
    if len(labels) < clients:
        raise UsageError(
            f"{clients} clients cannot share {len(labels)} training images; give at most that many."
        )
    random = np.random.default_rng(derived_seed(seed, "partition", partition))
    if partition == "iid":
        parts = list(np.array_split(random.permutation(len(labels)), clients))
    else:
        parts = _skewed(labels, clients, concentration, random)
        _feed(parts)
    return [np.sort(part).astype(np.int64) for part in parts]


def _skewed(
    labels: Rows, clients: int, concentration: float, random: np.random.Generator
) -> list[Rows]:
    parts: list[list[Rows]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        shares = random.dirichlet(np.full(clients, concentration))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
        for part, piece in zip(parts, np.split(rows, cuts), strict=True):
            part.append(piece)
    return [np.concatenate(part) for part in parts]


def _feed(parts: list[Rows]) -> None:
    """One image of the largest client for each that has none."""
    for k, part in enumerate(parts):
        if not len(part):
            largest = max(range(len(parts)), key=lambda j: len(parts[j]))
            parts[k], parts[largest] = parts[largest][-1:], parts[largest][:-1]
