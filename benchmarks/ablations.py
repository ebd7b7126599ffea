"""Write leaderboards/digits-ablations.toml: one row per variant of each defense and seed.

python benchmarks/ablations.py

All models have width 48 and the schedule of `PGD` below, so that rows of one family differ in what
their IDs say. The SHA-256 of weights that the file names already are kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUITE = Path(__file__).resolve().parent.parent / "leaderboards" / "digits-ablations.toml"
SEEDS = (0, 1, 2)
Values = dict[str, Any]

SIZE: Values = {"width": 48, "inner": 48}
CELL: Values = {**SIZE, "gain": 0.8}
RATE: Values = {"epochs": 60, "learning_rate": 0.02}
SOLVE: Values = {"gradient": "phantom(4,1)", "solver_steps": 4}
RECIPES: dict[str, Values] = {
    "clean": RATE,
    "pgd_at": RATE,
    "trades": {**RATE, "beta": 3.0},
}
PREFIX = {"clean": "Standard", "pgd_at": "Madry2018Towards", "trades": "Zhang2019Theoretically"}


@dataclass(frozen=True)
class Row:
    """A row; rows that share `weights` share a training, which must not depend on the rest."""

    id: str
    defense: str
    parameters: Values
    recipe: str
    training: Values
    weights: str = ""
    seeds: tuple[int, ...] = (0,)
    evaluated: Values = field(default_factory=dict)


def lyadeq() -> Iterator[Row]:
    """Readings and ablations, each with three recipes."""
    variants: dict[str, Values] = {
        "module": {},
        "dynamics": {"reading": "dynamics"},
        "centered": {"reading": "centered"},
        "no_lyapunov": {"stability": "none"},
        "no_orthogonality": {"head": "linear"},
        "neither": {"stability": "none", "head": "linear"},
        "scale": {"stability": "scale"},
    }
    for name, changes in variants.items():
        for recipe, training in RECIPES.items():
            solve = {} if name == "dynamics" else SOLVE
            seeds = SEEDS if recipe == "pgd_at" and name in ("module", "neither") else (0,)
            parameters = {**CELL, "hidden": 32, **changes}
            id_ = f"Chu2023Learning_{name}_{recipe}"
            yield Row(id_, "lyadeq", parameters, recipe, {**training, **solve}, seeds=seeds)


def neural_dynamics() -> Iterator[Row]:
    """Each regulation alone, both, neither; and controls of the purifier."""
    for recipe in ("pgd_at", "trades"):
        base = {**RECIPES[recipe], "gradient": "phantom(5,0.5)"}
        for random_states in (False, True):
            training = {"base": recipe, "parameters": base} if random_states else base
            weights = f"{'random_states' if random_states else 'plain'}_{recipe}"
            forms: dict[str, Values] = {"": {}, "_entropy": {"regulation": "entropy"}}
            if recipe == "pgd_at":
                forms["_random_sign"] = {"regulation": "random_sign"}
                forms["_ensemble"] = {"output": "ensemble"}
                forms["_early"] = {"output": "early"}
            for form, changes in forms.items():
                yield Row(
                    f"Yang2023Improving_{weights}{form}",
                    "neural_dynamics",
                    CELL,
                    "random_states" if random_states else recipe,
                    training,
                    weights=f"neural_dynamics-{weights}",
                    seeds=SEEDS if recipe == "pgd_at" and not form else (0,),
                    evaluated=changes,
                )


def joint_optimization() -> Iterator[Row]:
    """The joint inner attack against PGD of equal work: evaluations plus products per image."""
    joint = {**RATE, **SOLVE}
    yield Row(
        "Gurumurthy2021Joint_joint42", "joint_optimization", CELL, "joint",
        {**joint, "steps": 42}, seeds=SEEDS,
    )  # fmt: skip
    yield Row(
        "Gurumurthy2021Joint_joint42_anderson", "joint_optimization", CELL, "joint",
        {**joint, "steps": 42, "memory": 3}, seeds=SEEDS,
    )  # fmt: skip
    yield Row(
        "Gurumurthy2021Joint_joint12", "joint_optimization", CELL, "joint",
        {**joint, "steps": 12, "step_size": 0.25}, seeds=SEEDS,
    )  # fmt: skip
    yield Row(
        "Gurumurthy2021Joint_pgd2", "joint_optimization", CELL, "pgd_at",
        {**joint, "steps": 2, "step_size": 0.75}, seeds=SEEDS,
    )  # fmt: skip


def weight_tied() -> Iterator[Row]:
    """Masks at one size; then depth, width and density at equal parameters and equal arithmetic."""
    dense: Values = {**CELL, "steps": 8}
    half: Values = {"mask": "distinct", "density": 0.5}
    masks: dict[str, Values] = {
        "dense": {},
        "distinct0.5": half,
        "distinct0.25": {"mask": "distinct", "density": 0.25},
        "distinct0.125": {"mask": "distinct", "density": 0.125},
        "identical0.5": {"mask": "identical", "density": 0.5},
        "disjoint": {"mask": "disjoint"},
    }
    for name, changes in masks.items():
        seeds = SEEDS if name in ("dense", "distinct0.5") else (0,)
        yield Row(f"Song2023Revisiting_{name}", "weight_tied", {**dense, **changes}, "pgd_at", RATE,
                  seeds=seeds)  # fmt: skip
        if name in ("dense", "distinct0.5"):
            yield Row(f"Song2023Revisiting_{name}_clean", "weight_tied", {**dense, **changes},
                      "clean", RATE)  # fmt: skip
    shapes: dict[str, Values] = {
        "steps4": {"steps": 4},
        "steps16": {"steps": 16},
        "steps2_width96": {"steps": 2, "width": 96, "inner": 96},
        "steps32_width24": {"steps": 32, "width": 24, "inner": 24},
    }
    for name, shape in shapes.items():
        for mask, changes in (("dense", {}), ("distinct0.5", half)):
            yield Row(f"Song2023Revisiting_{mask}_{name}", "weight_tied",
                      {**dense, **shape, **changes}, "pgd_at", RATE)  # fmt: skip


def federated() -> Iterator[Row]:
    """Fusion weights and partitions, clean and adversarial; then one model at each K."""
    for recipe in ("clean", "pgd_at"):
        # A client that can afford K steps unrolls K; smaller batches, since shards are small.
        base = {"learning_rate": 0.016, "batch_size": 32}
        for partition in ("iid", "dirichlet"):
            for weighting in ("samples", "steps", "softmax", "residual"):
                weights = f"{weighting}_{partition}_{recipe}"
                training = {
                    **FEDERATION, "base": recipe, "weighting": weighting, "partition": partition,
                    "parameters": base,
                }  # fmt: skip
                three = recipe == "pgd_at" and weighting in ("samples", "steps")
                forms: dict[str, Values] = {"": {}}
                if recipe == "pgd_at" and weighting == "steps":
                    forms |= {f"_at{k}": {"steps": k} for k in (4, 8, 16)}
                for form, changes in forms.items():
                    yield Row(
                        f"Gkillas2023Deep_{weights}{form}",
                        "federated",
                        CELL,
                        "federated",
                        training,
                        weights=f"federated-{weights}",
                        seeds=SEEDS if three and not form else (0,),
                        evaluated=changes,
                    )


FEDERATION: Values = {
    "rounds": 40, "local_epochs": 2, "clients": 8, "client_steps": [4, 8, 16], "concentration": 0.1,
}  # fmt: skip


def controls() -> Iterator[Row]:
    """The plain DEQ and an explicit network of as many parameters, with three recipes."""
    for recipe, training in RECIPES.items():
        seeds = SEEDS if recipe == "pgd_at" else (0,)
        yield Row(f"{PREFIX[recipe]}_deq", "deq", CELL, recipe, {**training, **SOLVE},
                  weights=f"deq-{recipe}", seeds=seeds)  # fmt: skip
        yield Row(f"{PREFIX[recipe]}_wide_resnet", "wide_resnet", WIDE, recipe, training,
                  weights=f"wide_resnet-{recipe}", seeds=seeds)  # fmt: skip


WIDE: Values = {"groups": 2, "base": 10, "depth": 7}

HEAD = """\
# Written by benchmarks/ablations.py; edit that file, not this one.
format = 1
name = "digits-ablations"
description = "Every variant of every defense on 8x8 digits, width 48; seeds in the IDs"
seed = 0
chunk = 50
threats = ["Linf:3/16"]
battery = "standard"

[[datasets]]
name = "digits"
samples = 50

[[attacks]]
attack = "pgd"
parameters = { steps = 40, loss = "margin", restarts = 2 }
gradients = ["honest", "unrolled(20)", "phantom(5,0.5)"]
"""


def rows() -> Iterator[Row]:
    """All of them."""
    for family in (controls, lyadeq, neural_dynamics, joint_optimization, weight_tied, federated):
        yield from family()


def toml(value: Any) -> str:
    """A value as inline TOML."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml(v) for v in value) + "]"
    return json.dumps(value)


def entry(row: Row, seed: int, sha256: dict[str, str]) -> str:
    """A row's table."""
    suffix = f"_seed{seed}" if seed else ""
    name = row.weights or f"{row.defense}-{row.id.partition('_')[2]}"
    file = f"digits48-{name}{suffix}.safetensors"
    training = {"recipe": row.recipe, "seed": seed, "parameters": row.training}
    return (
        f'\n[[defenses]]\nid = "{row.id}{suffix}"\ndefense = "{row.defense}"\n'
        f"parameters = {toml({**row.parameters, **row.evaluated})}\n"
        f'weights = "{file}"\nsha256 = "{sha256.get(file, "")}"\ntraining = {toml(training)}\n'
    )


def main() -> None:
    held = SUITE.read_text(encoding="utf-8") if SUITE.exists() else ""
    sha256 = dict(re.findall(r'weights = "([^"]+)"\nsha256 = "([0-9a-f]*)"', held))
    entries = [entry(row, seed, sha256) for row in rows() for seed in row.seeds]
    SUITE.write_text(HEAD + "".join(entries), encoding="utf-8")
    print(f"{len(entries)} rows in {SUITE}")


if __name__ == "__main__":
    main()
