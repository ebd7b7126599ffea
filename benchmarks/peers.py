"""What held-out attacks still break of the samples that a run left robust.

For each equilibrium row of a finished run: AutoAttack of `pyautoattack` under another seed,
AutoAttack of `torchattacks`, and Foolbox's strongest fixed-epsilon and minimization attacks; none
is in the battery. The deployed predictor judges each candidate as it does in a run.

    robustdeq run digits --battery adaptive --out out
    pip install torchattacks foolbox
    python benchmarks/peers.py digits out/digits

`--page` only writes the table of the held results into docs/peers.md, between <!-- peers --> and
<!-- end -->.
"""

from __future__ import annotations

import argparse
import re
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from robustdeq.datasets import load_slice
from robustdeq.equilibrium import EquilibriumClassifier
from robustdeq.evaluation.chain import Subject
from robustdeq.evaluation.judge import Judge
from robustdeq.evaluation.subject import build_subject, chunk_of, weights_source
from robustdeq.reporting.run import read_run
from robustdeq.suite import Case, expand, find_suite
from robustdeq.targets import Target
from robustdeq.threats import Threat, Violation
from robustdeq.verdict import Verdict

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "peers-digits.csv"
PAGE = ROOT / "docs" / "peers.md"
PLACE = re.compile(r"(<!-- peers -->\n).*?(<!-- end -->)", re.DOTALL)

Peer = Callable[[nn.Module, Tensor, Tensor, Threat], Tensor]
"""From model, images, labels and threat to candidates."""


def pyautoattack(model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    from pyautoattack import AutoAttack

    attack = AutoAttack(model, norm=str(threat.norm), eps=threat.eps, seed=20_261, device="cpu")
    found: Tensor = attack.run_standard_evaluation(x, y, batch_size=len(x))[0]
    return found


def torchattacks(model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    from torchattacks import AutoAttack

    classes = int(model(x[:1]).shape[1])
    attack = AutoAttack(model, norm=str(threat.norm), eps=threat.eps, n_classes=classes, seed=1)
    found: Tensor = attack(x, y)
    return found


def foolbox(name: str, **parameters: Any) -> Peer:
    """One Foolbox attack by its class name."""

    def run(model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
        import foolbox as fb

        attack = getattr(fb.attacks, name)(**parameters)
        torch.manual_seed(1)
        clipped: Tensor = attack(fb.PyTorchModel(model, (0, 1)), x, y, epsilons=threat.eps)[1]
        return clipped

    return run


PEERS: dict[str, Peer] = {
    "pyautoattack, another seed": pyautoattack,
    "torchattacks AutoAttack": torchattacks,
    "Foolbox LinfPGD, 200 steps": foolbox("LinfPGD", steps=200, rel_stepsize=0.02),
    "Foolbox LinfAdamPGD, 200 steps": foolbox("LinfAdamPGD", steps=200, rel_stepsize=0.02),
    "Foolbox LInfFMN, 300 steps": foolbox("LInfFMNAttack", steps=300),
    "Foolbox LinfDeepFool": foolbox("LinfDeepFoolAttack", steps=100),
}


def rows(suite_name: str, folder: Path, only: str) -> Iterable[tuple[Case, Verdict]]:
    """The run's ranked rows with their cases."""
    verdicts = read_run(folder).verdicts
    by_row = {(v.id, v.dataset, v.threat): v for v in verdicts if v.robust_acc is not None}
    for case in expand(find_suite(suite_name)):
        verdict = by_row.get((case.entry.id, case.dataset.name, str(case.threat)))
        if verdict is not None and re.search(only, case.entry.id):
            yield case, verdict


def broken_by_peers(case: Case, verdict: Verdict, weights: Path | None) -> list[dict[str, Any]]:
    """A line per peer for one row; none for a model that does not iterate."""
    data = load_slice(case.dataset.name, "test", verdict.n)
    source = weights_source(find_suite("digits"), weights)
    subject = build_subject(case, data.identity(), source, torch.device("cpu"), None)
    if not isinstance(subject.model, EquilibriumClassifier):
        return []
    alive = verdict.samples.loc[verdict.samples["robust"], "index"].to_numpy()
    keep = [int(k) for k in range(len(data)) if data.indices[k] in alive]
    chunk = chunk_of(data, 0, torch.device("cpu"))
    x, y = chunk.x[keep], chunk.y[keep]
    return [_line(subject, verdict, name, peer, x, y) for name, peer in PEERS.items()]


def _line(
    subject: Subject, verdict: Verdict, name: str, peer: Peer, x: Tensor, y: Tensor
) -> dict[str, Any]:
    begun = time.perf_counter()
    model = Target(subject.model.eval(), subject.classes).module().eval()
    found = peer(model, x.clone(), y.clone(), subject.threat).detach() if len(x) else x
    valid = [v is Violation.NONE for v in subject.threat.violations(x, found)]
    judge = Judge(
        subject.model, subject.classes, scope="peers", randomized=verdict.track == "randomized"
    )
    wrong = ~judge(found, y, list(range(len(y)))).correct
    broken = int((wrong & torch.tensor(valid, dtype=torch.bool)).sum())
    allowed = max(1, round(0.005 * verdict.n))
    line = {
        "id": verdict.id, "dataset": verdict.dataset, "threat": verdict.threat, "n": verdict.n,
        "robust": len(y), "peer": name, "broken": broken, "allowed": allowed,
        "seconds": round(time.perf_counter() - begun, 1),
    }  # fmt: skip
    print(line, flush=True)
    return line


def table(frame: pd.DataFrame) -> str:
    """The Markdown table: a line per row, a column per peer."""
    names = list(dict.fromkeys(frame["peer"]))
    head = ["Row", "Data", "n", "Left robust", "Allowed", *names]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (row, dataset, threat), part in frame.groupby(["id", "dataset", "threat"], sort=False):
        broken = part.set_index("peer")["broken"]
        first = part.iloc[0]
        cells = [f"`{row}`", f"{dataset}, {threat}", first["n"], first["robust"], first["allowed"]]
        lines.append("| " + " | ".join(str(c) for c in [*cells, *broken[names]]) + " |")
    return "\n".join(lines) + "\n"


def filled(page: str, frame: pd.DataFrame) -> str:
    """The page with its table."""
    return PLACE.sub(lambda match: match[1] + table(frame) + match[2], page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", nargs="?")
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--only", default="")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true")
    given = parser.parse_args()
    if not given.page:
        _measure(given)
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(filled(text, pd.read_csv(RESULTS)), encoding="utf-8")


def _measure(given: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    lines: list[dict[str, Any]] = []
    for case, verdict in rows(given.suite, given.folder, given.only):
        lines += broken_by_peers(case, verdict, given.weights)
        given.csv.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(lines).to_csv(given.csv, index=False)


if __name__ == "__main__":
    main()
