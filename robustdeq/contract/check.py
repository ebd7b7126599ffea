"""`robustdeq check`: the contract tests on a plugin, then the honesty gate on a trained model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from robustdeq.contract import contract_findings
from robustdeq.contract.defenses import build
from robustdeq.contract.findings import Finding, failures
from robustdeq.contract.source import plugin_classes
from robustdeq.datasets import Slice, load_slice
from robustdeq.errors import RobustDEQError, sentence
from robustdeq.evaluation.gate import Row, run_checks
from robustdeq.evaluation.gate.rules import RULES
from robustdeq.evaluation.subject import chunk_of
from robustdeq.interfaces import Defense, Kind, Recipe, kind_of, option, trained_form
from robustdeq.registry import load
from robustdeq.targets import Target
from robustdeq.threats import Threat
from robustdeq.training.loop import train

EPOCHS = 12
"""Of the training before the gate, where the recipe lets us choose."""
SAMPLES = 100
THREATS = {"digits": "Linf:3/16", "mnist": "Linf:0.2", "fashion_mnist": "Linf:0.1"}
"""Where none is given; elsewhere Linf:8/255."""


@dataclass(frozen=True)
class PluginReport:
    """What was found on one plugin.

    Attributes:
        context: how the model was trained that the gate looked at; empty without a gate.
    """

    name: str
    kind: Kind
    findings: tuple[Finding, ...]
    context: str = ""

    @property
    def failed(self) -> list[Finding]:
        """The findings that are failures."""
        return failures(self.findings)


@dataclass(frozen=True)
class CheckReport:
    """What `robustdeq check` found: exit code 0 if `ok`, else 1."""

    reference: str
    plugins: tuple[PluginReport, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not any(plugin.failed for plugin in self.plugins)

    def lines(self) -> Iterator[str]:
        """One line per test, and a last one per plugin that names what failed."""
        for plugin in self.plugins:
            yield f"{plugin.kind} {plugin.name}"
            for finding in plugin.findings:
                yield f"  {finding}"
            if plugin.context:
                yield f"  (honesty checks: {plugin.context})"
            names = ", ".join(finding.name for finding in plugin.failed)
            yield f"{plugin.name} fails {names}." if names else f"{plugin.name} passes."


def check_plugin(
    reference: str,
    *,
    dataset: str = "digits",
    threat: str = "",
    minutes: float = 0.5,
    parameters: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> CheckReport:
    """Test all plugins that a reference names.

    Args:
        reference: MODULE:NAME, FILE.py, FILE.py:NAME or a registered name.
        dataset: what a defense is trained and examined on.
        threat: of training and gate; the suites' own for the data set by default.
        minutes: most time that the training takes; the model is examined as it then stands.
        parameters: of the plugin, in place of its defaults.

    Raises:
        UsageError: if the reference names no plugin, or data set or threat are not known.
    """
    ball = Threat.parse(threat or THREATS.get(dataset, "Linf:8/255"))
    reports = [
        _report(cls, parameters or {}, dataset, ball, minutes, seed)
        for cls in plugin_classes(reference)
    ]
    return CheckReport(reference, tuple(reports))


def _report(
    cls: type[Any],
    parameters: Mapping[str, Any],
    dataset: str,
    threat: Threat,
    minutes: float,
    seed: int,
) -> PluginReport:
    kind = kind_of(cls)
    assert kind is not None
    try:
        plugin = cls(**parameters)
    except Exception as cause:
        remedy = "Give every parameter a default that works."
        return PluginReport(
            cls.__name__, kind, (Finding("parameters", "failed", sentence(cause), remedy),)
        )
    findings = contract_findings(plugin)
    if kind != "defense" or not _examinable(findings):
        return PluginReport(cls.__name__, kind, tuple(findings))
    try:
        rows, context = _gate(plugin, dataset, threat, minutes, seed)
    except Exception as cause:
        remedy = f"Build and answer on {dataset}, or name another --dataset."
        failed = Finding("honesty_checks", "failed", sentence(cause), remedy)
        return PluginReport(cls.__name__, kind, (*findings, failed))
    return PluginReport(cls.__name__, kind, (*findings, *map(_finding, rows)), context)


def _examinable(findings: Sequence[Finding]) -> bool:
    """Whether there is a model, of one size at least, that could be trained and examined."""
    failed = {finding.name for finding in failures(findings)}
    answers = [f.name for f in findings if f.name.startswith("logits") and f.name not in failed]
    return "members" not in failed and bool(answers)


def _gate(
    defense: Defense, dataset: str, threat: Threat, minutes: float, seed: int
) -> tuple[list[Row], str]:
    data = load_slice(dataset, "train")
    model, context = _trained(defense, data, threat, minutes, seed)
    chunk = chunk_of(load_slice(dataset, "test", SAMPLES), 0, torch.device("cpu"))
    rows = run_checks(Target(model, data.spec.classes), chunk.x, chunk.y, threat, seed)
    return rows, f"{context}; {len(chunk.y)} images of {dataset}, {threat}"


def _trained(
    defense: Defense, data: Slice, threat: Threat, minutes: float, seed: int
) -> tuple[nn.Module, str]:
    """A model after a short training by the defense's own recipe, or as it is built."""
    model = build(defense, data.spec, seed).eval()
    try:
        recipe = _brief(load("recipe", defense.recipe, {}), option(defense, "suited", {}))
        trained = train(
            trained_form(defense),
            recipe,
            data,
            threat,
            seed=seed,
            device=torch.device("cpu"),
            minutes=minutes,
        )
        model.load_state_dict(trained.model.state_dict())
    except (RobustDEQError, RuntimeError) as cause:
        return model, f"untrained, because {sentence(cause)}"
    steps = int(trained.log[-1]["step"]) if trained.log else 0
    cut = "" if trained.complete else f", cut short after {minutes:g} minutes"
    return model.requires_grad_(False), f"trained by {defense.recipe} for {steps} steps{cut}"


def _brief(recipe: Recipe, suited: Mapping[str, Any]) -> Recipe:
    """The recipe with few epochs, and with what the defense wants of it, as far as it has them."""
    wanted = {**suited, "epochs": EPOCHS, "learning_rate": 5e-3}
    known = {field.name for field in fields(recipe)}  # type: ignore[arg-type]
    own = {name: value for name, value in wanted.items() if name in known}
    inner = getattr(recipe, "parameters", None)
    if isinstance(inner, dict):  # a recipe around another one
        inside = {name: value for name, value in wanted.items() if name in inner}
        own["parameters"] = {**inner, **inside}
    return replace(recipe, **own)  # type: ignore[type-var]


def _finding(row: Row) -> Finding:
    """A row of the gate as a line."""
    rule = RULES.get(row["name"])
    if row["status"] == "skipped":
        return Finding(row["name"], "skipped", row["detail"])
    if rule is None:
        return Finding(row["name"], row["status"], f"{row['value']:.3g} ({row['detail']})")
    bound = f"{'at least' if rule.at_least else 'at most'} {row['threshold']:.3g}"
    detail = f"{row['value']:.3g}, {bound}" + (f"; {row['detail']}" if row["detail"] else "")
    return Finding(row["name"], row["status"], f"{detail}.", rule.remedy)
