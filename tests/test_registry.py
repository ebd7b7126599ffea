from __future__ import annotations

import shutil
from pathlib import Path

import acme
import pytest

from robustdeq.errors import UsageError
from robustdeq.listing import listed
from robustdeq.registry import Kind, load, parameters_of, plugin_class, registered


def test_built_in_plugins_are_found_through_entry_points() -> None:
    assert {"deq", "feedforward", "weight_tied"} <= set(registered("defense"))
    assert {"pgd", "autoattack", "square"} <= set(registered("attack"))
    assert {"clean", "pgd_at", "trades"} <= set(registered("recipe"))


def test_a_strangers_plugin_stands_beside_the_built_in_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme.install(tmp_path, monkeypatch)
    assert registered("defense")["acme"].distribution == "acme-defenses"
    assert parameters_of(load("defense", "acme", {"trick": "nan"})) == {"trick": "nan"}


def test_what_is_installed_or_removed_later_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What distributions offer is read once, until there are others."""
    monkeypatch.syspath_prepend(tmp_path)
    assert "acme" not in registered("defense")
    acme.register(tmp_path, "acme-defenses", acme.ENTRY_POINTS, "acme_plugins", acme.PLUGINS)
    assert "acme" in registered("defense")
    (info,) = tmp_path.glob("*.dist-info")
    shutil.rmtree(info)
    assert "acme" not in registered("defense")


def test_a_plugin_that_does_not_import_stops_with_its_name_distribution_and_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme.install(tmp_path, monkeypatch)
    with pytest.raises(UsageError, match=r"'broken'.*acme-defenses.*acme_missing_module"):
        plugin_class("defense", "broken")
    rows = {row["name"]: row for row in listed("defenses")}
    assert "acme_missing_module" in rows["broken"]["error"]
    assert "error" not in rows["acme"]


def test_two_distributions_cannot_share_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("acme-defenses", "other-defenses"):
        folder = tmp_path / name
        folder.mkdir()
        acme.install(folder, monkeypatch, name)
    with pytest.raises(UsageError, match=r"both .*-defenses and .*-defenses"):
        registered("defense")


@pytest.mark.parametrize(
    ("kind", "name", "parameters", "message"),
    [
        ("attack", "pdg", {}, "did you mean 'pgd'"),
        ("defense", "weight_tide", {}, "did you mean 'weight_tied'"),
        ("attack", "pgd", {"step": 3}, "did you mean 'steps'"),
        ("attack", "pgd", {"steps": "many"}, "give int"),
        ("attack", "pgd", {"steps": True}, "give int"),
        ("attack", "pgd", {"loss": "cw"}, "'margin'"),
        ("attack", "pgd", {"steps": 0}, "at least 1 step"),
        ("defense", "deq", {"max_steps": 2.5}, "give int"),
    ],
)
def test_wrong_names_and_values(
    kind: Kind, name: str, parameters: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load(kind, name, parameters)  # type: ignore[call-overload]


def test_whole_numbers_widen_to_floats() -> None:
    assert repr(parameters_of(load("defense", "deq", {"gain": 1}))["gain"]) == "1.0"
