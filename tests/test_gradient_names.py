"""The names of gradients in suites, and the named sets of them."""

from __future__ import annotations

import pytest

from robustdeq.differentiation import (
    BIAS,
    BPDA,
    NES,
    Expectation,
    FiniteDifference,
    Gradient,
    Smoothed,
    StraightThrough,
    expand_gradients,
    parse_gradient,
    white_box_protocol,
)
from robustdeq.equilibrium import Backprop, Implicit, Intermediate, SimultaneousAdjoint
from robustdeq.errors import UsageError

NAMES = {
    "implicit(1e-8)": Implicit(tolerance=1e-8),
    "implicit(0.001)": Implicit(tolerance=1e-3),
    "backprop": Backprop(),
    "intermediate(3,5,0.5)": Intermediate(3, 5, 0.5),
    "intermediate(8,9,1)": Intermediate(8, 9),
    "simultaneous_adjoint": SimultaneousAdjoint(),
    "simultaneous_adjoint(0.5)": SimultaneousAdjoint(0.5),
    "bpda(purifier)": BPDA("purifier"),
    "bpda(net.0)": BPDA("net.0"),
    "bpda(0)": BPDA("0"),
    "bpda(net.0,torch.nn.functional:relu)": BPDA("net.0", "torch.nn.functional:relu"),
    "nes(32,0.05)": NES(),
    "nes(64,0.02)": NES(64, 0.02),
    "finite_difference(0.03)": FiniteDifference(),
    "eot(8)": Expectation(8),
    "eot(8,straight_through)": Expectation(8, True),
    "smoothed(8,0.05)": Smoothed(8, 0.05),
    "smoothed(8,0.05,straight_through)": Smoothed(8, 0.05, True),
    "straight_through": StraightThrough(),
    "straight_through(double)": StraightThrough(double=True),
}


@pytest.mark.parametrize(("text", "gradient"), NAMES.items(), ids=list(NAMES))
def test_names_are_read_and_written_in_one_form(text: str, gradient: Gradient) -> None:
    assert parse_gradient(text) == gradient
    assert str(gradient) == text
    spaced = text.replace(",", " , ").replace("(", " ( ")
    assert parse_gradient(f" {spaced} ") == gradient


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("nes", "nes(32,0.05)"),
        ("nes(4)", "nes(4,0.05)"),
        ("finite_difference", "finite_difference(0.03)"),
        ("phantom(5)", "phantom(5,1)"),
        ("intermediate(1,2)", "intermediate(1,2,1)"),
        ("simultaneous_adjoint(1)", "simultaneous_adjoint"),
        ("implicit(1.0e-07)", "implicit(1e-7)"),
        ("phantom(5,0.30000000000000004)", "phantom(5,0.30000000000000004)"),
    ],
)
def test_defaults_are_spelled_out(short: str, full: str) -> None:
    assert str(parse_gradient(short)) == full


BAD = """
implicit(0) implicit(x) implicit(1,2) backprop(3) intermediate intermediate(0,1,1)
intermediate(1,0,1) intermediate(1,1,0) intermediate(1.5,1,1) simultaneous_adjoint(2)
simultaneous_adjoint(nan) bpda bpda() bpda(a,b,c) bpda(a,) nes(0) nes(2,0) nes(2,inf) nes(2,nan)
finite_difference(-1) eot eot(0) eot(2,through) smoothed(2) smoothed(0,0.1) smoothed(2,0.1,x)
straight_through(triple) unrolled(2.5) white_box_protocol
"""


@pytest.mark.parametrize("text", BAD.split())
def test_names_that_do_not_parse_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_gradient(text)


def test_the_message_lists_every_kind_and_each_has_a_word_on_its_bias() -> None:
    with pytest.raises(UsageError) as caught:
        parse_gradient("gradient")
    assert all(kind in str(caught.value) for kind in BIAS)
    assert [kind for kind, bias in BIAS.items() if not bias] == ["backprop"]
    assert all(bias.endswith(".") for bias in BIAS.values() if bias)


def test_the_white_box_protocol_is_a_word_for_its_144_gradients() -> None:
    names = white_box_protocol()
    assert len(set(names)) == 144
    found = {(g.state, g.steps, g.damping) for g in map(parse_gradient, names)}
    assert found == {(i, k, b) for i in range(1, 9) for k in range(1, 10) for b in (0.5, 1.0)}
    assert tuple(str(parse_gradient(name)) for name in names) == names
    expanded = expand_gradients(["backprop", "white_box_protocol", "nes"])
    assert expanded == ("backprop", *names, "nes")
    assert expand_gradients(["honest"]) == ("honest",)
