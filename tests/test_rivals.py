"""Which classes a search came nearest to: by brute force over all that was seen."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from robustdeq.attacks._rivals import Rivals

GOALS = 5


@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, GOALS))
def test_the_nearest_goals_are_those_that_led_most(seed: int, looks: int, count: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(7, (4,), generator=draw)
    goals = torch.stack([torch.randperm(7, generator=draw)[:GOALS] for _ in y])
    rivals, seen = Rivals(y, 7), [[float("-inf")] * 7 for _ in y]
    for _ in range(looks):
        samples = torch.randint(4, (9,), generator=draw)
        logits = torch.randn(9, 7, generator=draw)
        rivals.see(samples, logits)
        for sample, row in zip(samples.tolist(), logits.tolist(), strict=True):
            own = row[int(y[sample])]
            seen[sample] = [max(a, b - own) for a, b in zip(seen[sample], row, strict=True)]
    rows = torch.tensor([2, 0, 3])
    nearest = rivals.nearest(rows, goals[rows], count)
    assert nearest.sum(1).tolist() == [count] * 3
    for sample, own, chosen in zip(rows.tolist(), goals[rows], nearest, strict=True):
        leads = torch.tensor(seen[sample])[own]
        taken, others = leads[chosen], leads[~chosen]
        assert not len(others) or taken.min() >= others.max() - 1e-6


def test_logits_that_are_no_numbers_hide_nothing() -> None:
    rivals = Rivals(torch.tensor([0]), 4)
    nan, inf = float("nan"), float("inf")
    rivals.see(torch.tensor([0, 0]), torch.tensor([[nan] * 4, [0.0, -3.0, -1.0, nan]]))
    rivals.see(torch.tensor([0]), torch.tensor([[inf, inf, 1.0, 2.0]]))
    goals = torch.tensor([[1, 2, 3]])
    assert rivals.nearest(torch.tensor([0]), goals, 2).tolist() == [[True, True, False]]
