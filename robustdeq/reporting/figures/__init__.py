"""Figures of a run, each in a file of its own, all in one style. Knows no torch."""

from robustdeq.reporting.figures.draw import figures, write_figures
from robustdeq.reporting.figures.figure import Figure
from robustdeq.reporting.figures.residual_traces import trace_figure

__all__ = ["Figure", "figures", "trace_figure", "write_figures"]
