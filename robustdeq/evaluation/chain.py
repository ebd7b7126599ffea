"""Runs the stages of one chunk against one model, or takes their records from the store."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from robustdeq.arithmetic import exact_float32
from robustdeq.differentiation import ModuleGradient, parse_gradient
from robustdeq.equilibrium import EquilibriumClassifier, metered
from robustdeq.errors import CaseError, DamagedError, RobustDEQError, sentence
from robustdeq.evaluation.curves import curve_rows
from robustdeq.evaluation.gate import check, is_randomized, run_checks
from robustdeq.evaluation.integrity import intact, unchanged
from robustdeq.evaluation.judge import Judge, Judgment
from robustdeq.evaluation.memory import is_out_of_memory, release
from robustdeq.evaluation.pools import RowPool
from robustdeq.evaluation.provenance import core_digest, environment
from robustdeq.evaluation.stages import CHECKS, CLEAN, TRACES, Stage, curves_stage
from robustdeq.evaluation.traces import trace_rows
from robustdeq.interfaces import Candidates, Scope, option
from robustdeq.keys import digest
from robustdeq.randomness import SampleRandom
from robustdeq.records import (
    FORMAT,
    Record,
    RecordMeta,
    Status,
    broken,
    check_frame,
    curve_frame,
    sample_frame,
    trace_frame,
)
from robustdeq.shapes import Images, Labels
from robustdeq.suite import Curves
from robustdeq.targets import Target
from robustdeq.threats import Threat, Violation
from robustdeq.verdict import OUT_OF_MEMORY

INCOMPLETE = "incomplete"
"""What a case says of its training where a time budget ended it: its row is not ranked."""


@runtime_checkable
class Shelf(Protocol):
    """Where records are kept; `records.Store` is one."""

    def read(self, key: str) -> Record | None:
        """The record of a key, or None."""
        ...

    def write(self, record: Record) -> None:
        """Keep a record."""
        ...


class Memory:
    """A shelf that lives as long as the process."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}

    def read(self, key: str) -> Record | None:
        """See `Shelf`."""
        return self.records.get(key)

    def write(self, record: Record) -> None:
        """See `Shelf`."""
        self.records[record.meta.key] = record


@dataclass(frozen=True, eq=False)
class Subject:
    """A built model with what its case says of it.

    Attributes:
        case: the case as JSON data; `case_key` is its digest.
        seed: the suite's.
    """

    model: nn.Module
    classes: int
    threat: Threat
    case: dict[str, Any]
    case_key: str
    seed: int
    device: torch.device
    batch_size: int | None = None


@dataclass(frozen=True, eq=False)
class Chunk:
    """The samples of one chunk, on the model's device."""

    number: int
    x: Images
    y: Labels
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Event:
    """What a chain tells its caller: a stage started, gave a record, or failed.

    Of a stage whose record is damaged it says so first, and then that the stage has started.
    Engines say "finished" where a chunk is done, and "stopped" where the whole run cannot go on.
    """

    # "damaged", "started", "computed", "resumed", "failed"; of engines "finished", "stopped"
    kind: str
    label: str
    key: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Step:
    """A stage of a chunk with the labels of those whose records it consumes, the clean one aside.

    Any order in which no step comes before one that it needs gives the same records.
    """

    label: str
    phase: int
    needs: tuple[str, ...] = ()


@dataclass(eq=False)
class Chain:
    """The stages of one chunk, in order.

    Attributes:
        pools: what other rows found for these samples, once all have been through phase 1.
        abandoned: stages that are left out because they failed before, with the reason.
        records: what there is by now, the clean one first.
    """

    subject: Subject
    chunk: Chunk
    attacks: Sequence[Stage]
    shelf: Shelf
    pools: Sequence[RowPool] = ()
    curves: Curves | None = None
    abandoned: dict[str, str] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    order: list[Stage] = field(default_factory=list)

    def run(self, phase: int = 1) -> Iterator[Event]:
        """Compute what the shelf does not hold; a failing attack does not stop the others.

        Args:
            phase: 2 takes the records of phase 1 from the shelf, silently, and goes on from there.

        Raises:
            CaseError: if the clean predictions cannot be had.
        """
        first = self._stage(CLEAN, fatal=True)
        yield from first if phase == 1 else _silent(first)
        for stage in self._order():
            if stage.phase == phase:
                yield from self._stage(stage)
            elif stage.phase < phase and stage.kind == "attack":
                self._recall(stage)

    def only(self, label: str) -> Iterator[Event]:
        """One stage, where the records of all that it needs are on the shelf.

        Raises:
            CaseError: if one of them is not, or the clean predictions cannot be had.
        """
        self.records.clear()
        clean = self._stage(CLEAN, fatal=True)
        if label == CLEAN.label:
            yield from clean
            return
        _silent(clean)
        stage = next(stage for stage in self._order() if stage.label == label)
        for before in self._needs(stage):
            self._recall(before)
        yield from self._stage(stage)

    def steps(self) -> tuple[Step, ...]:
        """All stages after the clean one, of both phases; known once that has been through."""
        return tuple(
            Step(stage.label, stage.phase, tuple(s.label for s in self._needs(stage)))
            for stage in self._order()
        )

    def _order(self) -> list[Stage]:
        """The stages after the clean one; always the same objects."""
        if not self.order:
            planned = self.planned(self.records[0].meta.track)
            first = self.chunk.number == 0
            curves = [] if self.curves is None else [curves_stage(self.curves)]
            self.order += [CHECKS] * first + planned + curves + [TRACES] * first
        return self.order

    def _needs(self, stage: Stage) -> list[Stage]:
        """The attacks whose records a stage consumes, beside the clean one."""
        if stage.kind not in ("attack", "traces") or stage.scope is Scope.CHUNK:
            return []
        before = self.order[: self.order.index(stage)]
        return [s for s in before if s.kind == "attack" and s.phase <= stage.phase]

    def given(self, stage: Stage) -> list[Record]:
        """The records that decide what a stage is given, whatever else has been computed by now."""
        if stage.kind == "clean":
            return []
        found = {record.meta.label: record for record in self.records}
        needed = [found.get(before.label) for before in self._needs(stage)]
        return [self.records[0], *(record for record in needed if record is not None)]

    def planned(self, track: str) -> list[Stage]:
        """The attacks that apply to the model."""
        target = Target(self.subject.model, self.subject.classes)
        return [stage for stage in self.attacks if stage.fits(track, target)]

    def _recall(self, stage: Stage) -> None:
        """Take a stage's record from the shelf; one that failed has left none."""
        if stage.label in self.abandoned:
            return
        held = self.shelf.read(self._key(stage, self._consumed(stage)))
        if held is None:
            raise CaseError(
                f"the record of {stage.label} is gone or damaged; give the same command again, "
                "which computes it anew."
            )
        self.records.append(held)

    def _stage(self, stage: Stage, fatal: bool = False) -> Iterator[Event]:
        if stage.label in self.abandoned:
            return
        consumed = self._consumed(stage)
        key = self._key(stage, consumed)
        try:
            held = self.shelf.read(key)
        except DamagedError as damage:
            held = None
            reason = f"{damage.path} is damaged ({damage.cause}); it is computed again"
            yield Event("damaged", stage.label, key, reason)
        if held is not None:
            self.records.append(held)
            yield Event("resumed", stage.label, key)
            return
        yield Event("started", stage.label, key)
        try:
            record = self._within_memory(stage, key, consumed)
        # A plugin that asks Python to exit has failed as one that raises.
        except (Exception, SystemExit) as cause:
            if fatal and isinstance(cause, RobustDEQError):
                raise
            if fatal:
                raise CaseError(f"the model cannot be evaluated: {sentence(cause)}") from cause
            yield Event("failed", stage.label, key, sentence(cause))
            return
        self.shelf.write(record)
        self.records.append(record)
        yield Event("computed", stage.label, key)

    def _within_memory(self, stage: Stage, key: str, consumed: tuple[str, ...]) -> Record:
        """The stage's record, with as few rows in one pass as the device's memory asks for.

        What `batch_size` promises holds here too: it splits forward passes and moves no figure.
        """
        notes: tuple[str, ...] = ()
        while True:
            rows = min(self.subject.batch_size or len(self.chunk.y), len(self.chunk.y))
            try:
                return _computed(self, stage, key, consumed, notes)
            except Exception as cause:
                if rows == 1 or not is_out_of_memory(cause):
                    raise
            # Outside of the handler, whose traceback keeps the attack's tensors alive.
            release(self.subject.device)
            self.subject = replace(self.subject, batch_size=(rows + 1) // 2)
            less = f"at {rows} rows a pass, went on with {(rows + 1) // 2}"
            notes = (*notes, f"{OUT_OF_MEMORY} {less}")

    def _consumed(self, stage: Stage) -> tuple[str, ...]:
        """Digests of the records that decide what the stage is given."""
        if stage.kind not in ("attack", "traces"):
            return ()
        others = [pool.content_digest for pool in self.pools] if stage.phase > 1 else []
        return (*(record.content_digest for record in self.given(stage)), *others)

    def _key(self, stage: Stage, consumed: tuple[str, ...]) -> str:
        return digest(
            {
                "format": FORMAT,
                "case": self.subject.case_key,
                "kind": stage.kind,
                "stage": stage.spec,
                "chunk": self.chunk.number,
                "indices": list(self.chunk.indices),
                "environment": _environment(self.subject),
                "core": core_digest(),
                "consumed": list(consumed),
            }
        )

    def survivors(self, stage: Stage) -> list[int]:
        """Rows of the chunk that are right and that no attack before the stage has broken."""
        clean = self.records[0].rows
        alive = clean["clean_correct"].to_numpy(dtype=bool).copy()
        for record in self.given(stage):
            if record.meta.kind == "attack":
                alive &= ~broken(record.rows).to_numpy(dtype=bool)
        return [int(row) for row in np.flatnonzero(alive)]


def _silent(events: Iterator[Event]) -> Iterator[Event]:
    for _ in events:
        pass
    return iter(())


def _environment(subject: Subject) -> dict[str, Any]:
    dtype = next((p.dtype for p in subject.model.parameters()), torch.float32)
    return environment(subject.device, dtype)


def _computed(
    chain: Chain, stage: Stage, key: str, consumed: tuple[str, ...], notes: tuple[str, ...] = ()
) -> Record:
    """The record of one stage, with its cost measured."""
    compute: dict[str, Callable[[Chain, Stage], _Result]] = {
        "clean": _clean,
        "checks": _checks,
        "attack": _attack,
        "curves": _curves,
        "traces": _traces,
    }
    subject = chain.subject
    _reset_peak(subject.device)
    begun = time.perf_counter()
    with metered() as meter, _undisturbed(subject.model), exact_float32():
        result = compute[stage.kind](chain, stage)
    seconds = time.perf_counter() - begun
    if stage.kind == "attack" and len(result.rows):
        attacked = (result.rows["status"] != Status.BROKEN_BEFORE).to_numpy()
        # A library attack does not say whose call it makes: the cost is shared out evenly.
        share = attacked / max(int(attacked.sum()), 1)
        for column, total in (
            ("forward_nfe", meter.forward),
            ("backward_nfe", meter.backward),
            ("seconds", seconds),
        ):
            result.rows[column] = share * total
    meta = RecordMeta(
        key=key,
        kind=stage.kind,
        case=subject.case,
        case_key=subject.case_key,
        stage=stage.spec,
        label=stage.label,
        chunk=chain.chunk.number,
        track=result.track or chain.records[0].meta.track,
        notes=(*result.notes, *notes),
        forward_nfe=meter.forward,
        backward_nfe=meter.backward,
        seconds=seconds,
        peak_memory_mib=_peak(subject.device),
        environment=_environment(subject),
        consumed=consumed,
    )
    return Record(meta, result.rows)


@dataclass(frozen=True, eq=False)
class _Result:
    rows: pd.DataFrame
    track: str = ""
    notes: tuple[str, ...] = ()


def _clean(chain: Chain, stage: Stage) -> _Result:
    subject, chunk = chain.subject, chain.chunk
    target = Target(subject.model, subject.classes, batch_size=subject.batch_size)
    randomized = is_randomized(target, chunk.x)
    judgment = _judge(subject, randomized)(chunk.x, chunk.y, chunk.indices)
    blank = int((judgment.prediction == -1).sum())
    if blank:
        raise CaseError(
            f"the model returns logits that are not finite for {blank} of {len(chunk.y)} clean "
            "inputs; repair the model before it is evaluated."
        )
    columns = {
        **_identity(chunk),
        **_judged("clean", judgment),
        "status": [Status.CLEAN] * len(chunk.y),
    }
    return _Result(
        sample_frame(columns, len(chunk.y)), "randomized" if randomized else "deterministic"
    )


def _checks(chain: Chain, stage: Stage) -> _Result:
    subject = chain.subject
    target = Target(subject.model, subject.classes, batch_size=subject.batch_size)
    rows = run_checks(target, chain.chunk.x, chain.chunk.y, subject.threat, subject.seed)
    if subject.case.get("training") == INCOMPLETE:
        rows.append(check("incomplete_training", 1.0, 0.0, len(chain.chunk.y)))
    return _Result(check_frame(rows))


def _curves(chain: Chain, stage: Stage) -> _Result:
    subject, chunk = chain.subject, chain.chunk
    target = Target(subject.model, subject.classes, batch_size=subject.batch_size)
    judge = _judge(subject, chain.records[0].meta.track == "randomized")
    assert stage.curves is not None
    rows = curve_rows(
        stage.curves,
        target,
        chunk.x,
        chunk.y,
        subject.threat,
        SampleRandom(subject.seed, stage.label, chunk.indices),
        lambda x: judge(x, chunk.y, chunk.indices).correct,
    )
    return _Result(curve_frame(rows))


def _traces(chain: Chain, stage: Stage) -> _Result:
    subject = chain.subject
    if not isinstance(subject.model, EquilibriumClassifier):
        return _Result(trace_frame([]))
    try:
        rows = trace_rows(subject.model, chain.chunk.x, chain.given(stage), subject.seed)
    # They decide nothing, so that a row must not fail with them.
    except Exception as cause:
        return _Result(trace_frame([]), notes=(sentence(cause),))
    return _Result(trace_frame(rows))


def _attack(chain: Chain, stage: Stage) -> _Result:
    subject, chunk = chain.subject, chain.chunk
    assert stage.plugin is not None
    rows = chain.survivors(stage) if stage.scope is Scope.SURVIVORS else list(range(len(chunk.y)))
    x_adv = chunk.x.clone()
    made_by = [""] * len(chunk.y)
    own: tuple[str, ...] = ()
    if rows:
        found = _candidates(chain, stage, rows)
        own = found.notes
        x_adv[rows] = found.x.to(x_adv)
        for row, name in zip(rows, found.made_by, strict=True):
            made_by[row] = name
    frame = _scored(chain, rows, x_adv, made_by)
    notes = option(stage.plugin, "left_out", lambda classes: ())(subject.classes)
    return _Result(_with_adjoint(chain, stage, rows, x_adv, frame), notes=(*notes, *own))


def _candidates(chain: Chain, stage: Stage, rows: list[int]) -> Candidates:
    """What the attack returns for some rows of the chunk, checked for its form only."""
    assert stage.plugin is not None
    subject, chunk = chain.subject, chain.chunk
    indices = [chunk.indices[row] for row in rows]
    pools = [pool.pool(chunk.x[rows], indices) for pool in chain.pools]
    target = Target(subject.model, subject.classes, batch_size=subject.batch_size, pools=pools)
    gradient = parse_gradient(stage.gradient)
    if stage.gradient != "honest":
        target = target.through(gradient, "surrogate" if stage.value == "surrogate" else "deployed")
    rng = SampleRandom(subject.seed, stage.label, indices)
    x, y = chunk.x[rows], chunk.y[rows]
    # Copies, so that an attack that writes into its arguments cannot move the clean inputs.
    with intact("the attack"), unchanged(subject.model, "the attack"):
        found = stage.plugin.run(target, x.clone(), y.clone(), subject.threat, rng)
    candidates = found if isinstance(found, Candidates) else Candidates(found, ("",) * len(rows))
    if not isinstance(candidates.x, Tensor) or candidates.x.shape != x.shape:
        shape = getattr(candidates.x, "shape", type(candidates.x).__name__)
        raise CaseError(f"the attack returned {shape} for inputs of shape {tuple(x.shape)}.")
    return Candidates(
        candidates.x.detach(), tuple(candidates.made_by), tuple(map(str, candidates.notes))
    )


def _scored(chain: Chain, rows: list[int], x_adv: Images, made_by: list[str]) -> pd.DataFrame:
    """The judge's word on every candidate that keeps the threat's rules."""
    subject, chunk = chain.subject, chain.chunk
    clean = chain.records[0].rows
    attacked = set(rows)
    violations = subject.threat.violations(chunk.x, x_adv)
    status = []
    for row, violation in enumerate(violations):
        if not clean["clean_correct"].iloc[row]:
            status.append(Status.MISCLASSIFIED)
        elif row not in attacked:
            status.append(Status.BROKEN_BEFORE)
        else:
            status.append(str(violation) if violation is not Violation.NONE else Status.OK)
    randomized = chain.records[0].meta.track == "randomized"
    valid = [row for row, word in enumerate(status) if word == Status.OK]
    columns: dict[str, Any] = {
        **_identity(chunk),
        "status": status,
        "made_by": made_by,
        "distance": _where(subject.threat.distance(chunk.x, x_adv).tolist(), sorted(attacked)),
    }
    for name in ("prediction", "correct", "votes", "residual", "steps"):
        columns[f"clean_{name}"] = clean[f"clean_{name}"].tolist()
    if valid:
        indices = [chunk.indices[row] for row in valid]
        judgment = _judge(subject, randomized)(x_adv[valid], chunk.y[valid], indices)
        columns |= {
            name: _scattered(values, valid, len(status))
            for name, values in _judged("adversarial", judgment).items()
        }
        columns["adversarial"] = _pixels(x_adv, columns["adversarial_correct"])
    return sample_frame(columns, len(status))


def _pixels(x_adv: Images, correct: list[bool | None]) -> list[bytes | None]:
    pixels = x_adv.detach().float().cpu().contiguous().numpy()
    return [
        pixels[row].astype("<f4").tobytes() if right is False else None
        for row, right in enumerate(correct)
    ]


def _with_adjoint(
    chain: Chain, stage: Stage, rows: list[int], x_adv: Images, frame: pd.DataFrame
) -> pd.DataFrame:
    """How the adjoint solve went at the attacked points, beside the forward residual."""
    subject, chunk = chain.subject, chain.chunk
    if not isinstance(subject.model, EquilibriumClassifier) or not rows:
        return frame
    finite = [row for row in rows if bool(x_adv[row].isfinite().all())]
    if not finite:
        return frame
    target = Target(subject.model, subject.classes, batch_size=subject.batch_size)
    gradient = parse_gradient(stage.gradient)
    if not isinstance(gradient, ModuleGradient):
        target = target.through(gradient)
    x = x_adv[finite].detach().requires_grad_()
    with torch.enable_grad():
        output = target(x)
        loss = torch.nn.functional.cross_entropy(output.logits, chunk.y[finite], reduction="sum")
        torch.autograd.grad(loss, x)
    traces = [solve.adjoint for solve in output.solves if solve.adjoint is not None]
    residuals = [t.residual for t in traces if t.residual is not None and len(t.residual) == len(x)]
    if residuals:
        worst = torch.stack(residuals).amax(0).tolist()
        frame["adjoint_residual"] = pd.Series(
            _scattered(worst, finite, len(frame)), dtype="float64"
        )
    return frame


def _judge(subject: Subject, randomized: bool) -> Judge:
    return Judge(
        subject.model,
        subject.classes,
        scope=subject.case_key,
        randomized=randomized,
        batch_size=subject.batch_size,
    )


def _identity(chunk: Chunk) -> dict[str, Any]:
    return {"index": list(chunk.indices), "label": chunk.y.tolist()}


def _judged(prefix: str, judgment: Judgment) -> dict[str, Any]:
    """A judgment as record columns; what the model does not have is left out."""
    values = judgment._asdict().items()
    return {f"{prefix}_{name}": part.tolist() for name, part in values if part is not None}


def _scattered(values: Sequence[Any], rows: Sequence[int], n: int) -> list[Any]:
    out: list[Any] = [None] * n
    for row, value in zip(rows, values, strict=True):
        out[row] = value
    return out


def _where(values: Sequence[Any], rows: Sequence[int]) -> list[Any]:
    return _scattered([values[row] for row in rows], rows, len(values))


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards its modes and parameter gradients are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(p, p.grad) for p in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None  # else a backward pass would add to the caller's tensor in place
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> float:
    """Peak memory in MiB: of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
