"""What is beyond chance: intervals, paired tests on the same samples, ranks, spread over seeds.

Knows no torch and no tables: it counts booleans, one per sample, true where a model is robust.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, ndtri

Booleans: TypeAlias = NDArray[np.bool_]


class Interval(NamedTuple):
    """The ends of a confidence interval."""

    low: float
    high: float


class Paired(NamedTuple):
    """How two models differ on the same samples.

    Attributes:
        difference: accuracy of a minus that of b, in [-1, 1]; `low` to `high` is its interval.
        p_value: of the exact two-sided McNemar test; it, not the interval, decides.
        only_a, only_b: samples on which a alone, or b alone, is right.
        n: samples in all.
    """

    difference: float
    low: float
    high: float
    p_value: float
    only_a: int
    only_b: int
    n: int


class Spread(NamedTuple):
    """Values over seeds; `std` is the sample standard deviation, NaN for a single value."""

    n: int
    mean: float
    low: float
    high: float
    std: float


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval for a share (Wilson 1927), within [0, 1].

    Raises:
        ValueError: unless 0 <= successes <= n, n >= 1 and 0 < level < 1.
    """
    if not 0 <= successes <= n or n < 1 or not 0 < level < 1:
        raise ValueError(f"no Wilson interval for {successes} of {n} at level {level}")
    z = float(ndtri((1 + level) / 2))
    center = (successes + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(successes * (n - successes) / n + z * z / 4)
    # At the ends rounding would leave 1e-17 where the bound is exact.
    low = 0.0 if successes == 0 else center - half
    return Interval(low, 1.0 if successes == n else center + half)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test: the discordant samples are tosses of a fair coin.

    Raises:
        ValueError: for a negative count.
    """
    return float(_two_sided(*_counted(only_a, only_b)))


def one_sided(only_a: int, only_b: int) -> float:
    """Exact p of McNemar's test against the alternative that a is worse than b.

    Raises:
        ValueError: for a negative count.
    """
    a, b = _counted(only_a, only_b)
    return float(bdtr(a, a + b, 0.5))


def _counted(only_a: int, only_b: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if min(only_a, only_b) < 0:
        raise ValueError(f"counts of samples are not negative, got {only_a} and {only_b}")
    return np.asarray(only_a, dtype=np.int64), np.asarray(only_b, dtype=np.int64)


def _two_sided(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
    """The fair coin is symmetric: both tails are twice the smaller."""
    p: NDArray[np.float64] = np.minimum(1.0, 2 * bdtr(np.minimum(a, b), a + b, 0.5))
    return p


def paired(a: ArrayLike, b: ArrayLike, seed: int = 0, draws: int = 10_000) -> Paired:
    """How accuracy differs between two models on the same samples.

    The 95 % interval is the percentile interval of the paired bootstrap. Resampling samples changes
    the difference only through how many fall into each cell (only a, only b, else), so the cells'
    counts are drawn, not the samples. Their probabilities are estimated with one sample more in
    each discordant cell (Bonett and Price 2012): the plain bootstrap gives an interval of width
    zero where no sample is discordant, and is too narrow where few are.

    Args:
        a: booleans (n,), true where a is right.
        b: the same of b, on the same samples in the same order.
        seed: of the resampling.
        draws: resamples.

    Raises:
        ValueError: if they are not two boolean vectors of one length, at least 1.
    """
    right_a, right_b = _stacked([a, b])
    n = len(right_a)
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    low, high = _resampled(only_a, only_b, n, seed, draws)
    return Paired((only_a - only_b) / n, low, high, mcnemar(only_a, only_b), only_a, only_b, n)


def _resampled(only_a: int, only_b: int, n: int, seed: int, draws: int) -> Interval:
    if only_a < only_b:  # so that b against a is exactly the mirror image of a against b
        low, high = _resampled(only_b, only_a, n, seed, draws)
        return Interval(-high, -low)
    cells = np.array([only_a + 1, only_b + 1, n - only_a - only_b]) / (n + 2)
    # RandomState, for its stream is frozen: a later NumPy gives the same table.
    counts = np.random.RandomState(seed).multinomial(n, cells, size=draws)
    low, high = np.quantile((counts[:, 0] - counts[:, 1]) / n, [0.025, 0.975])
    return Interval(float(low), float(high))


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Adjusted p values, so that the chance of any false discovery is bounded (Holm 1979)."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, steps)
    return adjusted


def ranks(robust: Sequence[ArrayLike], level: float = 0.05) -> list[int]:
    """Ranks in which rows that differ by chance alone are tied.

    A row's rank is 1 plus the number of rows that are better beyond chance: more accurate on the
    same samples, with an exact McNemar p below `level` after Holm's correction over all pairs of
    these rows. So the most accurate row ranks first, and a row that is added can only be told from
    its neighbors by more samples. "Beyond chance" is no order: of two rows the more accurate can
    rank lower, where its difference to the best is small but consistent.

    Args:
        robust: booleans (n,) a row, over the same samples in the same order.
        level: the chance that any pair of equal rows is told apart.

    Raises:
        ValueError: if the rows are not boolean vectors of one length.
    """
    if not robust:
        return []
    rows = _stacked(robust)
    return [1 + int(count) for count in _better(rows, level).sum(axis=0)]


def _better(rows: Booleans, level: float) -> Booleans:
    """(k, k): whether row i is better than row j beyond chance."""
    # Floats, for the product of integers is slow; counts are exact up to 2^53.
    only = np.rint(rows.astype(float) @ (~rows).astype(float).T).astype(np.int64)
    first, second = np.triu_indices(len(rows), 1)
    beyond = np.zeros(only.shape, dtype=bool)
    beyond[first, second] = holm(_two_sided(only[first, second], only[second, first])) < level
    better: Booleans = (beyond | beyond.T) & (only > only.T)
    return better


def _stacked(rows: Sequence[ArrayLike]) -> Booleans:
    arrays = [np.asarray(row) for row in rows]
    if any(a.dtype != np.bool_ or a.ndim != 1 or not len(a) for a in arrays):
        raise ValueError("each row is a vector of booleans, one per sample")
    sizes = sorted({len(a) for a in arrays})
    if len(sizes) > 1:
        raise ValueError(f"rows on different samples ({sizes} of them) cannot be compared in pairs")
    return np.stack(arrays)


def spread(values: Sequence[float]) -> Spread:
    """Mean, extremes and sample standard deviation of values, such as accuracies over seeds.

    Raises:
        ValueError: if there are none, or one is not finite.
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"a spread needs finite values, got {list(values)}")
    n = len(values)
    mean = math.fsum(values) / n
    squares = math.fsum((value - mean) ** 2 for value in values)
    std = math.sqrt(squares / (n - 1)) if n > 1 else math.nan
    return Spread(n, mean, min(values), max(values), std)
