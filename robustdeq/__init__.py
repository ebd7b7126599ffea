"""RobustDEQ: a benchmark of adversarial robustness for models that iterate to an answer.

robustdeq.evaluate(model, x, y, threat="Linf:8/255")   a verdict on any module
robustdeq.load_model(id, dataset=..., threat=...)      a trained model of the registry
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustdeq.evaluation.direct import evaluate, load_model

try:
    __version__ = version("robustdeq")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__", "evaluate", "load_model"]


def __getattr__(name: str) -> Any:
    # Lazily, so that reports and the command line start without torch.
    if name in ("evaluate", "load_model"):
        from robustdeq.evaluation import direct

        return getattr(direct, name)
    raise AttributeError(f"module 'robustdeq' has no attribute {name!r}")
