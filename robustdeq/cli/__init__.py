"""The command line. Imports lazily: `--help` and `report` start without torch."""

from robustdeq.cli import convert, evidence, plugins, report, run, train
from robustdeq.cli.main import main

__all__ = ["convert", "evidence", "main", "plugins", "report", "run", "train"]
