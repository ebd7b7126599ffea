"""`robustdeq report` and `compare`: what runs say, for readers, papers and other leaderboards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from robustdeq.cli.console import APP, ERR, OUT
from robustdeq.errors import UsageError, unknown

_FORMATS = (
    "md, csv, latex or json; html: the page; robustbench: a folder of model_info; "
    "pt: a row's inputs."
)
_OLD = (
    "is of a format without a seal, so that damage to it would not be seen; the same "
    "'robustdeq run' command writes it anew with one."
)
_OUT = typer.Option(
    help="Write to this file instead of printing; for robustbench, a folder. The page of one run "
    "is its index.html without it."
)
_FILE = typer.Option(help="Write to this file instead of printing.")
_THREAT = typer.Option(help="Only rows under it, as in Linf:8/255.")


@APP.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Folders that runs have left; several are merged."),
    ],
    form: Annotated[str, typer.Option("--format", help=_FORMATS)] = "md",
    out: Annotated[Path | None, _OUT] = None,
    row: Annotated[str | None, typer.Option(help="The row of --format pt.")] = None,
    threat: Annotated[str, _THREAT] = "",
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Print a run's table, computed afresh from its records; or export it."""
    from robustdeq.reporting.formats import FORMATS, render_run
    from robustdeq.reporting.merge import read_runs
    from robustdeq.reporting.run import unsealed

    del debug
    if form not in (*FORMATS, *_WRITERS):
        raise unknown("format", form, (*FORMATS, *_WRITERS))
    if (row is not None or threat) and form != "pt":
        raise UsageError("--row and --threat choose the row of --format pt; leave them out.")
    run = read_runs(folders)
    for folder in unsealed(run):
        ERR.print(escape(f"note: {folder}/run.json {_OLD}"), highlight=False)
    if form == "html" and len(folders) == 1:
        out = out or run.folder / "index.html"
    if form in _WRITERS and out is None:
        raise UsageError(f"--format {form} is not for a terminal; name where to with --out.")
    if out is not None and form in _WRITERS:
        _WRITERS[form](run, out, row, threat)
    else:
        _put(render_run(run, form), out)


@APP.command()
def compare(
    a: Annotated[str, typer.Argument(help="A row's ID, a defense, or a run's folder.")],
    b: Annotated[str, typer.Argument(help="Another; if A is a folder, a folder.")],
    runs: Annotated[
        list[Path] | None,
        typer.Option(help="A run's folder, repeatedly; by default the one in out/ that has both."),
    ] = None,
    form: Annotated[str, typer.Option("--format", help="text, md or html.")] = "text",
    threat: Annotated[str, _THREAT] = "",
    out: Annotated[Path | None, _FILE] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Say how two rows differ on the same samples; or all rows that two runs have in common."""
    from robustdeq.reporting.compared import FORMATS, compare_rows, compare_runs, find_runs, render
    from robustdeq.reporting.merge import read_runs

    del debug
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    if _is_run(a) and _is_run(b):
        if runs:
            raise UsageError("two folders are compared as they are; leave --runs out.")
        found = compare_runs(Path(a), Path(b), threat)
    else:
        folders = runs or find_runs((a, b), Path("out"))
        found = compare_rows(read_runs(folders), a, b, threat)
    _put(render(found, form), out)


def _is_run(name: str) -> bool:
    folder = Path(name)
    return (folder / "run.json").is_file() or (folder.is_dir() and any(folder.glob("*/run.json")))


def _put(text: str, out: Path | None) -> None:
    if out is None:
        typer.echo(text, nl=False)
    else:
        _write(out, text)


def _write(out: Path, text: str) -> None:
    from robustdeq.files import write_atomically

    _prepare(out)
    write_atomically(out, text.encode())
    _say(out)


def _prepare(out: Path) -> None:
    from robustdeq.files import make_folder

    if out.is_dir():
        raise UsageError(f"{out} is a folder; name a file.")
    make_folder(out.parent)


def _say(path: Path) -> None:
    OUT.print(f"wrote {escape(str(path))}", highlight=False)


def _write_robustbench(run: Any, out: Path, row: str | None, threat: str) -> None:
    from robustdeq.reporting.model_info import write_model_infos

    del row, threat
    for path in write_model_infos(run, out):
        _say(path)
    for verdict in run.verdicts:
        if verdict.robust_acc is None:
            OUT.print(escape(f"left out, without a robust accuracy: {verdict.id}"), highlight=False)


def _write_tensor(run: Any, out: Path, row: str | None, threat: str) -> None:
    from robustdeq.evidence.tensor import adversarial_tensor, write_tensor
    from robustdeq.reporting.rows import row_named

    if row is None:
        raise UsageError("--format pt is of one row; name it with --row.")
    _prepare(out)
    write_tensor(out, adversarial_tensor(run, row_named(run, row, threat)))
    _say(out)


def _write_page(run: Any, out: Path, row: str | None, threat: str) -> None:
    from robustdeq.reporting.publish import publish_report

    del row, threat
    _prepare(out)
    _say(publish_report(run, out))


_WRITERS = {"html": _write_page, "robustbench": _write_robustbench, "pt": _write_tensor}
"""Formats that are files, and what writes them."""
