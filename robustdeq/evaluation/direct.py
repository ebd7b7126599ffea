"""`robustdeq.evaluate` on any module, and `robustdeq.load_model` of the registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustdeq.arithmetic import exact_float32
from robustdeq.datasets import SliceIdentity, spec_of
from robustdeq.equilibrium import parameter_dtype
from robustdeq.errors import CaseError, UsageError, unknown
from robustdeq.evaluation.built import as_module
from robustdeq.evaluation.chain import Chain, Chunk, Event, Memory, Subject
from robustdeq.evaluation.provenance import core_digest
from robustdeq.evaluation.stages import Stage, attack_stage, attack_stages, unique
from robustdeq.evaluation.subject import build_subject, chunk_count, weights_source
from robustdeq.interfaces import Attack, Defense
from robustdeq.keys import digest
from robustdeq.records import FORMAT
from robustdeq.shapes import Images
from robustdeq.suite import (
    AttackEntry,
    expand,
    find_suite,
    resolved,
    suite_names,
)
from robustdeq.suite import (
    battery as named_battery,
)
from robustdeq.threats import Threat
from robustdeq.verdict import Evidence, Failure, Verdict, judge_evidence
from robustdeq.weights import state_sha256

AttackLike = str | AttackEntry | Attack


@exact_float32()
def evaluate(
    model: nn.Module | Defense,
    x: Tensor,
    y: Tensor,
    *,
    weights: str | Path | None = None,
    threat: str | Threat = "Linf:8/255",
    battery: str = "standard",
    attacks: Sequence[AttackLike] | None = None,
    seed: int = 0,
    chunk: int = 100,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    name: str | None = None,
    report: Callable[[Event], None] = lambda event: None,
) -> Verdict:
    """Attack any model and return the verdict, the same row that a suite would give.

    The model is evaluated in eval mode and left as it was: mode, parameters and their gradients.

    Args:
        model: a module from (batch, channels, height, width) float32 in [0, 1] to logits
            (batch, classes), two classes or more, with any normalization inside; or a defense
            plugin, such as `MyDEQ(width=64)`, which is built for the shape of `x`.
        x: images, floating point in [0, 1], (n, channels, height, width).
        y: labels, (n,), integers from 0.
        weights: a file of 'robustdeq train', for a plugin; without one it is evaluated as it is
            built under `seed`, for as many classes as `y` shows.
        threat: as in "Linf:8/255" or "L2:0.5".
        battery: a named list of attacks, "standard" for AutoAttack.
        attacks: a list of attacks in place of the battery: names, files, entries or objects.
        seed: of all attacks; equal seeds give equal results on one machine.
        chunk: samples that a library attack is given as one batch.
        batch_size: most rows in one forward pass, to bound memory; changes no result.
        device: where to evaluate; by default where the model's parameters are.
        name: the ID in the row; the class's name by default.
        report: is called with every event, for a progress display.

    Raises:
        UsageError: if inputs, threat, battery or attacks are not what they must be.
        CaseError: if the model does not return finite logits of the right shape on clean inputs, or
            the weights do not belong to the plugin.
    """
    threat = threat if isinstance(threat, Threat) else Threat.parse(threat)
    if chunk < 1 or (batch_size is not None and batch_size < 1):
        raise UsageError(f"chunk={chunk} and batch_size={batch_size} must be at least 1.")
    # A model alone has no other rows to take examples from.
    stages = tuple(stage for stage in _stages(battery, attacks) if stage.phase == 1)
    _check_inputs(x, y)
    module = as_module(model, x, y, weights, seed, device)
    where = _device(module, device)
    images, labels = x.detach().to(where).float(), y.detach().to(where).long()
    name = name or type(model).__name__
    subject = _subject(module, images, labels, threat, seed, chunk, batch_size, where, name)
    return _run(subject, images, labels, chunk, stages, report)


def load_model(
    id: str,  # noqa: A002 - RobustBench's own name for it
    dataset: str = "digits",
    threat: str | None = None,
    device: str = "cpu",
    weights: str | Path | None = None,
) -> nn.Module:
    """A trained model of the suites that ship with the package, in eval mode.

    Args:
        id: a row's ID, as in "Madry2018Towards_deq".
        dataset: the data set that it was trained on.
        threat: the threat of its row; any by default.
        weights: a folder that is looked in first for its weights, as by `run --weights`.

    Raises:
        UsageError: if no suite has such a row.
        CaseError: if its weights are missing or corrupt.
    """
    wanted = None if threat is None else str(Threat.parse(threat))
    ids: set[str] = set()
    for name in suite_names():
        suite = find_suite(name)
        for case in expand(suite):
            if case.dataset.name != dataset:
                continue
            ids.add(case.entry.id)
            if case.entry.id == id and wanted in (None, str(case.threat)):
                data = SliceIdentity(spec_of(dataset), "test", 0, "")
                source = weights_source(suite, None if weights is None else Path(weights))
                return build_subject(case, data, source, torch.device(device), None).model.eval()
    if id in ids:
        raise UsageError(
            f"model {id!r} on {dataset} has no row under {wanted}; leave the threat out."
        )
    raise unknown(f"model on {dataset}", id, ids)


def _run(
    subject: Subject,
    x: Images,
    y: Tensor,
    chunk: int,
    stages: Sequence[Stage],
    report: Callable[[Event], None],
) -> Verdict:
    shelf, failures, records = Memory(), [], []
    expected: dict[int, tuple[str, ...]] = {}
    chunks = chunk_count(len(y), chunk)
    for number in range(chunks):
        rows = slice(number * chunk, (number + 1) * chunk)
        part = Chunk(number, x[rows], y[rows], tuple(range(len(y)))[rows])
        chain = Chain(subject, part, stages, shelf)
        for event in chain.run():
            report(event)
            if event.kind == "failed":
                failures.append(Failure(event.label, number, event.reason))
        expected[number] = tuple(s.label for s in chain.planned(chain.records[0].meta.track))
        records += chain.records
    evidence = Evidence(
        case=subject.case,
        chunks=chunks,
        expected=expected,
        records=tuple(records),
        failures=tuple(failures),
    )
    verdict = judge_evidence(evidence)
    verdict.adversarials = _adversarials(x, evidence, verdict)
    return verdict


def _adversarials(x: Images, evidence: Evidence, verdict: Verdict) -> Tensor:
    """The example that first broke each sample; the clean input where none did."""
    out = x.detach().float().cpu().clone()
    by = dict(zip(verdict.samples["index"], verdict.samples["broken_by"], strict=True))
    for record in evidence.records:
        if record.meta.kind != "attack":
            continue
        for row in record.rows.dropna(subset=["adversarial"]).itertuples():
            first = by.get(row.index)
            if isinstance(first, str) and first.split("/")[0] == record.meta.label:
                pixels = np.frombuffer(row.adversarial, dtype="<f4").reshape(out.shape[1:])
                out[row.index] = torch.from_numpy(pixels.copy())
    return out


def _stages(battery: str, attacks: Sequence[AttackLike] | None) -> tuple[Stage, ...]:
    if attacks is None:
        return attack_stages(tuple(resolved(entry) for entry in named_battery(battery)))
    if isinstance(attacks, str) or not attacks:
        raise UsageError("attacks is a list of at least one attack; leave it out for the battery.")
    stages: list[Stage] = []
    for item in attacks:
        if isinstance(item, str):
            item = AttackEntry(attack=item)
        if isinstance(item, AttackEntry):
            stages += attack_stages((resolved(item),))
        else:
            stages.append(attack_stage(item, type(item).__name__.lower()))
    return unique(stages)


def _device(model: nn.Module, device: str | torch.device | None) -> torch.device:
    held = next((p.device for p in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    wanted = held if device is None else torch.device(device)
    if wanted.type != held.type:
        raise UsageError(f"the model is on {held}, device is {wanted}; move the model there first.")
    return wanted


def _check_inputs(x: Tensor, y: Tensor) -> None:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise UsageError("x and y must be tensors; convert them with torch.as_tensor.")
    if x.dim() != 4 or not x.is_floating_point():
        raise UsageError(
            f"x has shape {tuple(x.shape)} and type {x.dtype}; give floating-point images "
            "(n, channels, height, width) in [0, 1]."
        )
    if y.shape != x.shape[:1] or y.is_floating_point() or not len(y):
        raise UsageError(
            f"y has shape {tuple(y.shape)} and type {y.dtype}; give {len(x)} integer labels, "
            "at least one."
        )
    if not bool(x.isfinite().all()) or float(x.min()) < 0 or float(x.max()) > 1:
        raise UsageError("x has pixels outside [0, 1]; scale it, and normalize inside the model.")
    if int(y.min()) < 0:
        raise UsageError(f"y has the label {int(y.min())}; labels count from 0.")


def _subject(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    seed: int,
    chunk: int,
    batch_size: int | None,
    device: torch.device,
    name: str,
) -> Subject:
    classes = _count_classes(model, x[:1])
    if int(y.max()) >= classes:
        raise UsageError(f"y has the label {int(y.max())}, but the model has {classes} classes.")
    sha = state_sha256(model)
    case = {
        "format": FORMAT,
        "id": name,
        "defense": type(model).__qualname__,
        "weights_sha256": sha,
        "dataset": "tensors",
        "digest": digest([_bytes_digest(x), _bytes_digest(y)]),
        "classes": classes,
        "n": len(y),
        "threat": str(threat),
        "seed": seed,
        "chunk": chunk,
        "core": core_digest(),
    }
    return Subject(model, classes, threat, case, digest(case), seed, device, batch_size)


def _count_classes(model: nn.Module, x: Tensor) -> int:
    """The number of classes, from one forward pass.

    Raises:
        CaseError: if the model fails, or returns no matrix of logits with two columns or more.
    """
    training = [module.training for module in model.modules()]
    dtype = parameter_dtype(model)
    model.eval()
    try:
        with torch.no_grad():
            logits: Any = model(x if dtype is None else x.to(dtype))
    except Exception as cause:
        raise CaseError(
            f"the model fails on an input of shape {tuple(x.shape)} "
            f"({type(cause).__name__}: {' '.join(str(cause).split())[:200]})."
        ) from cause
    finally:
        for module, mode in zip(model.modules(), training, strict=True):
            module.training = mode
    if (
        not isinstance(logits, Tensor)
        or logits.dim() != 2
        or len(logits) != 1
        or logits.shape[1] < 2
    ):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise CaseError(
            f"the model returns {shape} for one image; return logits of shape (batch, classes) "
            "with two classes or more."
        )
    return int(logits.shape[1])


def _bytes_digest(tensor: Tensor) -> str:
    import hashlib

    plain = tensor.detach().cpu().contiguous()
    return hashlib.sha256(
        f"{tuple(plain.shape)}{plain.dtype}".encode() + plain.numpy().tobytes()
    ).hexdigest()
