"""Each defense of the field by its handle: trained by the command, then a row of a suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from robustdeq import cli
from robustdeq.interfaces import About
from robustdeq.registry import plugin_class, registered
from robustdeq.suite import find_suite

HANDLES: dict[str, list[str]] = {
    "lyadeq": ["epochs=1"],
    "neural_dynamics": ["base=pgd_at", "parameters={epochs = 1, steps = 1}"],
    "joint_optimization": ["epochs=1", "steps=3"],
    "weight_tied": ["epochs=1", "steps=1"],
    "federated": ["rounds=1", "clients=2", "parameters={steps = 1}"],
    "deq": ["epochs=1", "steps=1", "gradient=one_step", "solver_steps=4"],
    "feedforward": ["epochs=1"],
    "wide_resnet": ["epochs=1", "steps=1"],
}
SIZE = {"wide_resnet": ["depth=7", "groups=2", "base=4"], "weight_tied": ["mask=distinct"]}
SUITE = """
name = "mine"
threats = ["Linf:1/16"]
chunk = 10
[[datasets]]
name = "digits"
samples = 10
[[attacks]]
attack = "pgd"
parameters = { steps = 3 }
gradients = ["honest", "phantom(2,0.5)"]
[[defenses]]
id = "Mine"
defense = "HANDLE"
parameters = { SIZE }
weights = "x.safetensors"
"""


def command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["robustdeq", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def trained(handle: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    arguments = ["train", handle, "--dataset", "digits", "--out", str(folder / "x.safetensors")]
    for item in SIZE.get(handle, []):
        arguments += ["--set", item]
    for item in HANDLES[handle]:
        arguments += ["--recipe-set", item]
    return command([*arguments, *more], monkeypatch)


def row_of(handle: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    size = ", ".join(
        f'{k} = "{v}"' if v.isalpha() else f"{k} = {v}"
        for k, v in (item.split("=") for item in SIZE.get(handle, []))
    )
    suite = folder / "mine.toml"
    suite.write_text(SUITE.replace("HANDLE", handle).replace("SIZE", size))
    assert command(["run", str(suite), "--out", str(folder / "out")], monkeypatch) == 0
    return pd.read_csv(folder / "out" / "mine" / "table.csv").iloc[0]


@pytest.mark.parametrize("handle", HANDLES)
def test_a_handle_is_trained_and_becomes_a_row(
    handle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trained(handle, tmp_path, monkeypatch, "--minutes", "5") == 0
    row = row_of(handle, tmp_path, monkeypatch)
    assert row["status"] == "ok"
    assert 0 <= row["robust_acc"] <= row["clean_acc"] <= 1
    assert row["rank"] == 1
    assert "incomplete" not in str(row["flags"])


def test_weights_of_an_incomplete_training_make_a_row_that_is_not_ranked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HANDLES, "feedforward", ["epochs=1000"])
    assert trained("feedforward", tmp_path, monkeypatch, "--minutes", "0.01") == 1
    row = row_of("feedforward", tmp_path, monkeypatch)
    assert row["status"] == "ok"
    assert "incomplete_training=1" in row["flags"]
    assert pd.isna(row["rank"])


def test_every_defense_of_the_field_says_where_it_comes_from_and_what_was_found() -> None:
    for name in ("lyadeq", "neural_dynamics", "joint_optimization", "weight_tied", "federated"):
        about: About = plugin_class("defense", name).about
        assert all((about.title, about.authors, about.venue, about.claimed, about.reproduced))
        assert about.link.startswith("https://arxiv.org/abs/")
    assert set(registered("defense")) >= {*HANDLES, "robustbench"}


def test_the_ablation_suite_has_every_handle_and_three_seeds() -> None:
    suite = find_suite("digits-ablations")
    ids = [entry.id for entry in suite.defenses]
    assert len(ids) == len(set(ids))
    for handle in ("lyadeq", "neural_dynamics", "joint_optimization", "weight_tied", "federated"):
        assert any(entry.defense == handle for entry in suite.defenses)
    seeds = [entry.training.seed for entry in suite.defenses if entry.training]
    assert set(seeds) == {0, 1, 2}
    assert all(f"_seed{s}" in i for s, i in zip(seeds, ids, strict=True) if s)
