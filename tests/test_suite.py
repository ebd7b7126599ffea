from __future__ import annotations

import pytest

from robustdeq.errors import UsageError
from robustdeq.suite import (
    adjusted,
    attacks_of,
    battery,
    expand,
    find_suite,
    parse_suite,
    suite_names,
)

SMALL = """
name = "small"
threats = ["Linf:0.1", "L2:0.5"]
battery = "standard"
[[datasets]]
name = "digits"
samples = 10
[[defenses]]
id = "One"
defense = "feedforward"
[[defenses]]
id = "Two"
defense = "deq"
threats = ["L2:0.5"]
"""


def test_expansion_is_rows_times_threats() -> None:
    cases = expand(parse_suite(SMALL, "small", None))
    assert [(c.entry.id, str(c.threat)) for c in cases] == [
        ("One", "Linf:0.1"),
        ("One", "L2:0.5"),
        ("Two", "L2:0.5"),
    ]


@pytest.mark.parametrize("name", suite_names())
def test_shipped_suites_parse(name: str) -> None:
    suite = find_suite(name)
    assert suite.name == name
    assert expand(suite)


def test_shipped_digits_suite_is_fourteen_rows_of_at_least_a_hundred_samples() -> None:
    suite = find_suite("digits")
    assert len(expand(suite)) == 14
    assert all(dataset.samples >= 100 for dataset in suite.datasets)
    assert all(entry.sha256 for entry in suite.defenses)


def test_keys_do_not_depend_on_what_was_left_to_defaults() -> None:
    text = SMALL + '[[attacks]]\nattack = "pgd"\n'
    spelled = text + "parameters = { steps = 40, loss = 'ce' }\n"
    assert attacks_of(parse_suite(text, "s", None)) == attacks_of(parse_suite(spelled, "s", None))


def test_rows_are_chosen_by_a_regular_expression() -> None:
    suite = find_suite("digits")
    chosen = adjusted(suite, None, None, "2021|2023")
    assert {e.defense for e in chosen.defenses} == {
        "lyadeq", "neural_dynamics", "joint_optimization", "weight_tied", "federated",
    }  # fmt: skip
    with pytest.raises(UsageError, match="no row of suite digits"):
        adjusted(suite, None, None, "2022")
    with pytest.raises(UsageError, match="no regular expression"):
        adjusted(suite, None, None, "(")


def test_a_threat_in_place_of_the_suites() -> None:
    weaker = adjusted(find_suite("digits"), None, None, "Madry", "Linf:1/16")
    assert {str(case.threat) for case in expand(weaker)} == {"Linf:1/16"}
    # The weights are those of the suite's own threat still.
    assert {e.training.threat for e in weaker.defenses if e.training} == {"Linf:3/16"}
    one = adjusted(find_suite("cifar10"), None, None, None, "L2:0.5")
    whole = [case for case in expand(find_suite("cifar10")) if str(case.threat) == "L2:0.5"]
    assert [case.entry.id for case in expand(one)] == [case.entry.id for case in whole]
    with pytest.raises(UsageError, match="does not parse"):
        adjusted(find_suite("digits"), None, None, None, "Linf")


def test_command_line_overrides() -> None:
    suite = adjusted(find_suite("digits"), samples=7, battery_name="standard")
    assert suite.datasets[0].samples == 7
    assert attacks_of(suite) == tuple(attacks_of(suite))
    assert {entry.attack for entry in attacks_of(suite)} == {"autoattack"}
    assert {entry.track for entry in battery("standard")} == {"deterministic", "randomized"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("name = ", "nmae = "), "did you mean 'name'"),
        (('name = "digits"', 'name = "digitz"'), "did you mean 'digits'"),
        (('defense = "deq"', 'defense = "dqe"'), "did you mean 'deq'"),
        (('"Linf:0.1"', '"Linf:-0.1"'), "negative"),
        (('"Linf:0.1"', '"Linf:"'), "does not parse"),
        (('id = "Two"', 'id = "One"'), "its own id"),
        (('battery = "standard"', 'battery = "standart"'), "did you mean 'standard'"),
        (('battery = "standard"', ""), "no attacks"),
        (("samples = 10", 'samples = "ten"'), "whole number"),
        (("[[defenses]]\nid", "[[defenses]]\nidd"), "did you mean 'id'"),
        (('name = "small"', 'name = "small'), "not valid TOML"),
        (('name = "small"', 'name = "small"\nformat = 9'), "format 9"),
        (('name = "small"', 'name = "small"\nchunk = 0'), "chunk = 0"),
        (('id = "Two"\n', ""), "missing"),
    ],
)
def test_malformed_suites_are_refused_in_one_sentence(
    change: tuple[str, str], message: str
) -> None:
    assert change[0] in SMALL
    with pytest.raises(UsageError, match=message) as caught:
        parse_suite(SMALL.replace(*change), "small.toml", None)
    assert "\n" not in str(caught.value)


def test_unknown_suites_suggest_a_name() -> None:
    with pytest.raises(UsageError, match="did you mean 'digits'"):
        find_suite("digit")
    with pytest.raises(UsageError, match="does not exist"):
        find_suite("nowhere/suite.toml")
    with pytest.raises(UsageError, match="--samples is 0"):
        adjusted(find_suite("digits"), 0, None)
