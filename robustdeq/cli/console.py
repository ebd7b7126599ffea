"""The application that all commands join, and where they print."""

from __future__ import annotations

import typer
from rich.console import Console

APP = typer.Typer(
    name="robustdeq",
    help="An adversarial-robustness benchmark for models that iterate to an answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
OUT = Console(soft_wrap=True)
ERR = Console(stderr=True, soft_wrap=True)
