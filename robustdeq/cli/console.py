"""The application that all commands join, and where they print."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console

APP = typer.Typer(
    name="robustdeq",
    help="An adversarial-robustness benchmark for models that iterate to an answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class PlainConsole(Console):
    """A console on which text cannot move the cursor, change colors or forge lines.

    Names and messages of others end here, whatever a command forgot; markup is still the command's
    own to escape.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's, with control characters but line breaks as spaces."""
        super().print(*(_inert(o) if isinstance(o, str) else o for o in objects), **options)


def _inert(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


OUT = PlainConsole(soft_wrap=True)
ERR = PlainConsole(stderr=True, soft_wrap=True)
