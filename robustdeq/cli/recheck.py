"""The second half of `robustdeq run --recheck SEED`: once more, and what has changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from robustdeq.cli.console import ERR, OUT
from robustdeq.cli.interrupts import interruptible

if TYPE_CHECKING:
    from robustdeq.running.run import Options
    from robustdeq.suite import Suite


def recheck_run(suite: Suite, options: Options, seed: int) -> bool:
    """Run a suite under another seed and say what it changes.

    Returns:
        whether every figure that both runs have stays inside of its interval, and there is one.
    """
    from robustdeq.cli.run import RunDisplay
    from robustdeq.reporting.rechecked import recheck, shown, write_recheck
    from robustdeq.reporting.run import read_run
    from robustdeq.running.recheck import run_again

    first = options.out / suite.name
    with interruptible(), RunDisplay() as display:
        second = run_again(suite, options, seed, display.tick)
    found = recheck(read_run(first), read_run(second))
    write_recheck(first, found)
    OUT.print(escape(shown(found).to_string(index=False)), highlight=False)
    OUT.print(escape(f"{found.summary()}; wrote {first}/recheck.md and recheck.csv"))
    for words in found.outside():
        ERR.print(escape(words), style="red")
    return not found.outside() and any(row.figures for row in found.rows)
