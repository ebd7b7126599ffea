from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustdeq.errors import UsageError
from robustdeq.threats import Norm, Threat, Violation

seeds = st.integers(0, 2**31)
radii = st.fractions(min_value=0, max_value=2, max_denominator=255)
norms = st.sampled_from(list(Norm))


def images(seed: int, scale: float = 1.0, n: int = 3) -> torch.Tensor:
    return scale * torch.rand(n, 2, 3, 3, generator=torch.Generator().manual_seed(seed))


@given(norms, radii)
def test_text_is_read_back_exactly(norm: Norm, radius: Fraction) -> None:
    threat = Threat(norm, radius)
    assert Threat.parse(str(threat)) == threat


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Linf:8/255", "Linf:8/255"),
        ("linf: 0.3", "Linf:0.3"),
        ("L2:1/2", "L2:0.5"),
        ("L2:.5", "L2:0.5"),
    ],
)
def test_equal_threats_have_one_text(text: str, shown: str) -> None:
    assert str(Threat.parse(text)) == shown


@pytest.mark.parametrize(
    "text",
    ["", "Linf", "8/255", "L3:1", "Linf:", "Linf:x", "Linf:1/0", "Linf:nan", "Linf:inf",
     "Linf:1e999999999", "Linf:-8/255", "L2:-0.5", "Linf:8/255/2"],
)  # fmt: skip
def test_what_does_not_parse_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Threat.parse(text)
    assert "\n" not in str(caught.value)


@given(norms, radii, seeds, seeds)
def test_projection_is_admissible_and_idempotent(
    norm: Norm, radius: Fraction, a: int, b: int
) -> None:
    threat = Threat(norm, radius)
    x, candidate = images(a), images(b, 4.0) - 1.5
    projected = threat.project(x, candidate)
    assert threat.violations(x, projected) == [Violation.NONE] * 3
    torch.testing.assert_close(threat.project(x, projected), projected, atol=1e-6, rtol=0)


@given(norms, seeds, seeds)
def test_projection_leaves_admissible_points_alone(norm: Norm, a: int, b: int) -> None:
    threat, x = Threat(norm, Fraction(20)), images(a)
    candidate = images(b)
    torch.testing.assert_close(threat.project(x, candidate), candidate)


@given(seeds, seeds)
def test_distance_is_that_of_numpy(a: int, b: int) -> None:
    x, y = images(a), images(b)
    delta = (x.double() - y.double()).flatten(1).numpy()
    for norm, order in ((Norm.LINF, float("inf")), (Norm.L2, 2)):
        expected = [float(torch.linalg.vector_norm(torch.from_numpy(d), order)) for d in delta]
        assert Threat(norm, Fraction(1)).distance(x, y).tolist() == pytest.approx(expected)


@given(norms, seeds, seeds)
def test_steepest_direction_beats_any_other_of_unit_norm(norm: Norm, a: int, b: int) -> None:
    threat, gradient = Threat(norm, Fraction(1)), images(a) - 0.5
    other = threat.steepest(images(b) - 0.5)
    gain = (threat.steepest(gradient) * gradient).flatten(1).sum(1)
    assert bool((gain >= (other * gradient).flatten(1).sum(1) - 1e-5).all())


@given(norms, radii, seeds)
def test_random_offsets_stay_in_the_ball(norm: Norm, radius: Fraction, seed: int) -> None:
    threat = Threat(norm, radius)
    uniform = images(seed) * 2 - 1
    offset = threat.random_offset(uniform, torch.tensor([0.0, 0.5, 1.0]))
    assert float(threat.distance(torch.zeros_like(offset), offset).max()) <= threat.eps + 1e-6


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: x.fill_(torch.nan), Violation.NONFINITE),
        (lambda x: x.fill_(torch.inf), Violation.NONFINITE),
        (lambda x: x.add_(0.2), Violation.BALL),
        (lambda x: x.fill_(1.01), Violation.BOX),
        (lambda x: x.fill_(-0.01), Violation.BOX),
        (lambda x: x.add_(0.1), Violation.NONE),
        (lambda x: x.add_(0.1 + 5e-6), Violation.BALL),
    ],
)
def test_violations_are_named(change: object, expected: Violation) -> None:
    x = torch.full((2, 1, 2, 2), 0.5)
    candidate = x.clone()
    change(candidate[1])  # type: ignore[operator]
    assert Threat.parse("Linf:0.1").violations(x, candidate) == [Violation.NONE, expected]
