"""Intervals, tests, ranks and comparisons, against enumeration and independent formulas."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest, skellam

from robustdeq.comparison import Comparison, claim, compare, comparison_text
from robustdeq.errors import UsageError
from robustdeq.statistics import holm, mcnemar, one_sided, paired, ranks, spread, wilson
from robustdeq.verdict import Verdict

SETTINGS = settings(derandomize=True, deadline=None, max_examples=60)
Bools = NDArray[np.bool_]
PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)


def cells(only_a: int, only_b: int, both: int = 0, neither: int = 0) -> tuple[Bools, Bools]:
    """Two vectors with given counts of the four cells."""
    a = [True] * only_a + [False] * only_b + [True] * both + [False] * neither
    b = [False] * only_a + [True] * only_b + [True] * both + [False] * neither
    return np.array(a, dtype=bool), np.array(b, dtype=bool)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("n", [1, 7, 50, 10_000])
def test_wilson_agrees_with_scipy(n: int, level: float) -> None:
    for k in {0, 1, n // 3, n - 1, n}:
        expected = binomtest(k, n).proportion_ci(level, method="wilson")
        assert wilson(k, n, level) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert 0 <= wilson(k, n, level).low <= k / n <= wilson(k, n, level).high <= 1


def test_wilsons_ends_are_where_the_score_test_is_at_its_level() -> None:
    low, high = wilson(13, 40)
    for p in (low, high):
        score = abs(13 / 40 - p) / math.sqrt(p * (1 - p) / 40)
        assert score == pytest.approx(1.959963984540054)


@pytest.mark.parametrize(("k", "n", "level"), [(-1, 5, 0.9), (6, 5, 0.9), (0, 0, 0.9), (1, 2, 1)])
def test_wilson_refuses_what_is_no_share(k: int, n: int, level: float) -> None:
    with pytest.raises(ValueError, match="no Wilson interval"):
        wilson(k, n, level)


def test_mcnemar_counts_all_tosses_of_the_discordant_samples() -> None:
    for a, b in itertools.product(range(6), repeat=2):
        heads = [sum(tosses) for tosses in itertools.product([0, 1], repeat=a + b)]
        far = [h for h in heads if abs(2 * h - a - b) >= abs(a - b)]
        assert mcnemar(a, b) == pytest.approx(len(far) / len(heads))
        assert one_sided(a, b) == pytest.approx(sum(h <= a for h in heads) / len(heads))


@pytest.mark.parametrize(("a", "b"), [(0, 0), (3, 3), (20, 9), (0, 60), (170, 210), (2000, 2300)])
def test_mcnemar_agrees_with_exact_fractions_and_scipy(a: int, b: int) -> None:
    n, low = a + b, min(a, b)
    tail = Fraction(sum(math.comb(n, k) for k in range(low + 1)), 2**n)
    assert mcnemar(a, b) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-10)
    assert mcnemar(a, b) == mcnemar(b, a)
    if n:
        assert mcnemar(a, b) == pytest.approx(binomtest(a, n).pvalue, rel=1e-10)
        less = binomtest(a, n, alternative="less").pvalue
        assert one_sided(a, b) == pytest.approx(less, rel=1e-10)
    else:
        assert mcnemar(a, b) == one_sided(a, b) == 1


def test_one_sided_is_small_where_a_is_worse_only() -> None:
    assert one_sided(1, 15) < 0.001
    assert one_sided(15, 1) > 0.999
    for call in (mcnemar, one_sided):
        with pytest.raises(ValueError, match="not negative"):
            call(-1, 2)


@SETTINGS
@given(PAIRS, st.randoms(use_true_random=False))
def test_paired_turns_its_sign_when_swapped_and_knows_no_order(
    pairs: list[tuple[bool, bool]], random: object
) -> None:
    a, b = np.array(pairs).T
    found, swapped = paired(a, b, draws=2000), paired(b, a, draws=2000)
    assert found.difference == pytest.approx(a.mean() - b.mean())
    assert found.difference == -swapped.difference
    assert found.p_value == swapped.p_value
    assert (found.only_a, found.only_b) == (swapped.only_b, swapped.only_a)
    if found.difference:
        assert (found.low, found.high) == (-swapped.high, -swapped.low)
    else:  # the same draws: mirrored up to their noise
        step = 1 / len(a) + 0.02
        assert (found.low, found.high) == pytest.approx((-swapped.high, -swapped.low), abs=step)
    assert -1 <= found.low <= found.difference <= found.high <= 1
    random.shuffle(pairs)
    a, b = np.array(pairs).T
    assert paired(a, b, draws=2000) == found


@pytest.mark.parametrize("counts", [(30, 12), (7, 0), (3, 3), (0, 0)])
def test_the_interval_is_that_of_all_resamples(counts: tuple[int, int]) -> None:
    """Against the exact distribution: the n-fold convolution of one resampled sample."""
    n = 60
    a, b = cells(*counts, both=n - sum(counts))
    one = np.array([counts[1] + 1, n - sum(counts), counts[0] + 1]) / (n + 2)
    exact = np.array([1.0])
    for _ in range(n):
        exact = np.convolve(exact, one)
    cumulative = exact.cumsum()
    ends = [(int(np.searchsorted(cumulative, q)) - n) / n for q in (0.025, 0.975)]
    found = paired(a, b, draws=40_000)
    assert (found.low, found.high) == pytest.approx(ends, abs=1.01 / n)
    assert found.low < found.high


def test_drawing_cells_is_drawing_samples() -> None:
    """Against resampling the vectors themselves, with the two added samples in them."""
    a, b = cells(34, 15, both=81, neither=70)
    gains = [*(a.astype(int) - b.astype(int)).tolist(), 1, -1]
    index = np.random.default_rng(1).integers(len(gains), size=(4000, len(a)))
    means = np.array(gains)[index].mean(axis=1)
    found = paired(a, b)
    ends = np.quantile(means, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx(tuple(ends), abs=0.011)


def test_a_seed_decides_the_interval_and_nothing_else() -> None:
    a, b = cells(301, 155, both=811, neither=707)
    one, same, other = paired(a, b), paired(a, b, seed=0), paired(a, b, seed=1)
    assert one == same
    assert (one.low, one.high) != (other.low, other.high)
    assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=0.003)
    assert one._replace(low=0, high=0) == other._replace(low=0, high=0)


@pytest.mark.parametrize(
    ("n", "p", "q"),
    [(200, 0.1, 0.02), (200, 0.2, 0.1), (100, 0.3, 0.3), (200, 0.1, 0.0), (1000, 0.1, 0.02)],
)
def test_the_interval_covers_the_truth_as_often_as_it_says(n: int, p: float, q: float) -> None:
    drawn = np.random.RandomState(7).multinomial(n, [p, q, 1 - p - q], size=400)
    found = {
        (a, b): paired(*cells(a, b, both=n - a - b), draws=2000)
        for a, b in {(int(a), int(b)) for a, b, _ in drawn}
    }
    covered = [found[a, b].low - 1e-9 <= p - q <= found[a, b].high + 1e-9 for a, b, _ in drawn]
    assert 0.92 <= np.mean(covered) <= 0.98


def test_the_interval_covers_the_truth_where_few_samples_differ() -> None:
    """Where the plain bootstrap covers in 38 % of the cases only (n = 50, one model nested)."""
    n, p = 50, 0.01
    drawn = np.random.RandomState(7).binomial(n, p, size=400)
    found = {int(k): paired(*cells(int(k), 0, both=n - int(k)), draws=2000) for k in set(drawn)}
    assert np.mean([found[k].low <= p <= found[k].high for k in drawn]) >= 0.95


def test_interval_and_p_value_rarely_disagree() -> None:
    n, found = 200, []
    for a in range(25):
        for b in range(a):
            result = paired(*cells(a, b, both=n - a - b), draws=4000)
            found.append((result.low > 0) == (result.p_value < 0.05))
    assert len(found) == 300
    assert np.mean(found) >= 0.98
    # The limit of many samples: the difference of two Poisson counts.
    assert skellam.ppf(0.025, 7, 1) == pytest.approx(
        10_000 * paired(*cells(6, 0, both=9_994)).low, abs=1
    )


def test_what_is_no_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        paired([True, False], [True, False, True])
    for wrong in ([0, 1], [0.5, 1.0], [[True], [False]], []):
        with pytest.raises(ValueError, match="booleans"):
            paired(wrong, wrong)
        with pytest.raises(ValueError, match="booleans"):
            ranks([wrong])


@SETTINGS
@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_closes_bonferroni(p_values: list[float]) -> None:
    """A hypothesis is rejected where Bonferroni rejects every intersection that it is part of."""
    k = len(p_values)
    subsets = [s for size in range(1, k + 1) for s in itertools.combinations(range(k), size)]
    expected = [
        max(min(1.0, len(s) * min(p_values[i] for i in s)) for s in subsets if j in s)
        for j in range(k)
    ]
    assert holm(p_values).tolist() == pytest.approx(expected)


def brute_ranks(rows: Sequence[Bools], level: float) -> list[int]:
    pairs = list(itertools.combinations(range(len(rows)), 2))
    p = {}
    for i, j in pairs:
        a, b = int((rows[i] & ~rows[j]).sum()), int((rows[j] & ~rows[i]).sum())
        p[i, j] = binomtest(a, a + b).pvalue if a + b else 1.0
    rejected: set[tuple[int, int]] = set()
    for left, pair in zip(range(len(pairs), 0, -1), sorted(pairs, key=p.__getitem__), strict=True):
        if p[pair] * left >= level:
            break
        rejected.add(pair)
    beaten = [i if rows[i].sum() < rows[j].sum() else j for i, j in rejected]
    return [1 + beaten.count(k) for k in range(len(rows))]


@SETTINGS
@given(st.lists(st.floats(0, 1), min_size=1, max_size=7), st.integers(0, 10**6))
def test_ranks_are_those_of_pairwise_tests(rates: list[float], seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = [random.random(80) < rate for rate in rates]
    found = ranks(rows)
    assert found == brute_ranks(rows, 0.05)
    better = [sum(other.sum() > row.sum() for other in rows) for row in rows]
    assert all(rank <= 1 + count for rank, count in zip(found, better, strict=True))
    order = random.permutation(len(rows))
    assert ranks([rows[k] for k in order]) == [found[k] for k in order]
    shuffled = random.permutation(80)
    assert ranks([row[shuffled] for row in rows]) == found


def test_ranks_tie_what_differs_by_chance() -> None:
    best, close, far = np.arange(100) < 80, np.arange(100) < 77, np.arange(100) < 40
    assert ranks([far, close, best]) == [3, 1, 1]
    assert ranks([best, best]) == [1, 1]
    assert ranks([best]) == [1]
    assert ranks([]) == []
    # Six nested samples: p = 0.03125 alone, but not among six pairs.
    six = np.arange(100) < 74
    assert ranks([best, six]) == [1, 2]
    assert ranks([best, six, best, best]) == [1, 1, 1, 1]
    assert ranks([best, six], level=0.03) == [1, 1]


def test_equal_models_are_seldom_told_apart() -> None:
    """Holm holds the chance of any false difference among five equal rows to 5 %."""
    random = np.random.default_rng(5)
    wrong = [max(ranks(list(random.random((5, 120)) < 0.5))) > 1 for _ in range(400)]
    assert np.mean(wrong) <= 0.06


def test_ranks_refuse_rows_on_different_samples() -> None:
    with pytest.raises(ValueError, match="different samples"):
        ranks([np.ones(3, dtype=bool), np.ones(4, dtype=bool)])


def test_spread_is_that_of_numpy() -> None:
    values = [0.48, 0.5, 0.52]
    assert spread(values) == pytest.approx((3, 0.5, 0.48, 0.52, np.std(values, ddof=1)))
    assert math.isnan(spread([0.5]).std)
    tenths = [0.1, 0.2, 0.3, 0.7]
    assert {spread(list(order)) for order in itertools.permutations(tenths)} == {spread(tenths)}
    for wrong in ([], [math.nan], [0.1, math.inf]):
        with pytest.raises(ValueError, match="finite values"):
            spread(wrong)


def verdict(name: str, robust: Sequence[bool], **more: object) -> Verdict:
    n = len(robust)
    samples = pd.DataFrame({"index": range(n), "label": [k % 10 for k in range(n)]})
    samples["robust"] = list(robust)
    samples["broken_by"] = pd.Series([None if r else "pgd" for r in robust], dtype=object)
    return Verdict(
        name, "deq", "digits", "Linf:0.1", n, robust_acc=sum(robust) / n, samples=samples, **more
    )


def pair(only_a: int, only_b: int, **more: object) -> tuple[Verdict, Verdict]:
    a, b = cells(only_a, only_b, both=60, neither=40)
    return verdict("Ours", a.tolist(), **more), verdict("Base", b.tolist())


def test_comparisons_name_the_flipped_samples_and_who_broke_them() -> None:
    a, b = pair(3, 1)
    b.samples.loc[1, "broken_by"] = "square"
    b.samples.loc[2, "broken_by"] = None
    b.samples = b.samples.sample(frac=1, random_state=0)  # paired on the index, not the order
    found = compare(a, b)
    assert found.paired == paired(*cells(3, 1, both=60, neither=40))
    assert found.flipped.to_dict("list") == {
        "index": [0, 1, 2, 3],
        "label": [0, 1, 2, 3],
        "robust": ["a", "a", "a", "b"],
        "broken_by": ["pgd", "square", "misclassified", "pgd"],
    }
    text = comparison_text(found)
    assert "a: Ours, b: Base on digits, Linf:0.1 (104 samples)" in text
    assert "robust: 60.58 % against 58.65 %" in text
    assert "only a is robust on 3; b broken by misclassified=1, pgd=1, square=1" in text
    assert "only b is robust on 1; a broken by pgd=1" in text
    back = compare(b, a)
    assert back.paired.difference == -found.paired.difference
    assert back.flipped["robust"].tolist() == ["b", "b", "b", "a"]


def test_equal_rows_have_no_flipped_samples() -> None:
    same = compare(*pair(0, 0))
    assert isinstance(same, Comparison)
    assert same.flipped.empty
    assert "only a is robust on 0\nonly b is robust on 0\n" in comparison_text(same)
    assert "a difference of +0.00 points" in comparison_text(same)


@pytest.mark.parametrize(
    ("counts", "conclusion"),
    [
        ((20, 5), ": the claim holds."),
        ((9, 5), ": the claim does not hold, for there is no difference beyond chance."),
        ((5, 20), ": the claim does not hold, for Ours is less robust."),
    ],
)
def test_a_claim_is_judged_by_the_test(counts: tuple[int, int], conclusion: str) -> None:
    a, b = pair(*counts)
    found = paired(*cells(*counts, both=60, neither=40))
    text = claim(a, b)
    assert text.endswith(conclusion)
    for part in (
        f"Ours is robust on {100 * a.robust_acc:.2f} %",
        f"Base on {100 * b.robust_acc:.2f} % of the same {a.n} samples",
        f"{100 * found.difference:+.2f} points",
        f"{100 * found.low:+.2f} to {100 * found.high:+.2f}",
        f"p = {found.p_value:.3g}",
    ):
        assert part in text


def test_a_claim_is_not_judged_across_tracks_or_without_a_gradient() -> None:
    text = claim(*pair(20, 5, track="randomized"))
    assert "not judged" in text
    assert "randomized against deterministic" in text
    masked = claim(*pair(20, 5, track="no_gradient"))
    assert "not judged, for Ours has no gradient" in masked
    assert "the claim holds" not in text + masked


def test_a_claim_carries_the_doubts_of_its_rows() -> None:
    flags = ("left_out:targeted", "zero_gradient=0.5")
    a, b = pair(20, 5, flags=flags)
    assert claim(a, b).endswith("the claim holds; Ours is in doubt: zero_gradient=0.5.")
    assert "Ours is in doubt: zero_gradient=0.5\n" in comparison_text(compare(a, b))


def test_what_cannot_be_compared_is_refused_with_the_reason() -> None:
    a, b = pair(2, 1)
    with pytest.raises(UsageError, match="one data set and threat"):
        compare(a, replace(b, threat="Linf:0.2"))
    for column in ("index", "label"):
        other = verdict("Else", b.samples["robust"])
        other.samples[column] += 1
        with pytest.raises(UsageError, match="different samples"):
            compare(a, other)
    for changes in (
        {"status": "failed", "note": "out of ideas"},
        {"flags": ("outside_ball:pgd=3",)},
        {"samples": pd.DataFrame()},
    ):
        with pytest.raises(UsageError, match="row Base has no figure"):
            claim(a, replace(b, **changes))
