"""The honesty gate: whether a model's gradients and predictions can be taken at their word.

Each check is a measurement with a threshold that was set on honest models alone
(`benchmarks/honest_controls.py`). A failed one is a flag in the row, with its number.
"""

from robustdeq.evaluation.gate.repetition import is_randomized
from robustdeq.evaluation.gate.rows import Row, check
from robustdeq.evaluation.gate.run import run_checks

__all__ = ["Row", "check", "is_randomized", "run_checks"]
