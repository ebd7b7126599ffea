"""From the records of one case to its verdict. Knows no torch.

The rule: a sample is robust if it is classified correctly and no attack through any gradient broke
it; the robust accuracy is the mean of that, never a minimum of averages. A stage that failed or is
missing leaves no robust accuracy at all: what was not attacked is never counted as robust.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import pandas as pd

from robustdeq.records import Record, broken
from robustdeq.statistics import wilson

OUT_OF_MEMORY = "out of memory"
"""How a note begins that says so."""
_HALVED = re.compile(rf"{OUT_OF_MEMORY} at \d+ rows a pass, went on with \d+")
"""What the chain itself notes: no flag, since it moves no figure; what an attack notes is one."""
ENGINE_LEFT_OUT = "joint engine left out"
"""How the note begins where the reference ran in place of the joint engine."""
DOUBT_GAIN = 0.02
"""Share of samples that other means broke, from which honest gradients are doubted,"""
DOUBT_P_VALUE = 0.01
"""if that is also beyond chance: one-sided exact McNemar test (0.5 to the power of the count, as no
sample that honest gradients broke was left to the others)."""


@dataclass(frozen=True)
class Failure:
    """A stage that gave no record: its label, its chunk (-1: the whole case), one sentence."""

    label: str
    chunk: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything that a row is computed from.

    Attributes:
        case: the case as JSON data: id, defense, dataset, threat, n, weights_sha256, ...
        chunks: how many chunks the case has.
        expected: labels of the attack stages per chunk number, as far as chunks have begun.
    """

    case: dict[str, Any]
    chunks: int
    expected: dict[int, tuple[str, ...]]
    records: tuple[Record, ...] = ()
    failures: tuple[Failure, ...] = ()


@dataclass(eq=False)
class Verdict:
    """One row. Accuracies are fractions in [0, 1], or None where they could not be measured.

    Attributes:
        clean_acc: accuracy of the deployed predictor without an attack.
        autoattack_acc: accuracy after AutoAttack (standard, or rand for randomized models) alone.
        autoattack_engine: what ran it: "reference", the library; or "joint", the same attacks with
            states that are carried from step to step.
        robust_acc: worst case per sample over all attacks and gradients.
        robust_low, robust_high: 95 % Wilson interval of `robust_acc`.
        broken_by: how many samples each attack was the first to break.
        flags: reasons to doubt the row, each with its number.
        forward_nfe, backward_nfe: cell evaluations and vector-Jacobian products, in all (model
            calls and backward passes, for models that do not iterate).
        seconds: of computation, summed over chunks; `peak_memory_mib` is the largest of a stage.
        track: "deterministic"; "randomized"; or "no_gradient", whose gradient does not exist: rows
            are ranked among their like.
        family, training_seed: rows of one family differ in the seed of their training alone.
        credit: who submitted examples that lowered the row.
        rank, seeds: filled in a table alone.
        status: "ok"; "failed" or "missing" (not computed yet), with the reason in `note`.
        samples: a row per input: index, label, clean, robust, broken_by.
        adversarials: float32 (n, channels, height, width): the example that first broke the
            sample, else the clean input; from `robustdeq.evaluate` only.
    """

    id: str
    defense: str
    dataset: str
    threat: str
    n: int
    clean_acc: float | None = None
    autoattack_acc: float | None = None
    autoattack_engine: str = ""
    robust_acc: float | None = None
    robust_low: float | None = None
    robust_high: float | None = None
    broken_by: dict[str, int] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    forward_nfe: int = 0
    backward_nfe: int = 0
    seconds: float = 0.0
    peak_memory_mib: float = 0.0
    weights_sha256: str = ""
    track: str = "deterministic"
    family: str = ""
    training_seed: int | None = None
    credit: str = ""
    status: str = "ok"
    note: str = ""
    rank: int | None = None
    seeds: str = ""
    samples: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)
    adversarials: Any = field(default=None, repr=False)

    def __str__(self) -> str:
        def percent(value: float | None) -> str:
            return "n/a" if value is None else f"{100 * value:.2f}%"

        parts = [
            f"{self.id} on {self.dataset} ({self.n} samples), {self.threat}:",
            f"clean {percent(self.clean_acc)},",
            f"AutoAttack {percent(self.autoattack_acc)},",
            f"robust {percent(self.robust_acc)}",
        ]
        if self.robust_low is not None and self.robust_high is not None:
            parts.append(f"[{percent(self.robust_low)}, {percent(self.robust_high)}]")
        if self.flags:
            parts.append(f"flags: {', '.join(self.flags)}")
        if self.note:
            parts.append(f"({self.note})")
        return " ".join(parts)

    def as_row(self) -> dict[str, Any]:
        """The scalar attributes, for a table."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("samples", "adversarials")
        }


def judge_evidence(evidence: Evidence) -> Verdict:
    """The verdict on one case."""
    case = evidence.case
    verdict = Verdict(
        id=case["id"],
        defense=case["defense"],
        dataset=case["dataset"],
        threat=case["threat"],
        n=case["n"],
        weights_sha256=case.get("weights_sha256", ""),
    )
    clean = joined(evidence, "clean")
    attacks = {
        label: joined(evidence, "attack", label)
        for label in dict.fromkeys(r.meta.label for r in records_of(evidence, "attack"))
    }
    _add_costs(verdict, evidence.records)
    verdict.family = case.get("family", "")
    verdict.training_seed = case.get("training_seed")
    if any(r.meta.track == "randomized" for r in evidence.records):
        verdict.track = "randomized"
    failed = _failed(evidence)
    # What comes after a failure is left out on purpose: only without one is it still to come.
    lacking = [] if failed else _lacking(evidence)
    if len(clean) == case["n"]:
        verdict.clean_acc = float(clean["clean_correct"].mean())
        verdict.samples = _samples(clean, attacks)
        verdict.broken_by = dict(Counter(verdict.samples["broken_by"].dropna()))
        verdict.credit = _credit(evidence, verdict)
        invalid = _unresolved(attacks, verdict.samples)
        failed += [f"{label} gave {n} non-finite examples" for label, n in invalid.items()]
        if not failed and not lacking:
            _add_accuracies(verdict, attacks, evidence)
    verdict.flags = _flags(evidence, attacks, verdict)
    if verdict.track == "deterministic" and _lacks_gradient(joined(evidence, "checks")):
        verdict.track = "no_gradient"
    if failed or lacking:
        verdict.status = "failed" if failed else "missing"
        verdict.note = "; ".join(dict.fromkeys(lacking + failed))
    return verdict


def curves_table(evidences: Sequence[Evidence]) -> pd.DataFrame:
    """Sanity curves of rows: id, dataset, threat, curve, at, accuracy, n; summed over chunks."""
    parts = []
    for evidence in evidences:
        rows = joined(evidence, "curves")
        if len(rows) and len(records_of(evidence, "curves")) == evidence.chunks:
            points = rows.groupby(["curve", "at"], as_index=False)[["correct", "n"]].sum()
            row = {name: evidence.case[name] for name in ("id", "dataset", "threat")}
            parts.append(points.assign(**row, accuracy=points["correct"] / points["n"]))
    columns = ["id", "dataset", "threat", "curve", "at", "accuracy", "n"]
    return pd.concat(parts)[columns] if parts else pd.DataFrame(columns=columns)


def records_of(evidence: Evidence, kind: str) -> list[Record]:
    """The records of a kind, by chunk."""
    found = [r for r in evidence.records if r.meta.kind == kind]
    return sorted(found, key=lambda r: r.meta.chunk)


def joined(evidence: Evidence, kind: str, label: str | None = None) -> pd.DataFrame:
    """The rows of all chunks' records of a kind, or of one stage; empty where there are none."""
    parts = [r.rows for r in records_of(evidence, kind) if label is None or r.meta.label == label]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _failed(evidence: Evidence) -> list[str]:
    """What has gone wrong, so that there is no robust accuracy."""
    failed = [
        f"{failure.label}: {failure.reason}" if failure.label else failure.reason
        for failure in evidence.failures
    ]
    if not failed and not all(evidence.expected.values()):
        # Else a model that every attack had to skip would be as robust as it is accurate.
        failed = ["no attack applies to this model; add one through 'honest'"]
    return failed


def _lacking(evidence: Evidence) -> list[str]:
    """What has not been computed yet."""
    held = {(r.meta.chunk, r.meta.label) for r in records_of(evidence, "attack")}
    lacking = Counter(
        label
        for chunk, labels in evidence.expected.items()
        for label in labels
        if (chunk, label) not in held
    )
    if lacking:
        return [f"{label} is missing for {count} chunks" for label, count in lacking.items()]
    if len(evidence.expected) < evidence.chunks:
        return [f"{len(evidence.expected)} of {evidence.chunks} chunks have begun"]
    clean = sum(len(record.rows) for record in records_of(evidence, "clean"))
    if clean < evidence.case["n"]:
        return [f"clean predictions are missing for {evidence.case['n'] - clean} samples"]
    return []


def _samples(clean: pd.DataFrame, attacks: dict[str, pd.DataFrame]) -> pd.DataFrame:
    table = clean[["index", "label"]].copy()
    table["clean"] = clean["clean_correct"].astype(bool)
    broken_by = pd.Series(None, index=clean["index"], dtype=object)
    for label, rows in attacks.items():
        fallen = rows[broken(rows)]
        names = [f"{label}/{part}" if part else label for part in fallen["made_by"].fillna("")]
        first = pd.Series(names, index=fallen["index"], dtype=object)
        first = first[broken_by[first.index].isna()]
        broken_by.loc[first.index] = first
    table["robust"] = table["clean"] & broken_by.isna().to_numpy()
    named = [None if pd.isna(name) else name for name in broken_by]
    table["broken_by"] = pd.Series(named, index=table.index, dtype=object)
    return table[["index", "label", "clean", "robust", "broken_by"]]


def _credit(evidence: Evidence, verdict: Verdict) -> str:
    """Who submitted the examples that broke samples first, in order."""
    stages = {r.meta.label: r.meta.stage for r in records_of(evidence, "attack")}
    names = [str(s["by"]) for n, s in stages.items() if "by" in s and n in verdict.broken_by]
    return ", ".join(dict.fromkeys(names))


def _unresolved(attacks: dict[str, pd.DataFrame], samples: pd.DataFrame) -> Counter[str]:
    """Surviving samples on which an attack returned something that is no number."""
    robust = set(samples.loc[samples["robust"], "index"])
    return Counter(
        label
        for label, rows in attacks.items()
        for index in rows.loc[rows["status"] == "nonfinite", "index"]
        if index in robust
    )


def _add_accuracies(verdict: Verdict, attacks: dict[str, pd.DataFrame], evidence: Evidence) -> None:
    robust = int(verdict.samples["robust"].sum())
    verdict.robust_acc = robust / verdict.n
    verdict.robust_low, verdict.robust_high = wilson(robust, verdict.n)
    label = _autoattack_label(evidence, verdict.track)
    if label:
        verdict.autoattack_acc = float(_stood(attacks[label]).mean())
        verdict.autoattack_engine = _engine(evidence, label)


def autoattack_correct(evidence: Evidence, track: str) -> pd.Series | None:
    """Whether each sample (by its index) stood AutoAttack alone; None where it did not run whole.

    Args:
        track: the row's, as in its verdict: a randomized model has an AutoAttack of its own.
    """
    label = _autoattack_label(evidence, track)
    if not label:
        return None
    rows = joined(evidence, "attack", label)
    return _stood(rows).set_axis(pd.Index(rows["index"].astype(int)))


def _stood(rows: pd.DataFrame) -> pd.Series:
    return rows["clean_correct"].astype(bool) & ~broken(rows)


def _autoattack_label(evidence: Evidence, track: str) -> str:
    """The first stage that ran AutoAttack on all samples; empty where there is none."""
    wanted, n = "rand" if track == "randomized" else "standard", evidence.case["n"]
    labels = _autoattack_labels(evidence, wanted)
    return next((name for name in labels if len(joined(evidence, "attack", name)) == n), "")


def _engine(evidence: Evidence, label: str) -> str:
    """Which engine ran AutoAttack; the reference where the joint one was left out."""
    metas = [r.meta for r in records_of(evidence, "attack") if r.meta.label == label]
    fell_back = any(note.startswith(ENGINE_LEFT_OUT) for meta in metas for note in meta.notes)
    engine = str(metas[0].stage.get("parameters", {}).get("engine", "reference"))
    return "reference" if fell_back else engine


def _autoattack_labels(evidence: Evidence, version: str) -> list[str]:
    """Stages that ran AutoAttack itself, through the model's own gradient."""
    return list(
        dict.fromkeys(
            r.meta.label
            for r in records_of(evidence, "attack")
            if r.meta.stage.get("attack") == "autoattack"
            and r.meta.stage.get("parameters", {}).get("version") == version
            and r.meta.stage.get("gradient") == "honest"
            # One that leaves some models alone says nothing about them.
            and r.meta.stage.get("parameters", {}).get("fallback", True)
        )
    )


def _add_costs(verdict: Verdict, records: Sequence[Record]) -> None:
    verdict.forward_nfe = sum(r.meta.forward_nfe for r in records)
    verdict.backward_nfe = sum(r.meta.backward_nfe for r in records)
    verdict.seconds = round(math.fsum(r.meta.seconds for r in records), 3)
    verdict.peak_memory_mib = round(max((r.meta.peak_memory_mib for r in records), default=0.0), 1)


def _flags(
    evidence: Evidence, attacks: dict[str, pd.DataFrame], verdict: Verdict
) -> tuple[str, ...]:
    flags = ["randomized"] if verdict.track == "randomized" else []
    flags += _check_flags(joined(evidence, "checks"))
    notes = (note for r in records_of(evidence, "attack") for note in r.meta.notes)
    notes = (note for note in notes if not _HALVED.fullmatch(note))
    flags += [f"left_out:{note}" for note in dict.fromkeys(notes)]
    for label, rows in attacks.items():
        flags += [
            f"{status}:{label}={count}"
            for status, count in rows["status"].value_counts().sort_index().items()
            if status in ("outside_ball", "outside_box", "nonfinite")
        ]
        blank = int((rows["adversarial_prediction"] == -1).sum())
        if blank:
            flags.append(f"nonfinite_logits:{label}={blank}")
    if len(verdict.samples):
        flags += _doubt_flags(evidence, verdict)
    return tuple(flags)


def _check_flags(checks: pd.DataFrame) -> Iterable[str]:
    if not len(checks):
        return []
    # That a model is randomized is said by its track.
    failed = checks[(checks["status"] == "failed") & (checks["name"] != "randomized")]
    return [_check_flag(name, value, detail) for name, value, detail in _facts(failed)]


def _facts(checks: pd.DataFrame) -> Iterable[tuple[str, float, str]]:
    return zip(checks["name"], checks["value"], checks["detail"].fillna(""), strict=True)


def _check_flag(name: str, value: float, detail: str) -> str:
    # Flags are joined by semicolons in table.csv.
    return f"{name}={value:.3g}" + (f" ({detail.replace(';', ',')})" if detail else "")


_EXISTENCE = ("gradient_missing", "zero_gradient", "nonfinite_gradient")


def _lacks_gradient(checks: pd.DataFrame) -> bool:
    """Whether the gradient that attacks need is not there: such rows have a track of their own."""
    if not len(checks):
        return False
    failed = checks[checks["status"] == "failed"]
    return bool(failed["name"].isin(_EXISTENCE).any())


def _doubt_flags(evidence: Evidence, verdict: Verdict) -> list[str]:
    """Whether anything broke what honest gradients did not: a symptom of masked gradients."""
    stages = {r.meta.label: r.meta.stage for r in records_of(evidence, "attack")}
    counts = Counter(_means(stages, name) for name in verdict.samples["broken_by"].dropna())
    return [
        f"{flag}={counts[means] / verdict.n:.3g}"
        for means, flag in _DOUBTS.items()
        if counts[means] >= DOUBT_GAIN * verdict.n and 0.5 ** counts[means] < DOUBT_P_VALUE
    ]


_DOUBTS = {
    "black_box": "black_box_beats_gradients",
    "other_gradient": "other_gradients_beat_honest",
}


def _means(stages: dict[str, dict[str, Any]], name: str) -> str:
    """By what means a sample was broken, from the name in `broken_by`; transfer is a black box."""
    label, _, part = name.partition("/")
    stage = stages.get(label, {})
    if stage.get("needs") in ("logits", "labels") or part.startswith(("square", "transfer")):
        return "black_box"
    return "honest" if stage.get("gradient", "honest") == "honest" else "other_gradient"
