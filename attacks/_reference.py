"""The attack classes of whichever AutoAttack package is installed."""

from __future__ import annotations

from typing import Any

from robustdeq.errors import UsageError


def fab_class() -> Any:
    """FAB (Croce and Hein 2020, "Minimally distorted Adversarial Examples...")."""
    try:
        from pyautoattack.fab_pt import FABAttack_PT as Fab
    except ImportError:
        try:
            from autoattack.fab_pt import FABAttack_PT as Fab
        except ImportError as cause:
            raise _missing() from cause
    return Fab


def square_class() -> Any:
    """Square (Andriushchenko et al. 2020)."""
    try:
        from pyautoattack.square import SquareAttack as Square
    except ImportError:
        try:
            from autoattack.square import SquareAttack as Square
        except ImportError as cause:
            raise _missing() from cause
    return Square


def _missing() -> UsageError:
    return UsageError("AutoAttack is not installed; install it with 'pip install pyautoattack'.")
