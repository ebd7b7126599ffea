"""The gradient that undoes masking by itself, and what it says of who masks."""

from robustdeq.differentiation.straight_through.gradient import (
    Interception,
    Masking,
    StraightThrough,
    blame,
    trace,
)

__all__ = ["Interception", "Masking", "StraightThrough", "blame", "trace"]
