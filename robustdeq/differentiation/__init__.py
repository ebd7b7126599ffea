"""Gradients of whole modules, for any model, and the names of all gradients in suites."""

from robustdeq.differentiation.bpda import BPDA
from robustdeq.differentiation.expectation import Expectation, Smoothed
from robustdeq.differentiation.finite_difference import NES, FiniteDifference
from robustdeq.differentiation.module_gradient import ModuleGradient
from robustdeq.differentiation.names import (
    BIAS,
    Gradient,
    expand_gradients,
    parse_gradient,
    white_box_protocol,
)
from robustdeq.differentiation.straight_through import (
    Interception,
    Masking,
    StraightThrough,
    blame,
    trace,
)

__all__ = [
    "BIAS",
    "BPDA",
    "NES",
    "Expectation",
    "FiniteDifference",
    "Gradient",
    "Interception",
    "Masking",
    "ModuleGradient",
    "Smoothed",
    "StraightThrough",
    "blame",
    "expand_gradients",
    "parse_gradient",
    "trace",
    "white_box_protocol",
]
