r"""The tables of a run for a paper: LaTeX with booktabs, a table a section. Knows no torch.

`\usepackage{booktabs}` is all that a document needs. What others wrote (IDs, flags, notes) is
written in ASCII and cannot be a command, whatever stands in it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import pandas as pd

from robustdeq.reporting.page.environment import cut, percent
from robustdeq.tables import APART, TRACKS, remarks, short, tabulate
from robustdeq.verdict import Verdict

_NAME, _NOTE = 40, 300
"""Characters that a name or a note may take in a table."""
_HEADINGS = ("Rank", "Model", "$n$", "Clean", "AA", "Robust", "95\\,\\%", "NFE")
_COLUMNS = "rlrrrrrr"
_CAPTION = (
    "Accuracy in percent. AA: AutoAttack alone. Robust: worst case over all attacks and "
    "gradients, with Wilson interval. NFE: evaluations of the cell and vector-Jacobian products. "
    "n/a: could not be measured. Bold: rank 1; rows of one rank do not differ beyond chance on the "
    "same samples (exact McNemar test, Holm's correction), whatever their figures."
)
_SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "`": r"\textasciigrave{}",
    '"': "''", "-": "-{}", "[": "{[}", "]": "{]}", "*": "{*}",
    "\N{HORIZONTAL ELLIPSIS}": r"\ldots{}",
} | {mark: f"\\{mark}" for mark in "&%$#_{}"}  # fmt: skip
_ACCENTS = {
    "\N{COMBINING GRAVE ACCENT}": "`", "\N{COMBINING ACUTE ACCENT}": "'",
    "\N{COMBINING CIRCUMFLEX ACCENT}": "^", "\N{COMBINING TILDE}": "~",
    "\N{COMBINING DIAERESIS}": '"', "\N{COMBINING MACRON}": "=", "\N{COMBINING DOT ABOVE}": ".",
    "\N{COMBINING BREVE}": "u", "\N{COMBINING CARON}": "v", "\N{COMBINING RING ABOVE}": "r",
    "\N{COMBINING CEDILLA}": "c", "\N{COMBINING DOUBLE ACUTE ACCENT}": "H",
}  # fmt: skip


def to_latex(name: str, verdicts: Sequence[Verdict]) -> str:
    """A table per data set, threat and track, with the flags and notes of its rows below it."""
    sections = tabulate(verdicts).groupby(["dataset", "threat", "track"], sort=False)
    head = [f"% RobustDEQ: {escaped(name)}", r"% \usepackage{booktabs}"]
    tables = [_table(where, rows, k) for k, (where, rows) in enumerate(sections, 1)]
    return "\n\n".join(["\n".join(head), *tables]) + "\n"


def escaped(text: object, longest: int = _NAME) -> str:
    """Text as LaTeX that prints it, in ASCII, on one line and no longer than it may be.

    A letter with an accent becomes that accent's command; what ASCII has no name for is written
    as its code point, as in {[}U+4E2D{]}.
    """
    return "".join(map(_escaped, cut(text, longest)))


def _escaped(mark: str) -> str:
    if mark in _SPECIAL:
        return _SPECIAL[mark]
    if mark.isascii():
        return mark
    parts = unicodedata.normalize("NFD", mark)
    if len(parts) == 2 and parts[0].isascii() and parts[0].isalpha() and parts[1] in _ACCENTS:
        return f"\\{_ACCENTS[parts[1]]}{{{parts[0]}}}"
    return f"{{[}}U+{ord(mark):04X}{{]}}"


def _table(where: Sequence[str], rows: pd.DataFrame, number: int) -> str:
    dataset, threat, track = where
    told = f"{escaped(dataset)}, {escaped(threat)}, {escaped(TRACKS.get(track, track))}"
    notes: dict[str, int] = {}
    cells = []
    for _, row in rows.iterrows():
        note = _note(row)
        mark = f"$^{{{notes.setdefault(note, len(notes) + 1)}}}$" if note else ""
        cells.append(_cells(row, mark))
    frame = pd.DataFrame(cells, columns=list(_HEADINGS))
    body = frame.style.hide(axis="index").to_latex(hrules=True, column_format=_COLUMNS)
    below = [f"$^{{{number}}}$ {escaped(note, _NOTE)}." for note, number in notes.items()]
    return "\n".join(
        [
            r"\begin{table}[htbp]",
            r"\centering\footnotesize\setlength{\tabcolsep}{2.5pt}",
            f"\\caption{{{told}. {escaped(_CAPTION, len(_CAPTION))}}}",
            f"\\label{{tab:robustdeq-{number}}}",
            body.strip(),
            *[f"\\par\\raggedright\\scriptsize {note}" for note in below],
            r"\end{table}",
        ]
    )


def _note(row: pd.Series) -> str:
    engine = row["autoattack_engine"]
    by = "" if engine in ("", "reference") else f"AutoAttack by the {engine} engine"
    return "; ".join(part for part in (by, remarks(row)) if part)


def _cells(row: pd.Series, mark: str) -> list[str]:
    interval = "n/a"
    if not pd.isna(row["robust_low"]):
        interval = f"{percent(row['robust_low'])}--{percent(row['robust_high'])}"
    robust = percent(row["robust_acc"])
    # A row on other samples is first among its like only.
    if not pd.isna(row["rank"]) and row["rank"] == 1 and APART not in row["note"]:
        robust = f"\\textbf{{{robust}}}"
    return [
        "n/a" if pd.isna(row["rank"]) else str(row["rank"]),
        escaped(row["id"]) + mark,
        str(row["n"]),
        percent(row["clean_acc"]),
        percent(row["autoattack_acc"]),
        robust,
        interval,
        short(row["forward_nfe"] + row["backward_nfe"]),
    ]
