"""`robustdeq list`, `check` and `new`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from robustdeq.cli.console import APP, OUT
from robustdeq.errors import unknown
from robustdeq.texts import one_line

KINDS = ("defenses", "attacks", "recipes", "suites", "datasets")


@APP.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help="defenses, attacks, recipes, suites or datasets.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """List what is registered."""
    from robustdeq.listing import listed

    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    rows = listed(kind)
    if as_json:
        typer.echo(json.dumps(rows, indent=1, default=str))
    else:
        _print_listing(rows)
    if any("error" in row for row in rows):
        raise typer.Exit(1)


def _print_listing(rows: list[dict[str, Any]]) -> None:
    """A table; or, where rows have much to say, a paragraph each."""
    from rich.table import Table

    if any("link" in row for row in rows):
        for row in rows:
            _print_entry(row)
        return

    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns)
    for row in rows:
        table.add_row(*[escape(_cell(row.get(column, ""))) for column in columns])
    OUT.print(table)


def _print_entry(row: dict[str, Any]) -> None:
    about = row.get("about") or row.get("error", "")
    OUT.print(f"[bold]{escape(row['name'])}[/bold]  {escape(about)}", highlight=False)
    origin = [row[key] for key in ("authors", "venue", "link", "from") if row.get(key)]
    OUT.print(f"  {escape('; '.join(origin))}", highlight=False)
    for key in ("claimed", "reproduced", "parameters"):
        if row.get(key):
            OUT.print(f"  [dim]{key}:[/dim] {escape(_cell(row[key]))}", highlight=False)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}={one_line(v)}" for k, v in value.items())
    return one_line(value)


@APP.command()
def check(
    reference: Annotated[
        str, typer.Argument(help="MODULE:NAME, FILE.py, or a registered plugin's name.")
    ],
    dataset: Annotated[str, typer.Option(help="What the honesty checks train and look at.")] = (
        "digits"
    ),
    threat: Annotated[str | None, typer.Option(help="As in Linf:8/255; the data set's own.")] = (
        None
    ),
    minutes: Annotated[float, typer.Option(help="Of training before the honesty checks.")] = 0.5,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Contract tests and honesty checks on a plugin; exit 1 naming what fails."""
    from robustdeq.contract.check import check_plugin

    del debug
    report = check_plugin(reference, dataset=dataset, threat=threat or "", minutes=minutes)
    for line in report.lines():
        OUT.print(escape(line), highlight=False)
    if not report.ok:
        raise typer.Exit(1)


@APP.command()
def new(
    kind: Annotated[str, typer.Argument(help="defense or attack.")],
    name: Annotated[str, typer.Argument(help="Of the file, without .py: my_deq.")],
    out: Annotated[Path, typer.Option(help="The folder to write it to.")] = Path(),
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Write a small plugin to begin with, which passes 'robustdeq check' as it stands."""
    from robustdeq.contract.templates import write_template

    del debug
    path = write_template(kind, name, out)
    OUT.print(f"wrote {escape(str(path))}; edit it, then:", highlight=False)
    for command in _next(kind, path):
        OUT.print(f"  robustdeq {escape(command)}", highlight=False)


def _next(kind: str, path: Path) -> list[str]:
    """The commands that take a new plugin into the table."""
    if kind == "attack":
        return [f"check {path}", f"run digits --plugin {path}"]
    weights = path.with_suffix(".safetensors")
    return [
        f"check {path}",
        f"train {path} --dataset digits --out {weights}",
        f"run digits --plugin {path}={weights}",
    ]
