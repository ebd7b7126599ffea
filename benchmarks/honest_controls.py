"""The honesty gate on honest models: no check may flag one, and thresholds are set on these alone.

    python benchmarks/honest_controls.py [--threat Linf:3/16] [--only REGEX]
    python benchmarks/honest_controls.py --data mnist --threat Linf:0.3

Prints, for every check, the values over all models, and every flag. The models: rows of the suite
`digits-ablations` that ship with three seeds, and small networks of other kinds, trained here; for
`mnist`, all rows of its suite that ship.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from robustdeq.datasets import load_slice
from robustdeq.evaluation.direct import load_model
from robustdeq.evaluation.gate import run_checks
from robustdeq.suite import find_suite
from robustdeq.targets import Target
from robustdeq.threats import Threat

SEEDS = (0, 1, 2)
SHIPPED = (
    "Madry2018Towards_deq",
    "Madry2018Towards_wide_resnet",
    "Chu2023Learning_module_pgd_at",
    "Chu2023Learning_neither_pgd_at",
    "Yang2023Improving_plain_pgd_at",
    "Gurumurthy2021Joint_joint42",
    "Song2023Revisiting_dense",
    "Song2023Revisiting_distinct0.5",
    "Gkillas2023Deep_samples_iid_pgd_at",
)
"""Families of `digits-ablations` that were trained from three seeds."""


class Control(NamedTuple):
    """One honest model."""

    name: str
    seed: int
    model: nn.Module


def convolutional(
    activation: Callable[[], nn.Module],
    norm: Callable[[int], nn.Module] = lambda width: nn.Identity(),
    pool: Callable[[], nn.Module] = lambda: nn.AvgPool2d(2),
) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        norm(16),
        activation(),
        nn.Conv2d(16, 24, 3, padding=1),
        norm(24),
        activation(),
        pool(),
        nn.Flatten(),
        nn.Linear(24 * 16, 10),
    )


class Attention(nn.Module):
    """A transformer over the 16 patches of 2x2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(4, 32)
        self.places = nn.Parameter(torch.randn(16, 32) / 8)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 2, stride=2).transpose(1, 2)
        out: Tensor = self.head(self.layer(self.embedding(patches) + self.places).mean(1))
        return out


class Implicit(nn.Module):
    """A fixed point with a gradient of its own, which knows nothing of our core."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.stem = nn.Linear(64, width)
        self.weight = nn.Parameter(torch.randn(width, width) / math.sqrt(width))
        self.head = nn.Linear(width, 10)

    def step(self, z: Tensor, injection: Tensor) -> Tensor:
        weight = 0.8 * self.weight / torch.linalg.matrix_norm(self.weight, 2)
        return torch.tanh(z @ weight.T + injection)

    def forward(self, x: Tensor) -> Tensor:
        injection = self.stem(x.flatten(1))
        with torch.no_grad():
            z = torch.zeros_like(injection)
            for _ in range(60):
                z = self.step(z, injection)
        image = self.step(z, injection)
        if torch.is_grad_enabled() and image.requires_grad:
            leaf = z.detach().requires_grad_()
            again = self.step(leaf, injection.detach())

            def adjoint(gradient: Tensor) -> Tensor:
                v = gradient
                for _ in range(60):
                    (product,) = torch.autograd.grad(again, leaf, v, retain_graph=True)
                    v = gradient + product
                return v

            image.register_hook(adjoint)
        out: Tensor = self.head(image)
        return out


class HandWritten(nn.Module):
    """Activations out of comparisons and selections, as many write them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 96)
        self.third, self.head = nn.Linear(96, 96), nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(1))
        h = self.second(h * (h > 0))
        h = self.third(torch.where(h > 0, h, 0.1 * h))
        h = h.masked_fill(h < 0, 0.0)
        out: Tensor = self.head(torch.maximum(h, 0.5 * h.flip(1)))
        return out


class Bounded(nn.Module):
    """Clamps and normalizes its input, in single precision whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.net = convolutional(nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net((x.float().clamp(0.0, 1.0) - 0.3) / 0.4)
        return out


TRAINED: dict[str, Callable[[], nn.Module]] = {
    "convolution, ReLU": lambda: convolutional(nn.ReLU),
    "convolution, GELU, group norm": lambda: convolutional(
        nn.GELU, lambda width: nn.GroupNorm(4, width)
    ),
    "convolution, batch norm": lambda: convolutional(nn.ReLU, nn.BatchNorm2d),
    "convolution, max pooling": lambda: convolutional(nn.ReLU, pool=lambda: nn.MaxPool2d(2)),
    "convolution, clamped float32 input": Bounded,
    "hand-written activations": HandWritten,
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
    "transformer": Attention,
    "implicit, own gradient": Implicit,
}


def trained(build: Callable[[], nn.Module], seed: int, threat: Threat | None) -> nn.Module:
    """A model after a minute of ordinary or adversarial training, less on a fast machine."""
    torch.manual_seed(seed)
    model = build()
    data = load_slice("digits", "train")
    x, y = torch.from_numpy(data.images).float() / 255, torch.from_numpy(data.labels)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for epoch in range(20):
        warmed = (
            None if threat is None else Threat(threat.norm, threat.epsilon * min(epoch, 10) / 10)
        )
        for rows in torch.randperm(len(x)).split(128):
            inputs = x[rows] if warmed is None else attacked(model, x[rows], y[rows], warmed)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), y[rows]).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


def attacked(model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    adversarial = x
    for _ in range(4):
        adversarial = adversarial.detach().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(model(adversarial), y), adversarial)
        moved = adversarial.detach() + 0.4 * threat.eps * threat.steepest(slope)
        adversarial = threat.project(x, moved)
    return adversarial.detach()


def controls(only: str, threat: Threat) -> Iterator[Control]:
    """All honest models whose names match, built one at a time."""
    for name in SHIPPED:
        for seed in SEEDS:
            if re.search(only, name):
                row = f"{name}_seed{seed}" if seed else name
                yield Control(name, seed, load_model(row))
    for kind, build in TRAINED.items():
        for way in ("clean", "adversarial"):
            for seed in SEEDS:
                name = f"{kind}, {way}"
                if re.search(only, name):
                    model = trained(build, seed, threat if way == "adversarial" else None)
                    yield Control(name, seed, model)


def shipped(only: str, data: str) -> Iterator[Control]:
    """All rows of a suite whose weights ship."""
    for entry in find_suite(data).defenses:
        if entry.weights and re.search(only, entry.id):
            yield Control(entry.id, 0, load_model(entry.id, data))


def report(values: dict[str, list[dict[str, Any]]], count: int) -> None:
    """One line per check, over all models."""
    print(f"\n{count} models")
    print(f"{'check':34} {'n':>3} {'least':>9} {'median':>9} {'largest':>9} {'limit':>8} failed")
    for name, rows in values.items():
        found = [row["value"] for row in rows if row["status"] != "skipped"]
        failed = sum(row["status"] == "failed" for row in rows)
        if not found:
            print(f"{name:34}   0")
            continue
        least, middle, most = min(found), float(np.median(found)), max(found)
        limit = rows[0]["threshold"]
        print(
            f"{name:34} {len(found):3} {least:9.3g} {middle:9.3g} {most:9.3g} {limit:8.3g} {failed}"
        )


def outcome(rows: list[dict[str, Any]]) -> str:
    failed = [row for row in rows if row["status"] == "failed"]
    flags = [f"{row['name']}={row['value']:.3g} ({row['detail']})" for row in failed]
    return "; ".join(flags) or "no flag"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="digits", choices=("digits", "mnist"))
    parser.add_argument("--threat", default="Linf:3/16")
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    threat = Threat.parse(arguments.threat)
    data = load_slice(arguments.data, "test", 100)
    x, y = torch.from_numpy(data.images).float() / 255, torch.from_numpy(data.labels)
    values: dict[str, list[dict[str, Any]]] = defaultdict(list)
    count = 0
    models = controls(arguments.only, threat)
    if arguments.data != "digits":
        models = shipped(arguments.only, arguments.data)
    for control in models:
        target = Target(control.model.eval(), 10)
        rows = run_checks(target, x, y, threat, seed=control.seed)
        for row in rows:
            values[cast("str", row["name"])].append(row)
        count += 1
        print(f"{control.name}, seed {control.seed}: {outcome(rows)}", flush=True)
    report(values, count)


if __name__ == "__main__":
    main()
