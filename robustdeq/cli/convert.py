"""`robustdeq convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from robustdeq.cli.console import APP, OUT
from robustdeq.cli.train import assignments


@APP.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A state_dict, as torch.save leaves it.")],
    out: Annotated[Path, typer.Argument(help="FILE.safetensors.")],
    defense: Annotated[
        str, typer.Option(help="Whose weights they are: a registered defense, or a file's.")
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A defense's parameter, KEY=VALUE.")
    ] = None,
    dataset: Annotated[str, typer.Option(help="What it was trained on.")] = "digits",
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Open a file that is no safetensors; tensors alone."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Write weights of another program as safetensors with the metadata that a run asks for."""
    from robustdeq.conversion import convert as converted

    del debug
    parameters = assignments(set_ or [])
    sha256 = converted(
        source, out, defense=defense, parameters=parameters, dataset=dataset,
        allow_pickle=allow_pickle,
    )  # fmt: skip
    OUT.print(f"{escape(str(out))} sha256 {sha256}", highlight=False)
