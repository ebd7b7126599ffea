"""The entry point: errors become one sentence and an exit code."""

from __future__ import annotations

import sys

from rich.markup import escape

from robustdeq.cli.console import APP, ERR
from robustdeq.errors import RobustDEQError, UsageError, sentence


def main() -> None:
    """Entry point: errors become one sentence and an exit code."""
    debug = "--debug" in sys.argv
    try:
        APP(standalone_mode=True)
    except RobustDEQError as error:
        if debug:
            raise
        ERR.print(escape(f"error: {sentence(error)}"), style="red")
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except Exception as error:
        if debug:
            raise
        ERR.print(escape(f"error: {sentence(error)} (--debug shows where)"), style="red")
        sys.exit(1)
