"""A run's rows as RobustBench keeps its own: `DATASET/THREAT/ID.json`, one object each. No torch.

Keys and forms are those of its curated files: accuracies are percent as text with two decimals,
`autoattack_acc` is AutoAttack's, `external` the best that is known where that is lower. What
is not known is null, as its own writer leaves it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustdeq.comparison import doubts
from robustdeq.errors import UsageError
from robustdeq.files import make_folder, write_atomically
from robustdeq.keys import digest
from robustdeq.reporting.page.environment import cut, link
from robustdeq.reporting.run import RunReport
from robustdeq.verdict import Verdict

DRAWS = 32
"""Forward passes behind one prediction of a randomized model: those of `evaluation.judge`."""
_QUOTES = str.maketrans("<>", "\u2039\u203a")
_NAME = 80
"""Characters that a file's or a folder's name may take."""


@dataclass(frozen=True)
class ModelInfo:
    """One file: its path below the folder, as parts that cannot lead out of it, and its content."""

    parts: tuple[str, str, str]
    content: dict[str, Any]

    @property
    def path(self) -> Path:
        """Where the file stands below the folder."""
        return Path(*self.parts)


def model_infos(run: RunReport) -> list[ModelInfo]:
    """A file per row that has a robust accuracy; RobustBench cannot show the others.

    A threat's folder is its norm, as there; its radius is added where a data set has several,
    because one folder is one ranking.
    """
    several = _several_radii(run)
    taken: set[str] = set()
    found = []
    for row, verdict in enumerate(run.verdicts):
        if verdict.robust_acc is None:
            continue
        norm, _, _ = verdict.threat.partition(":")
        threat = verdict.threat if (verdict.dataset, norm) in several else norm
        folders = file_name(verdict.dataset), file_name(threat)
        name = file_name(verdict.id)
        if "/".join((*folders, name)).casefold() in taken:
            name = f"{name}-{digest(run.evidences[row].case)[:10]}"
        taken.add("/".join((*folders, name)).casefold())
        found.append(ModelInfo((*folders, f"{name}.json"), model_info(run, row)))
    return found


def write_model_infos(run: RunReport, folder: Path) -> list[Path]:
    """Write the files of `model_infos` into a folder; returns their paths.

    Raises:
        UsageError: if no row has a robust accuracy, or the folder cannot be written to.
    """
    infos = model_infos(run)
    if not infos:
        raise UsageError(f"no row of {run.name} has a robust accuracy to export; run it again.")
    for info in infos:
        path = folder / info.path
        make_folder(path.parent)
        text = json.dumps(info.content, indent=2, ensure_ascii=False)
        write_atomically(path, (text + "\n").encode())
    return [folder / info.path for info in infos]


def model_info(run: RunReport, row: int) -> dict[str, Any]:
    """A row's object, in the order of RobustBench's keys.

    `reported` is given only where the defense claims a figure for this very threat, in the words
    of `claimed_figure`; `additional_data` only where the suite says how the row was trained.
    """
    verdict, about = run.verdicts[row], run.about(row)
    info = {
        "link": _link(about.get("link", "")),
        "name": _text(about.get("title", "")) or _text(verdict.id),
        "authors": _text(about.get("authors", "")),
        "additional_data": False if run.entry(row).get("training") else None,
        "number_forward_passes": DRAWS if verdict.track == "randomized" else 1,
        "dataset": _text(verdict.dataset),
        "venue": _text(about.get("venue", "")) or "N/A",
        "architecture": _architecture(run, row),
        "eps": _text(verdict.threat.partition(":")[2]),
        "clean_acc": _percent(verdict.clean_acc),
        "reported": claimed_figure(about.get("claimed", ""), verdict),
        "autoattack_acc": _percent(verdict.autoattack_acc),
    }
    if verdict.autoattack_acc is None or (verdict.robust_acc or 0.0) < verdict.autoattack_acc:
        info["external"] = _percent(verdict.robust_acc)
    if doubts(verdict):
        info["unreliable"] = True
    return info | {"footnote": _footnote(run, row)}


def claimed_figure(claimed: str, verdict: Verdict) -> str | None:
    """The accuracy in a claim like "71.28 % on cifar10 under Linf:8/255", for the row's threat.

    Percent as text; None where the claim has no such words for this data set and threat, or has
    several figures for them.
    """
    where = f"{re.escape(verdict.dataset)} under {re.escape(verdict.threat)}"
    pattern = rf"(?<![\d.])(\d{{1,2}}(?:\.\d+)?|100(?:\.0+)?) ?% on {where}(?![\w/]|\.\d)"
    figures = {f"{float(figure):.2f}" for figure in re.findall(pattern, claimed)}
    return figures.pop() if len(figures) == 1 else None


def file_name(text: str) -> str:
    """A name for a file or folder: the text itself where that is harmless, else one like it.

    It holds letters, digits, dots, dashes, pluses and underscores alone, neither starts nor
    ends with a dot or a dash, and has a digest where it is not the text itself.
    """
    plain = re.sub(r"[^A-Za-z0-9._+-]+", "-", text)[:_NAME].strip("-.")
    return plain if plain and plain == text else f"{plain or 'row'}-{digest(text)[:10]}"


def _several_radii(run: RunReport) -> set[tuple[str, str]]:
    threats = {(v.dataset, *v.threat.split(":", 1)) for v in run.verdicts}
    pairs = [(dataset, norm) for dataset, norm, *_ in threats]
    return {pair for pair in pairs if pairs.count(pair) > 1}


def _architecture(run: RunReport, row: int) -> str:
    case = run.evidences[row].case
    parameters = sorted(case.get("parameters", {}).items())
    told = ", ".join(f"{name} {value}" for name, value in parameters)
    return _text(f"{case['defense']} ({told})" if told else case["defense"])


def _footnote(run: RunReport, row: int) -> str:
    """On what the figures rest: fewer samples than RobustBench's, and not its attack alone."""
    verdict, data = run.verdicts[row], run.origin(row).data
    attacks = {r.meta.label for r in run.evidences[row].records if r.meta.kind == "attack"}
    parts = [
        f"RobustDEQ {data.get('robustdeq', '')}, suite {data['suite']['name']}, row {verdict.id}: "
        f"first {verdict.n} test samples, worst case over {len(attacks)} attacks "
        f"({_percent(verdict.robust_low)} to {_percent(verdict.robust_high)}, 95 % Wilson interval)"
    ]
    if verdict.autoattack_engine not in ("", "reference"):
        parts.append(f"AutoAttack by the {verdict.autoattack_engine} engine")
    parts += [f"credit: {verdict.credit}"] if verdict.credit else []
    return _text("; ".join([*parts, *verdict.flags, *filter(None, [verdict.note])]))


def _text(text: str) -> str:
    """Text of others on one line. RobustBench's page does not escape: no markup may start."""
    return cut(text.translate(_QUOTES))


def _link(text: str) -> str | None:
    found = link(text)
    return found if found and not set(found) & set("\"'<>`\\") else None


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.2f}"
