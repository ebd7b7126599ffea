"""Gradients of whole modules, for any model, and the names of all gradients in suites."""

from robustdeq.differentiation.module_gradient import ModuleGradient
from robustdeq.differentiation.names import Gradient, expand_gradients, parse_gradient

__all__ = ["Gradient", "ModuleGradient", "expand_gradients", "parse_gradient"]
