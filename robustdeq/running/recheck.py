"""`robustdeq run --recheck SEED`: the same suite once more, under another seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from robustdeq.errors import UsageError
from robustdeq.running.run import Options, Tick, run_suite
from robustdeq.suite import Suite

FOLDER = "recheck"
"""Where such runs are, in the folder of the first."""


def under_seed(suite: Suite, seed: int) -> Suite:
    """The suite under another seed and name; what its weights were trained with stays.

    The seed is that of attacks, of the draws by which randomized models are judged, and of defenses
    that build a finished model by themselves.

    Raises:
        UsageError: if it is the suite's own seed, or negative.
    """
    if seed == suite.seed:
        raise UsageError(f"--recheck is {seed}, the seed of suite {suite.name}; give another.")
    if seed < 0:
        raise UsageError(f"--recheck is {seed}; give at least 0.")
    return replace(suite, name=f"{suite.name}-seed{seed}", seed=seed)


def run_again(
    suite: Suite, options: Options, seed: int, tick: Callable[[Tick], None] = lambda tick: None
) -> Path:
    """Run a suite under another seed; what records exist already is not computed again.

    Returns:
        its folder, `<out>/<suite>/recheck/<suite>-seed<seed>/`: a run like any other.

    Raises:
        UsageError: see `under_seed` and `run_suite`.
    """
    again = under_seed(suite, seed)
    out = options.out / suite.name / FOLDER
    run_suite(again, replace(options, out=out), tick)
    return out / again.name
