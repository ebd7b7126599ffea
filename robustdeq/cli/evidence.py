"""`robustdeq report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustdeq.cli.console import APP


@APP.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder that a run has left.")],
    form: Annotated[str, typer.Option("--format", help="md or csv.")] = "md",
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Print a run's table, computed afresh from its records."""
    from robustdeq.report import read_run, render

    del debug
    name, verdicts = read_run(folder)
    typer.echo(render(name, verdicts, form), nl=False)
