"""The attack classes of whichever AutoAttack package is installed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from robustdeq.errors import UsageError


def reference_class(module: str, name: str) -> Any:
    """A class of pyautoattack, or of the git package autoattack; both name their parts alike."""
    for package in ("pyautoattack", "autoattack"):
        try:
            return getattr(import_module(f"{package}.{module}"), name)
        except ImportError:
            continue
    raise UsageError("AutoAttack is not installed; install it with 'pip install pyautoattack'.")
