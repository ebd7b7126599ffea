"""Runs that are ended early: by Ctrl-C, or by a machine that is taken away."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.markup import escape

from robustdeq.cli.console import ERR


@contextmanager
def interruptible() -> Iterator[None]:
    """Leave with one sentence and the command that goes on, and exit code 130, or 143 for SIGTERM.

    What is being written is written to its end; a second signal does not wait for it.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt("SIGTERM")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt as cause:
        ERR.print(
            "interrupted; what is finished is kept, and the same command goes on from there:\n"
            f"  {escape(shlex.join(['robustdeq', *sys.argv[1:]]))}"
        )
        raise typer.Exit(143 if str(cause) else 130) from None
    finally:
        signal.signal(signal.SIGTERM, before)
