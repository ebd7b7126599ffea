"""Two verdicts on the same samples: does a claim hold against its base? Knows no torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pandas as pd

from robustdeq.errors import UsageError
from robustdeq.statistics import Paired, paired
from robustdeq.tables import rankable, sample_set, short
from robustdeq.verdict import Verdict

LEVEL = 0.05
"""The exact McNemar p below which a difference is beyond chance."""
_MISCLASSIFIED = "misclassified"
_NOT_DOUBTS = ("randomized", "left_out:")


@dataclass(frozen=True, eq=False)
class Comparison:
    """How two rows differ.

    Attributes:
        a, b: the rows.
        paired: robust accuracy of a minus that of b.
        flipped: a row per sample on which one alone is robust: index, label, robust ("a" or "b")
            and what broke the other (an attack, or "misclassified" without one).
    """

    a: Verdict
    b: Verdict
    paired: Paired
    flipped: pd.DataFrame = field(repr=False)


def compare(a: Verdict, b: Verdict) -> Comparison:
    """Two rows of one data set and threat, compared sample by sample.

    Raises:
        UsageError: if a row has no robust accuracy that can be held against another's, or if the
            rows differ in data set, threat or samples.
    """
    for verdict in (a, b):
        if not rankable(verdict):
            reason = verdict.note or ", ".join(verdict.flags) or "it keeps no samples"
            raise UsageError(f"row {verdict.id} has no figure to compare: {reason}; mend that first.")
    _require_one_question(a, b)
    both = a.samples.merge(b.samples, on=["index", "label"], suffixes=("_a", "_b"), sort=True)
    right = {side: both[f"robust_{side}"].to_numpy(dtype=bool) for side in "ab"}
    return Comparison(a, b, paired(right["a"], right["b"]), _flipped(both))


def _require_one_question(a: Verdict, b: Verdict) -> None:
    if (a.dataset, a.threat) != (b.dataset, b.threat):
        raise UsageError(
            f"rows {a.id} ({a.dataset}, {a.threat}) and {b.id} ({b.dataset}, {b.threat}) answer "
            "different questions; compare rows of one data set and threat."
        )
    if sample_set(a) != sample_set(b):
        raise UsageError(
            f"rows {a.id} and {b.id} were attacked on different samples; run both with one 'n'."
        )


def _flipped(both: pd.DataFrame) -> pd.DataFrame:
    a_alone = both["robust_a"].astype(bool)
    flipped = both[a_alone != both["robust_b"].astype(bool)]
    broken_by = flipped["broken_by_b"].where(a_alone[flipped.index], flipped["broken_by_a"])
    robust = a_alone[flipped.index].map({True: "a", False: "b"})
    found = flipped[["index", "label"]].assign(robust=robust, broken_by=broken_by)
    return found.fillna({"broken_by": _MISCLASSIFIED}).reset_index(drop=True)


def comparison_text(comparison: Comparison) -> str:
    """A few lines for a terminal: accuracies, difference, and who broke what the other held."""
    a, b, found = comparison.a, comparison.b, comparison.paired
    lines = [
        f"a: {a.id}, b: {b.id} on {a.dataset}, {a.threat} ({found.n} samples)",
        f"robust: {_percent(a.robust_acc)} against {_percent(b.robust_acc)}, {_difference(found)}",
        _broken(comparison, "a", "b"),
        _broken(comparison, "b", "a"),
    ]
    return "\n".join([*lines, *doubts(a), *doubts(b)]) + "\n"


def claim(defended: Verdict, base: Verdict) -> str:
    """One sentence: whether a defense is more robust than its base, on the same samples.

    It speaks of these two trained models under these attacks; the spread over seeds is another
    question. It holds no claim proven across tracks, or without a gradient to attack through.

    Raises:
        UsageError: as `compare`.
    """
    found = compare(defended, base).paired
    doubted = "".join(f"; {doubt}" for doubt in [*doubts(defended), *doubts(base)])
    return (
        f"On {base.dataset} under {base.threat}, {defended.id} is robust on "
        f"{_percent(defended.robust_acc)} and {base.id} on {_percent(base.robust_acc)} of the same "
        f"{found.n} samples, {_difference(found)}: {_conclusion(defended, base, found)}{doubted}."
    )


def paragraph(comparison: Comparison) -> str:
    """What a paper could quote: figures with n and intervals, the test, who broke what, the cost.

    It names the rows by their IDs, so that these must differ.
    """
    a, b = comparison.a, comparison.b
    parts = [
        f"On the same {comparison.paired.n} samples of {a.dataset} under {a.threat}, "
        f"{_figures(a, 'is robust on')}, and {_figures(b, 'on')}.",
        f"That is {_difference(comparison.paired)}, {_judgment(comparison)}.",
        _alone(comparison, "a"),
        _alone(comparison, "b"),
        _cost(a, b),
        *[f"{doubt}." for doubt in (*doubts(a), *doubts(b))],
    ]
    return " ".join(parts)


def flips_table(comparison: Comparison) -> pd.DataFrame:
    """The flipped samples for readers: Sample, Label, Robust, Broken, By; rows by their IDs."""
    names = {"a": comparison.a.id, "b": comparison.b.id}
    held = comparison.flipped
    other = held["robust"].map({"a": "b", "b": "a"})
    return pd.DataFrame(
        {
            "Sample": held["index"],
            "Label": held["label"],
            "Robust": held["robust"].map(names),
            "Broken": other.map(names),
            "By": held["broken_by"],
        }
    )


def _figures(verdict: Verdict, verb: str) -> str:
    engine = verdict.autoattack_engine
    by = "" if engine in ("", "reference") else f" by the {engine} engine"
    return (
        f"{verdict.id} ({verdict.defense}) {verb} {_percent(verdict.robust_acc)} (95 % Wilson "
        f"interval {_percent(verdict.robust_low)} to {_percent(verdict.robust_high)}; clean "
        f"{_percent(verdict.clean_acc)}, AutoAttack alone{by} {_percent(verdict.autoattack_acc)})"
    )


def _judgment(comparison: Comparison) -> str:
    reason = _unjudged(comparison.a, comparison.b)
    if reason:
        return f"which is not judged, for {reason}"
    beyond = comparison.paired.p_value < LEVEL
    return f"{'beyond' if beyond else 'not beyond'} chance at {100 * LEVEL:g} %"


def _alone(comparison: Comparison, side: str) -> str:
    """On how many samples one row alone is robust, and what broke the other there."""
    own, other = (comparison.a, comparison.b) if side == "a" else (comparison.b, comparison.a)
    counts = Counter(comparison.flipped.loc[comparison.flipped["robust"] == side, "broken_by"])
    if not counts:
        return f"No sample is robust in {own.id} alone."
    wrong = counts.pop(_MISCLASSIFIED, 0)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    fell = ", ".join(f"{name} ({count})" for name, count in ordered)
    parts = [f"fell to {fell}"] if fell else []
    parts += [f"was wrong without an attack ({wrong})"] if wrong else []
    total = counts.total() + wrong
    samples = "1 sample" if total == 1 else f"{total} samples"
    return f"{own.id} alone is robust on {samples}, where {other.id} {' and '.join(parts)}."


def _cost(a: Verdict, b: Verdict) -> str:
    nfe = [v.forward_nfe + v.backward_nfe for v in (a, b)]
    return (
        f"Evaluating {a.id} took {_ratio(*nfe)} the NFE of {b.id} ({short(nfe[0])} against "
        f"{short(nfe[1])}, forward and backward) and {_ratio(a.seconds, b.seconds)} its seconds "
        f"({a.seconds:.1f} against {b.seconds:.1f})."
    )


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.2f} times" if a and b else "n/a times"


def _conclusion(defended: Verdict, base: Verdict, found: Paired) -> str:
    reason = _unjudged(defended, base)
    if reason:
        return f"the claim is not judged, for {reason}"
    if found.p_value >= LEVEL:
        return "the claim does not hold, for there is no difference beyond chance"
    if found.difference < 0:
        return f"the claim does not hold, for {defended.id} is less robust"
    return "the claim holds"


def _unjudged(a: Verdict, b: Verdict) -> str:
    """Why no word is said on the difference of two rows; empty where one can be."""
    for verdict in (a, b):
        if verdict.track == "no_gradient":
            return f"{verdict.id} has no gradient to attack through"
    if a.track != b.track:
        return f"the rows are of different tracks ({a.track} against {b.track})"
    return ""


def doubts(verdict: Verdict) -> list[str]:
    """A sentence with the flags that are reasons to doubt a row; none where there are none."""
    flags = [flag for flag in verdict.flags if not flag.startswith(_NOT_DOUBTS)]
    return [f"{verdict.id} is in doubt: {', '.join(flags)}"] if flags else []


def _broken(comparison: Comparison, robust: str, broken: str) -> str:
    held = comparison.flipped
    counts = Counter(held.loc[held["robust"] == robust, "broken_by"])
    by = ", ".join(f"{k}={v}" for k, v in sorted(counts.items(), key=lambda i: (-i[1], i[0])))
    tail = f"; {broken} broken by {by}" if by else ""
    return f"only {robust} is robust on {counts.total()}{tail}"


def _difference(found: Paired) -> str:
    low, high = _points(found.low), _points(found.high)
    return (
        f"a difference of {_points(found.difference)} points (95 % interval {low} to {high}; "
        f"exact McNemar p = {found.p_value:.3g})"
    )


def _points(value: float) -> str:
    # Adding zero turns -0.0, which would read "-0.00", into 0.0.
    return f"{round(100 * value, 2) + 0.0:+.2f}"


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.2f} %"
